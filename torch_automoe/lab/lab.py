# SPDX-License-Identifier: Apache-2.0
"""A laboratory of emulated nodes, as its owner sees it."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

from . import channel
from .errors import LabError
from .nodes import Nodes
from .process import Process, Stream, pid_of_pidfd
from .spec import address, hostname, make_spec, parse_rate, parse_size

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
# Isolated and without site: nothing but the standard library and this package.
_BOOT = (
    f"import sys; sys.path.insert(0, {_PACKAGE_ROOT!r}); "
    f"from torch_automoe.lab.supervisor import main; main()"
)


class Lab(Nodes):
    """Emulated nodes joined by a network, from ``start`` (or ``with``) to ``close``.

        with Lab([2, 2], rate="1gbit") as lab:
            exit_code = lab.run([sys.executable, "script.py"])

    Everything in it ends when it is closed and when its owner dies, however it dies.
    Not thread-safe: use it from one thread at a time.

    Attributes:
        spec: the shape.
        notes: what could not be emulated here, one sentence each.
        node_pids: process id (outside) of each node's pid 1; killing it ends the node.
        rank_pids: process ids (outside) of the ranks of the latest job.
    """

    def __init__(
        self,
        nodes: Sequence[int] = (2, 2),
        *,
        rate: str | None = None,
        burst: str | None = None,
        threads: int | None = None,
        placement: str = "block",
    ) -> None:
        """Describe a laboratory; nothing is started yet.

        Args:
            nodes: ranks of each node.
            rate: of each node's link in each direction, as tc writes it ("1gbit");
                None: unshaped.
            burst: bytes that may leave a link at once ("128kb"); None: 128 KiB, or
                what 1 ms carries where that is more.
            threads: OMP_NUM_THREADS of the ranks; None: as in their env, else 1.
            placement: "block" or "cyclic", how ranks are dealt out to nodes.

        Raises:
            ValueError: an argument is out of its range; the message names it.
        """
        super().__init__(make_spec(nodes, rate, burst, threads, placement))
        self.notes: list[str] = []
        self.node_pids: list[int] = []
        self._stack = ExitStack()
        self._control: socket.socket | None = None
        self._node_sockets: list[socket.socket] = []

    def __enter__(self) -> Lab:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def addresses(self) -> list[str]:
        """IPv4 address of each node."""
        return [address(node) for node in range(self.spec.num_nodes)]

    @property
    def hostnames(self) -> list[str]:
        """Host name of each node."""
        return [hostname(node) for node in range(self.spec.num_nodes)]

    def start(self) -> Lab:
        """Make the namespaces and the network.

        Raises:
            LabError: it cannot be done here; the message says why and what to do.
        """
        if sys.platform != "linux":
            raise LabError(f"nodes can only be emulated on Linux, not {sys.platform}")
        if self._control is not None:
            raise LabError("this laboratory has already been started")
        try:
            self._start_supervisor()
            self._await_ready()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End every process in the laboratory and wait until all are gone."""
        if self._control is not None:
            # A forked copy of us may hold the socket too: say goodbye on it.
            with suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)
        self._control = None
        self._node_sockets = []
        self._stack.close()

    def popen(
        self,
        argv: Sequence[str],
        *,
        node: int = 0,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = None,
        stderr: Stream = None,
        kill_group: bool = False,
    ) -> Process:
        """Start a program on a node; arguments as for subprocess.Popen.

        Args:
            kill_group: when it ends, also end the processes that it left behind.

        Raises:
            LabError: the laboratory does not run, or has no such node.
            OSError: the program cannot be started.
        """
        self._check_node(node)
        node_env = dict(os.environ if env is None else env)
        node_env.update(self.node_environment(node))
        return Process(
            self._node_sockets[node],
            node,
            argv,
            env=node_env,
            cwd=os.getcwd() if cwd is None else cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            kill_group=kill_group,
        )

    def exec(
        self,
        node: int,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run one command on a node to its end, as its root; returns its output.

        Raises:
            subprocess.CalledProcessError: ``check`` is set and it failed.
            subprocess.TimeoutExpired: it took longer than ``timeout`` seconds.
        """
        pipe = subprocess.PIPE
        process = self.popen(argv, node=node, env=env, stdout=pipe, stderr=pipe)
        try:
            stdout, stderr = process.communicate(timeout)
        finally:
            process.close()
        completed = subprocess.CompletedProcess(
            list(argv), process.returncode, stdout.decode(), stderr.decode()
        )
        if check:
            completed.check_returncode()
        return completed

    def set_link(self, node: int, up: bool) -> None:
        """Unplug a node's network cable, or plug it in again."""
        self._check_node(node)
        self._ask("set_link", node=node, up=up)

    def set_rate(self, node: int, rate: str | None, burst: str | None = None) -> None:
        """Change the rate of one node's link, both ways; None: unshaped."""
        self._check_node(node)
        in_bytes = None if rate is None else parse_rate(rate)
        bucket = None if burst is None else parse_size(burst)
        self._ask("set_rate", node=node, rate=in_bytes, burst=bucket)

    def counters(self) -> list[dict[str, int]]:
        """Per node: tx_bytes, rx_bytes, tx_packets, rx_packets of its interface.

        Bytes are those of the kernel's packets with their Ethernet headers; one packet
        of segmentation offload (up to 64 kB) counts its headers once.
        """
        return self._ask("counters")

    def _start_supervisor(self) -> None:
        control, control_end = socket.socketpair()
        self._stack.callback(control.close)
        self._control = control
        pairs = [socket.socketpair() for _ in range(self.spec.num_nodes)]
        owner_pidfd = os.pidfd_open(os.getpid())
        ends = [control_end.fileno(), owner_pidfd]
        ends += [end.fileno() for _, end in pairs]
        config = {
            "spec": asdict(self.spec),
            "control": ends[0],
            "owner_pidfd": ends[1],
            "nodes": ends[2:],
        }
        try:
            supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, json.dumps(config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=ends,
                start_new_session=True,
            )
        finally:
            control_end.close()
            os.close(owner_pidfd)
            for _, end in pairs:
                end.close()
        # Closing runs backwards: first the sockets, which ends it, then the wait.
        self._stack.pop_all()
        self._stack.callback(supervisor.wait)
        self._stack.callback(control.close)
        for ours, _ in pairs:
            self._stack.callback(ours.close)
        self._node_sockets = [ours for ours, _ in pairs]

    def _await_ready(self) -> None:
        reply = channel.receive(self._control)
        if reply is None or "error" in reply[0]:
            reason = "its supervisor ended" if reply is None else reply[0]["error"]
            raise LabError(f"cannot emulate nodes here: {reason}")
        self.notes = reply[0]["notes"]
        self.node_pids = []
        for node_socket in self._node_sockets:
            up = channel.receive(node_socket)
            if up is None:
                raise LabError("cannot emulate nodes here: a node ended at its start")
            pidfd = up[1][0]
            self.node_pids.append(pid_of_pidfd(pidfd))
            os.close(pidfd)

    def _check_node(self, node: int) -> None:
        if self._control is None:
            raise LabError("the laboratory is not running: call start() or use `with`")
        if not 0 <= node < self.spec.num_nodes:
            raise LabError(f"node: got {node}, expected 0 to {self.spec.num_nodes - 1}")

    def _ask(self, operation: str, **arguments: object) -> object:
        self._check_node(0)
        try:
            request = {"operation": operation, "arguments": arguments}
            channel.send(self._control, request)
            reply = channel.receive(self._control)
        except BrokenPipeError:
            reply = None
        if reply is None:
            raise LabError(f"{operation}: the laboratory has ended")
        if "error" in reply[0]:
            raise LabError(reply[0]["error"])
        return reply[0]["result"]


@functools.cache
def available(shaped: bool = True) -> tuple[bool, str]:
    """Whether nodes can be emulated here, found by emulating one (about 0.1 s, once).

    Args:
        shaped: also require links with a rate.

    Returns:
        (True, ""), or (False, why not and what would help).
    """
    try:
        with Lab([1], rate="1gbit" if shaped else None):
            return True, ""
    except LabError as error:
        return False, str(error)
