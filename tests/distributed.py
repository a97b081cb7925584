# SPDX-License-Identifier: Apache-2.0
"""Ranks for tests: a pool that runs many cases in one launch, and fresh processes.

    pool = RankPool([2, 2], rate="1gbit", backend="automoe")
    results = pool.run(fn, *args)        # fn: module-level, run on every rank
    outcomes = pool.run(fn, check=False) # errors come back instead of being raised

Several nodes are emulated by the laboratory. Where namespaces cannot be made, they are
ranks of one machine with pinned nodes (AUTOMOE_NODE), and what needs more than that is
skipped with the reason.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rank_link import LOG_TAIL, Rank, RankServer, receive_frame, send_frame

from torch_automoe.lab import Lab, Loopback, available

_DEADLINE = 120.0


class RankFailure(AssertionError):
    """Ranks raised, died or hung; the text holds what each of them said."""

    def __init__(self, outcomes: list[Outcome], head: str) -> None:
        self.outcomes = outcomes
        texts: dict[str, list[int]] = {}
        for rank, outcome in enumerate(outcomes):
            if outcome.error is not None:
                texts.setdefault(outcome.details, []).append(rank)
        parts = [head]
        for text, ranks in texts.items():
            names = ", ".join(map(str, ranks))
            parts.append(f"--- rank {names} ---\n{text.rstrip()}")
        super().__init__("\n".join(parts))


@dataclass
class Outcome:
    """What one rank answered.

    Attributes:
        value: what the function returned.
        error: the exception's message, or how the rank ended; None: no error.
        kind: the exception's type name, "died" or "hung".
        details: the traceback, or the end of the rank's log.
    """

    value: object = None
    error: str | None = None
    kind: str = ""
    details: str = ""


def make_nodes(
    nodes: Sequence[int],
    *,
    rate: str | None = None,
    placement: str = "block",
    need_lab: bool = False,
) -> Lab | Loopback:
    """Nodes for a test: emulated, or pretended where that is possible, else a skip.

    Args:
        nodes: ranks of each node; one node needs no laboratory.
        rate: of the links; needs a laboratory.
        need_lab: skip rather than pretend.
    """
    need_lab = need_lab or rate is not None
    if len(nodes) > 1 or need_lab:
        possible, reason = available(shaped=rate is not None)
        if possible:
            return Lab(nodes, rate=rate, placement=placement)
        if need_lab:
            pytest.skip(reason)
    return Loopback(nodes, placement=placement)


@dataclass
class RankPool:
    """Ranks with an initialised default process group that run one call after another.

    An exception, a death or a hang leaves a group in no known state: the next run then
    starts new ranks (a fraction of a second; the nodes stay).

    Attributes:
        nodes: ranks of each node.
        rate: of the links, as Lab takes it.
        backend: for init_process_group; None: no group is made.
        env: variables for the ranks, beside those of torchrun. What torch reads while
            it is imported must be tested with run_fresh instead.
        timeout: of the process group, in seconds.
        placement: "block" or "cyclic".
        need_lab: skip the test where nodes cannot be emulated.
        after_failure: seconds that the other ranks may take to end their call once one
            has failed or died; then they count as hung.
    """

    nodes: Sequence[int]
    rate: str | None = None
    backend: str | None = "automoe"
    env: dict[str, str] = field(default_factory=dict)
    timeout: float = 60.0
    placement: str = "block"
    need_lab: bool = False
    after_failure: float = 15.0

    def __post_init__(self) -> None:
        self._nodes = make_nodes(
            self.nodes,
            rate=self.rate,
            placement=self.placement,
            need_lab=self.need_lab,
        )
        self._nodes.__enter__()
        self._logs = tempfile.TemporaryDirectory(prefix="automoe-ranks-")
        self._ranks: list[Rank] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._nodes.spec.world_size

    @property
    def lab(self) -> Lab:
        """The laboratory, for counters and faults; skips where there is none."""
        if not isinstance(self._nodes, Lab):
            pytest.skip(f"needs emulated nodes: {available()[1] or 'has one node'}")
        return self._nodes

    @property
    def pids(self) -> list[int]:
        """Process id of each rank, outside the nodes."""
        self._ensure_started()
        return [rank.pid for rank in self._ranks]

    def run(
        self,
        fn: Callable[..., object],
        *args: object,
        deadline: float = _DEADLINE,
        check: bool = True,
        **kwargs: object,
    ) -> list:
        """Run ``fn(*args, **kwargs)`` on every rank.

        Args:
            fn: a module-level function; arguments and results are pickled.
            deadline: seconds after which ranks that have not answered count as hung.
            check: raise on any error; else errors come back.

        Returns:
            results per rank; with ``check`` False an Outcome per rank.

        Raises:
            RankFailure: with the traceback, or the stacks of a hang, per rank.
        """
        self.submit(fn, *args, **kwargs)
        return self.join(deadline, check)

    def submit(self, fn: Callable[..., object], *args: object, **kwargs: object):
        """Start ``fn`` on every rank; ``join`` waits for it."""
        if "<" in fn.__qualname__:
            raise ValueError(f"fn: got {fn.__qualname__}, expected a module's function")
        self._ensure_started()
        for rank in self._ranks:
            # A rank that has died is found by join.
            with suppress(BrokenPipeError):
                call = (fn.__module__, fn.__qualname__, args, kwargs)
                send_frame(rank.connection, call)

    def join(self, deadline: float = _DEADLINE, check: bool = True) -> list:
        """Collect what ``submit`` started; arguments and result as for ``run``."""
        try:
            outcomes = self._collect(deadline)
        except BaseException:
            # Answers would be taken for those of a later call.
            self._stop()
            raise
        failed = [rank for rank, o in enumerate(outcomes) if o.error is not None]
        if failed:
            self._stop()
        if failed and check:
            head = f"{len(failed)} of {self.world_size} ranks failed"
            raise RankFailure(outcomes, head)
        return [o.value for o in outcomes] if check else outcomes

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> None:
        """Send a signal to a rank."""
        self._ranks[rank].send_signal(signum)

    def close(self) -> None:
        """Destroy the group on every rank, end them; RankFailure where that fails."""
        try:
            if self._ranks:
                for rank in self._ranks:
                    with suppress(BrokenPipeError):
                        send_frame(rank.connection, None)
                self.join(deadline=60.0)
        finally:
            self._stop()
            self._nodes.close()
            self._logs.cleanup()

    def _ensure_started(self) -> None:
        if self._ranks:
            return
        for rank in range(self.world_size):
            self._ranks.append(self._start_rank(rank))
        if self.backend:
            self.join()

    def _start_rank(self, rank: int) -> Rank:
        node = self._nodes.spec.node_of_rank[rank]
        env = self._nodes.rank_environment(rank, {**os.environ, **self.env})
        env.update(self._nodes.node_environment(node))
        node_pid = None
        if isinstance(self._nodes, Lab):
            node_pid = self._nodes.node_pids[node]
        message = {
            "node_pid": node_pid,
            "backend": self.backend,
            "timeout": self.timeout,
            "env": env,
            "cwd": os.getcwd(),
            "path": sys.path,
        }
        log = Path(self._logs.name, f"rank{rank}.log")
        return RankServer.shared().start_rank(message, log)

    def _stop(self) -> None:
        for rank in self._ranks:
            rank.close()
        self._ranks = []

    def _collect(self, seconds: float) -> list[Outcome]:
        """Wait for every rank's answer, its death, or the deadline."""
        deadline = time.monotonic() + seconds
        outcomes: dict[int, Outcome] = {}
        with selectors.DefaultSelector() as selector:
            for index, rank in enumerate(self._ranks):
                selector.register(rank.connection, selectors.EVENT_READ, index)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    break
                for key, _ in ready:
                    selector.unregister(key.fileobj)
                    try:
                        kind, value = receive_frame(key.fileobj)
                        outcome = _outcome(kind, value)
                    except EOFError:
                        outcome = self._death(self._ranks[key.data])
                    outcomes[key.data] = outcome
                    if outcome.error is not None:
                        limit = time.monotonic() + self.after_failure
                        deadline = min(deadline, limit)
        hung = [rank for rank in range(len(self._ranks)) if rank not in outcomes]
        outcomes.update(self._stacks(hung, seconds))
        return [outcomes[rank] for rank in range(len(self._ranks))]

    def _death(self, rank: Rank) -> Outcome:
        code = rank.wait(timeout=10)
        if code is not None and code < 0:
            text = f"killed by {signal.Signals(-code).name}"
        else:
            text = f"ended with exit code {code}"
        return Outcome(None, text, "died", f"{text}\n{rank.tail()}")

    def _stacks(self, hung: list[int], seconds: float) -> dict[int, Outcome]:
        """Let ranks that do not answer write down where every thread stands."""
        before = {rank: self._ranks[rank].log_bytes() for rank in hung}
        for rank in hung:
            self.kill(rank, signal.SIGCONT)
            self.kill(rank, signal.SIGUSR1)
        limit = time.monotonic() + 10
        while before and time.monotonic() < limit:
            # Nothing tells when faulthandler is done; it takes milliseconds.
            time.sleep(1.0)
            now = {rank: self._ranks[rank].log_bytes() for rank in before}
            before = {rank: it for rank, it in before.items() if now[rank] == it}
        late = f"{self.after_failure:g} s after another rank's failure"
        text = f"no answer within {seconds:g} s, or {late}"
        return {
            rank: Outcome(None, text, "hung", f"{text}\n{self._ranks[rank].tail()}")
            for rank in hung
        }


