# SPDX-License-Identifier: Apache-2.0
"""The ranks of one job: their output, their end, and stopping them."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Protocol

OnLine = Callable[["Member", str, bytes], None]
OnEvent = Callable[[str], None]

# Longest unfinished line that is kept back for its end.
_MAX_LINE = 64 * 1024
# How long output is awaited from what the ranks left behind, once all have ended.
_DRAIN_SECONDS = 1.0
# Upper bound of one sleep, so that a signal handler's decision is seen soon.
_SLICE_SECONDS = 0.5
# The first eight colours that are readable on dark and light backgrounds.
_COLOURS = (36, 33, 35, 32, 34, 31, 96, 93)


class RankProcess(Protocol):
    """What a job needs of a process; Process and LoopbackProcess offer it."""

    args: list[str]
    pid: int
    stdout: IO | None
    stderr: IO | None
    end_time: float | None

    def fileno(self) -> int:
        """A descriptor that is readable once the process has ended."""

    def poll(self) -> int | None:
        """The return code, or None while it runs."""

    def signal_group(self, signum: int) -> None:
        """Send a signal to it and the processes it started."""

    def close(self) -> None:
        """Let go of all descriptors."""


@dataclass(frozen=True)
class Member:
    """One process of a job: a rank, or a node's torchrun."""

    index: int
    node: int
    label: str
    process: RankProcess


@dataclass(frozen=True)
class Failure:
    """The member that failed first."""

    member: Member
    returncode: int

    def __str__(self) -> str:
        process = f"{self.member.label} (pid {self.member.process.pid})"
        if self.returncode < 0:
            return f"{process} was killed by {signal_name(-self.returncode)}"
        return f"{process} exited with code {self.returncode}"


