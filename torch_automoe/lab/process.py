# SPDX-License-Identifier: Apache-2.0
"""A program that runs on a node, seen from outside the laboratory."""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from . import channel
from .errors import LabError

Stream = int | IO | None


class Process:
    """Like subprocess.Popen, for a program in a node's namespaces.

    Attributes:
        args: the command line.
        node: the node it runs on.
        pid: its process id outside the laboratory, for kill, gdb and py-spy.
        returncode: exit code, -n when signal n ended it, None while it runs.
        stdin, stdout, stderr: binary streams where PIPE was asked for, else None.
    """

    def __init__(
        self,
        owner: socket.socket,
        node: int,
        argv: Sequence[str],
        *,
        env: dict[str, str],
        cwd: str,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = None,
        stderr: Stream = None,
        kill_group: bool = False,
    ) -> None:
        """Start a program; Lab.popen is the public way.

        Raises:
            OSError: it could not be started, with the errno of exec.
            LabError: the node has ended.
        """
        self.args = list(argv)
        self.node = node
        self.returncode: int | None = None
        self.end_time: float | None = None
        self._pidfd: int | None = None
        request = {
            "argv": self.args,
            "env": env,
            "cwd": cwd,
            "kill_group": kill_group,
        }
        self._report, report_end = socket.socketpair()
        opened: list[int] = []
        try:
            self.stdin, child_stdin = _child_end(stdin, 0, "wb", opened)
            self.stdout, child_stdout = _child_end(stdout, 1, "rb", opened)
            if stderr == subprocess.STDOUT:
                self.stderr, child_stderr = None, child_stdout
            else:
                self.stderr, child_stderr = _child_end(stderr, 2, "rb", opened)
            fds = [report_end.fileno(), child_stdin, child_stdout, child_stderr]
            channel.send(owner, request, fds)
        except BrokenPipeError:
            self._report.close()
            raise _ended(node) from None
        finally:
            report_end.close()
            for fd in opened:
                os.close(fd)
        self._await_start()

    def fileno(self) -> int:
        """A descriptor that is readable once the program has ended."""
        return self._report.fileno()

    def poll(self) -> int | None:
        """The return code, or None while the program runs."""
        return self._collect(timeout_ms=0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        timeout_ms = None if timeout is None else max(0, int(timeout * 1000))
        returncode = self._collect(timeout_ms)
        if returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Collect stdout and stderr until they close, then wait for the end.

        Raises:
            subprocess.TimeoutExpired: not over after ``timeout`` seconds; it is killed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        collected = {"stdout": bytearray(), "stderr": bytearray()}
        with selectors.DefaultSelector() as selector:
            for name in collected:
                if (stream := getattr(self, name)) is not None:
                    selector.register(stream, selectors.EVENT_READ, name)
            while selector.get_map():
                ready = selector.select(_seconds_left(deadline))
                if not ready:
                    self.kill()
                    self.wait()
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
                for key, _ in ready:
                    part = os.read(key.fd, 1 << 16)
                    collected[key.data] += part
                    if not part:
                        selector.unregister(key.fileobj)
        self.wait(_seconds_left(deadline))
        return bytes(collected["stdout"]), bytes(collected["stderr"])

    def send_signal(self, signum: int) -> None:
        """Send a signal; nothing happens once the program has ended."""
        # The pidfd keeps meaning this process. Not poll(): this may run in a signal
        # handler that interrupted it.
        if self._pidfd is not None and self.returncode is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)

    def signal_group(self, signum: int) -> None:
        """Send a signal to it and the processes it started, as a terminal would."""
        if self._pidfd is not None and self.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signum)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Close our descriptors; the program goes on."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self._report.close()

    def _await_start(self) -> None:
        reply = channel.receive(self._report)
        if reply is None:
            self.close()
            raise _ended(self.node)
        message, fds = reply
        if "errno" in message:
            self.close()
            code = message["errno"]
            raise OSError(code, os.strerror(code), message["filename"])
        self._pidfd = fds[0]
        self.pid = pid_of_pidfd(self._pidfd)

    def _collect(self, timeout_ms: int | None) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._report, select.POLLIN)
            if poll.poll(timeout_ms):
                reply = channel.receive(self._report)
                # A node that was killed reports nothing: all in it died by SIGKILL.
                ended = {} if reply is None else reply[0]
                self.returncode = ended.get("returncode", -signal.SIGKILL)
                self.end_time = ended.get("time", time.monotonic())
        return self.returncode


def _ended(node: int) -> LabError:
    return LabError(f"node {node} has ended: nothing can be started on it any more")


def _seconds_left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def pid_of_pidfd(pidfd: int) -> int:
    """The process id behind a pidfd, as this process's /proc counts it."""
    info = Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii")
    return int(info.split("Pid:")[1].split()[0])


def _child_end(
    stream: Stream, standard: int, mode: str, opened: list[int]
) -> tuple[IO | None, int]:
    """Our end of one standard stream and the descriptor for the child.

    Descriptors that must be closed once the child has them go into ``opened``.
    """
    if stream is None:
        return None, standard
    if stream == subprocess.DEVNULL:
        opened.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        return None, opened[-1]
    if stream == subprocess.PIPE:
        read_end, write_end = os.pipe()
        ours, theirs = (write_end, read_end) if mode == "wb" else (read_end, write_end)
        opened.append(theirs)
        return open(ours, mode, buffering=0), theirs
    return None, stream if isinstance(stream, int) else stream.fileno()