def _outcome(kind: str, value: object) -> Outcome:
    if kind == "value":
        return Outcome(value)
    name, text, details = value
    return Outcome(None, text, name, details)


@dataclass
class FreshRun:
    """What fresh processes did: the job's exit code and each rank's lines."""

    exit_code: int
    stdout: list[str]
    stderr: list[str]
    events: list[str]


def run_fresh(
    nodes: Sequence[int],
    program: str | Callable[..., object],
    *args: object,
    rate: str | None = None,
    env: dict[str, str] | None = None,
    deadline: float = _DEADLINE,
    linger: float = 10.0,
    check: bool = True,
    need_lab: bool = False,
) -> FreshRun:
    """Run a program in new processes, one per rank.

    Args:
        nodes: ranks of each node.
        program: Python source, which imports only what it names, or a module-level
            function, called with ``args`` (by their repr) in a process that imports
            its module.
        env: variables beside ours and torchrun's.
        linger: seconds that the other ranks may go on after one failed.
        check: raise when the exit code is not 0.

    Raises:
        AssertionError: the job failed or took longer than ``deadline`` seconds.
    """
    if callable(program):
        source = (
            f"import importlib\n"
            f"module = importlib.import_module({program.__module__!r})\n"
            f"module.{program.__qualname__}(*{args!r})\n"
        )
    else:
        source = program
    job_env = {**os.environ, **(env or {}), "PYTHONPATH": os.pathsep.join(sys.path)}
    world_size = sum(nodes)
    result = FreshRun(-1, [""] * world_size, [""] * world_size, [])

    def on_line(member, stream: str, line: bytes) -> None:
        getattr(result, stream)[member.index] += line.decode(errors="replace") + "\n"

    with make_nodes(nodes, rate=rate, need_lab=need_lab) as place:
        job = place.launch(
            [sys.executable, "-X", "faulthandler", "-c", source],
            env=job_env,
            on_line=on_line,
            on_event=result.events.append,
            linger=linger,
        )
        with job:
            code = job.poll(deadline)
    result.exit_code = -1 if code is None else code
    if check and code != 0:
        what = f"no end within {deadline:g} s" if code is None else f"exit code {code}"
        errors = "\n".join(
            f"--- rank {rank} ---\n{text[-LOG_TAIL:]}"
            for rank, text in enumerate(result.stderr)
        )
        raise AssertionError("\n".join([what, *result.events, errors]))
    return result