class Job:
    """Running ranks. Output moves and failures are acted upon inside poll and wait.

    As a context manager it kills what still runs at the end of the block.

    Attributes:
        members: one per rank.
        failure: who failed first, None so far.
    """

    def __init__(
        self,
        members: list[Member],
        on_line: OnLine | None = None,
        on_event: OnEvent | None = None,
        prefix: bool = True,
        grace: float = 10.0,
        linger: float = 1.0,
    ) -> None:
        """Take over started processes; Lab.launch is the public way.

        Args:
            members: the processes, with pipes as stdout and stderr.
            on_line: gets (member, "stdout" or "stderr", line without its end); None:
                lines go to our stdout and stderr.
            on_event: gets in one line what happens to the job; None: to stderr.
            prefix: without ``on_line``: mark each line with its rank.
            grace: seconds between SIGTERM and SIGKILL when ranks are stopped.
            linger: seconds that the others may go on after one rank failed.
        """
        self.members = members
        self.failure: Failure | None = None
        self._on_line = on_line or LineWriter(members, prefix)
        self._on_event = on_event or _print_event
        self._grace, self._linger = grace, linger
        self._stop_time: float | None = None
        self._kill_time: float | None = None
        self._end_time: float | None = None
        self._stop_signal: int | None = None
        self._running = {member.index: member for member in members}
        self._partial: dict[tuple[int, str], bytearray] = {}
        self._selector = selectors.DefaultSelector()
        for member in members:
            self._selector.register(
                member.process, selectors.EVENT_READ, (member, "end")
            )
            for stream in ("stdout", "stderr"):
                pipe = getattr(member.process, stream)
                self._partial[member.index, stream] = bytearray()
                self._selector.register(pipe, selectors.EVENT_READ, (member, stream))

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def rank_pids(self) -> list[int]:
        """Process ids of the ranks, outside the laboratory."""
        return [member.process.pid for member in self.members]

    def poll(self, timeout: float = 0.0) -> int | None:
        """Move output and act on failures for up to ``timeout`` seconds.

        Returns:
            the exit code once the job is over, else None.
        """
        deadline = time.monotonic() + timeout
        while self._selector.get_map():
            now = time.monotonic()
            self._act(now)
            if self._end_time is not None and now >= self._end_time:
                break
            waiting = max(0.0, min(self._next_time(now), deadline) - now)
            for key, _ in self._selector.select(waiting):
                self._read(*key.data)
            if time.monotonic() >= deadline and self._selector.get_map():
                return None
        self._flush()
        return self._exit_code()

    def wait(self, timeout: float | None = None) -> int:
        """Forward output until the job is over.

        Returns:
            0; the code of the rank that failed first, 128 + n when signal n ended it;
            128 + n when ``stop(n)`` ended the job.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll(_SLICE_SECONDS)) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(
                    self.members[0].process.args, timeout or 0.0
                )
        return code

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Send a signal to every rank, SIGKILL after the grace period.

        A second call sends SIGKILL at once. Safe in a signal handler.
        """
        if self._stop_signal is None:
            self._stop_signal = signum
            self._signal_all(signum)
        else:
            self._signal_all(signal.SIGKILL)

    def close(self) -> None:
        """Kill what still runs and let go of all descriptors."""
        self._signal_all(signal.SIGKILL)
        self._selector.close()
        for member in self.members:
            member.process.close()

    def _signal_all(self, signum: int) -> None:
        if self._kill_time is None:
            self._kill_time = time.monotonic() + self._grace
        for member in list(self._running.values()):
            member.process.signal_group(signum)

    def _next_time(self, now: float) -> float:
        times = (self._stop_time, self._kill_time, self._end_time, now + _SLICE_SECONDS)
        return min(moment for moment in times if moment is not None)

    def _act(self, now: float) -> None:
        """Do what is due: stop, kill."""
        if self._stop_time is not None and now >= self._stop_time:
            self._stop_time = None
            if self._running:
                self._signal_all(signal.SIGTERM)
        if self._kill_time is not None and now >= self._kill_time:
            self._kill_time = None
            if self._running:
                ranks = ", ".join(member.label for member in self._running.values())
                self._on_event(f"killing what did not stop in time: {ranks}")
                self._signal_all(signal.SIGKILL)

    def _read(self, member: Member, what: str) -> None:
        if what == "end":
            self._note_end(member)
            return
        pipe = getattr(member.process, what)
        part = os.read(pipe.fileno(), 1 << 16)
        if not part:
            self._selector.unregister(pipe)
        self._emit(member, what, part)

    def _emit(self, member: Member, stream: str, part: bytes) -> None:
        """Hand out whole lines; a carriage return ends a line too (progress bars)."""
        partial = self._partial[member.index, stream]
        partial += part.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = bytes(partial).split(b"\n")
        if len(rest) > _MAX_LINE or (not part and rest):
            lines, rest = [*lines, rest], b""
        partial[:] = rest
        for line in lines:
            self._on_line(member, stream, line)

    def _flush(self) -> None:
        for member in self.members:
            for stream in ("stdout", "stderr"):
                self._emit(member, stream, b"")

    def _note_end(self, member: Member) -> None:
        returncode = member.process.poll()
        if returncode is None:
            return
        self._selector.unregister(member.process)
        del self._running[member.index]
        if not self._running:
            self._stop_time = self._kill_time = None
            self._end_time = time.monotonic() + _DRAIN_SECONDS
        if returncode != 0 and self._stop_signal is None:
            self._note_failure(member, returncode)

    def _note_failure(self, member: Member, returncode: int) -> None:
        failure = Failure(member, returncode)
        if self.failure is None:
            self.failure = failure
            self._on_event(str(failure))
            if self._running:
                self._stop_time = time.monotonic() + self._linger
        elif _end_of(member) < _end_of(self.failure.member):
            # Its report was read later, but it ended earlier: the first one counts.
            self.failure = failure
            self._on_event(f"{failure}, before that")

    def _exit_code(self) -> int:
        if self.failure is not None:
            returncode = self.failure.returncode
            return 128 - returncode if returncode < 0 else returncode
        return 0 if self._stop_signal is None else 128 + self._stop_signal


class LineWriter:
    """Writes each line whole, behind its rank; colours only on a terminal."""

    def __init__(self, members: list[Member], prefix: bool) -> None:
        """Write to sys.stdout and sys.stderr; ``prefix`` False: the bare lines."""
        self._prefix = prefix
        self._width = max(len(member.label) for member in members)

    def __call__(self, member: Member, stream: str, line: bytes) -> None:
        out = getattr(sys, stream)
        text = line.decode(errors="backslashreplace")
        if self._prefix:
            tag = f"[{member.label}]".ljust(self._width + 2)
            if out.isatty() and "NO_COLOR" not in os.environ:
                tag = f"\x1b[{_COLOURS[member.index % len(_COLOURS)]}m{tag}\x1b[0m"
            text = f"{tag} {text}"
        encoding = getattr(out, "encoding", None) or "utf-8"
        out.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        out.flush()


@contextmanager
def forward_signals(job: Job) -> Iterator[None]:
    """Pass SIGINT, SIGTERM and SIGHUP on to the ranks; a second one kills them.

    Only the main thread may set handlers: elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {
        signum: signal.signal(signum, lambda number, frame: job.stop(number))
        for signum in signals
    }
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def signal_name(signum: int) -> str:
    """SIGKILL for 9, also where Python knows no name for it."""
    with suppress(ValueError):
        return signal.Signals(signum).name
    return f"signal {signum}"


def _end_of(member: Member) -> float:
    ended = member.process.end_time
    return float("inf") if ended is None else ended


def _print_event(text: str) -> None:
    print(f"automoe lab: {text}", file=sys.stderr, flush=True)
