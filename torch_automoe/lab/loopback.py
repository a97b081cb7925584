# SPDX-License-Identifier: Apache-2.0
"""Ranks without namespaces: all on this machine, over the loopback interface."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from . import namespaces
from .nodes import Nodes
from .process import Stream
from .spec import hostname, make_spec


class LoopbackProcess(subprocess.Popen):
    """A subprocess that a Job can watch; it dies with the thread that started it."""

    def __init__(self, argv: Sequence[str], node: int, kill_group: bool, **options):
        """Start it; options as for subprocess.Popen."""
        self.node = node
        self.end_time: float | None = None
        self._kill_group = kill_group
        super().__init__(
            list(argv),
            start_new_session=True,
            preexec_fn=_die_with_parent,
            bufsize=0,
            **options,
        )
        self._pidfd = os.pidfd_open(self.pid)

    def fileno(self) -> int:
        """A descriptor that is readable once the process has ended."""
        return self._pidfd

    def poll(self) -> int | None:
        """The return code, or None while it runs."""
        if self.returncode is None and select.select([self._pidfd], [], [], 0)[0]:
            self.end_time = time.monotonic()
            if self._kill_group:
                # Not yet reaped, so the number is still its own.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
        return super().poll()

    def send_signal(self, signum: int) -> None:
        """Send a signal; nothing happens once the process has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)

    def signal_group(self, signum: int) -> None:
        """Send a signal to it and the processes it started, as a terminal would."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signum)

    def close(self) -> None:
        """Let go of all descriptors; a process that was killed is awaited."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()
        os.close(self._pidfd)


class Loopback(Nodes):
    """The fallback where nodes cannot be emulated; launch and run as in Lab.

    Several nodes are a pretence: AUTOMOE_NODE pins which ranks form a node, while all
    share this machine's loopback interface, memory and process ids. There are no link
    rates, counters or faults.
    """

    def __init__(
        self,
        nodes: Sequence[int] = (4,),
        *,
        threads: int | None = None,
        placement: str = "block",
    ) -> None:
        """Describe the ranks of each node.

        Raises:
            ValueError: an argument is out of its range; the message names it.
        """
        super().__init__(make_spec(nodes, threads=threads, placement=placement))
        self._reserved = _reserve_port()
        self._port = self._reserved.getsockname()[1]

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def master(self) -> tuple[str, int]:
        """Address and port of rank 0's store."""
        return "127.0.0.1", self._port

    def node_environment(self, node: int) -> dict[str, str]:
        """Variables of every program of a node."""
        return {"AUTOMOE_NODE": hostname(node)} if self.spec.num_nodes > 1 else {}

    def close(self) -> None:
        """Let the port of rank 0's store go; each job ends its own processes."""
        self._reserved.close()

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
    ) -> LoopbackProcess:
        """Start a program as part of a node; arguments as for Lab.popen."""
        node_env = dict(os.environ if env is None else env)
        node_env.update(self.node_environment(node))
        return LoopbackProcess(
            argv,
            node,
            kill_group,
            env=node_env,
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )


def _die_with_parent() -> None:
    namespaces.set_parent_death_signal(signal.SIGKILL)


def _reserve_port() -> socket.socket:
    """A port that no other program is given, on which a server can listen yet.

    While a socket is bound to it, the kernel gives it to nobody who asks for any port.
    But who names it may listen there, as long as this one does not, and both reuse
    addresses, as servers do: see SO_REUSEADDR in socket(7).
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved
