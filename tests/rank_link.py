# SPDX-License-Identifier: Apache-2.0
"""How pytest reaches its ranks: the process that forks them, and a socket to each."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from torch_automoe.lab import channel
from torch_automoe.lab.process import pid_of_pidfd

# Characters of a rank's log that an error shows.
LOG_TAIL = 6000
_LENGTH = struct.Struct("=Q")


def send_frame(connection: socket.socket, value: object) -> None:
    """Send one pickled value."""
    body = pickle.dumps(value)
    connection.sendall(_LENGTH.pack(len(body)))
    connection.sendall(body)


def receive_frame(connection: socket.socket) -> object:
    """Receive one pickled value; EOFError when the peer has gone."""
    (size,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    return pickle.loads(_receive_exactly(connection, size))


def _receive_exactly(connection: socket.socket, size: int) -> bytearray:
    body = bytearray(size)
    view = memoryview(body)
    while view:
        try:
            count = connection.recv_into(view)
        except ConnectionResetError:
            count = 0
        if not count:
            raise EOFError
        view = view[count:]
    return body


class Rank:
    """One running rank, seen from pytest."""

    def __init__(self, connection: socket.socket, report: socket.socket, log: Path):
        self.connection = connection
        self.log = log
        self._report = report
        reply = channel.receive(report)
        if reply is None:
            raise RuntimeError(f"a rank could not be started:\n{log.read_text()}")
        self._pidfd = reply[1][0]
        self.pid = pid_of_pidfd(self._pidfd)

    def send_signal(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signum)

    def wait(self, timeout: float) -> int | None:
        """How it ended; None: it still runs; -9 too when its whole node was killed."""
        self._report.settimeout(timeout)
        try:
            reply = channel.receive(self._report)
        except TimeoutError:
            return None
        return -signal.SIGKILL if reply is None else reply[0]["returncode"]

    def close(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait(timeout=10)
        self.connection.close()
        self._report.close()
        os.close(self._pidfd)

    def log_bytes(self) -> int:
        return self.log.stat().st_size

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_TAIL:]


class RankServer:
    """The process that forks ranks (rank_server.py), started once per test run."""

    _shared: RankServer | None = None

    def __init__(self) -> None:
        self._control, end = socket.socketpair()
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # One thread until a rank asks for more: OpenMP must not start any before fork.
        env.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        program = Path(__file__).with_name("rank_server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program), str(end.fileno())],
            env=env,
            pass_fds=[end.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        end.close()
        if channel.receive(self._control) is None:
            raise RuntimeError(f"{program.name} ended with {self._process.wait()}")

    @classmethod
    def shared(cls) -> RankServer:
        """The server of this test run, started at first use."""
        if cls._shared is None or cls._shared._process.poll() is not None:
            cls._shared = cls()
        return cls._shared

    @classmethod
    def close_shared(cls) -> None:
        """End the server, if one was started."""
        if cls._shared is not None:
            cls._shared._control.close()
            cls._shared._process.wait()
            cls._shared = None

    def start_rank(self, message: dict[str, object], log: Path) -> Rank:
        """Fork one rank; see rank_server.py for the message."""
        connection, connection_end = socket.socketpair()
        report, report_end = socket.socketpair()
        with log.open("wb") as log_file, connection_end, report_end:
            fds = [connection_end.fileno(), report_end.fileno(), log_file.fileno()]
            channel.send(self._control, message, fds)
        return Rank(connection, report, log)
