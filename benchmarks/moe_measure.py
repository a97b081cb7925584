# SPDX-License-Identifier: Apache-2.0
"""Run the contenders on one MoE cell, in turn, and take their times."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from counters import InterfaceCounter
from moe_cell import MoeCell, MoePayload
from moe_dedup import RankDedup, TwoLevel
from moe_peers import Expanded, Stock

PHASES = ("plan", "dispatch", "combine")
_LEAST_ITERATIONS = 3
_QUIET_S = 2.0  # what lasts no longer shows no progress
_PROGRESS_S = 5.0


class Operations(Protocol):
    """What a contender does; plans are its own affair."""

    def plan(self, topk_ids: torch.Tensor):
        """Plan for ids (T, K)."""

    def dispatch(self, x: torch.Tensor, weights: torch.Tensor, plan):
        """Rows (R, H), expert-major, and their weights (R,), None if these stay."""

    def combine(self, rows: torch.Tensor, plan, weights, received_weights):
        """Weighted sums (T, H); weights as (T, K) and as they were received."""


class AutoMoe:
    """The operators of this library."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        """Raises ``SystemExit`` where the package installed has no such operators."""
        self._group, self._num_experts = group, num_experts
        self._package = importlib.import_module("torch_automoe")
        for name in PHASES:
            if not hasattr(self._package, name):
                raise SystemExit(
                    f"dispatch_combine_bench: torch_automoe has no {name!r}; install "
                    "this version of it, or leave automoe out of --contenders"
                )

    def plan(self, topk_ids: torch.Tensor):
        """``automoe.plan``."""
        return self._package.plan(
            topk_ids, num_experts=self._num_experts, group=self._group
        )

    def dispatch(self, x: torch.Tensor, weights: torch.Tensor, plan):
        """``automoe.dispatch``."""
        return self._package.dispatch(x, weights, plan)

    def combine(self, rows: torch.Tensor, plan, weights, received_weights):
        """``automoe.combine``."""
        return self._package.combine(rows, plan, weights=received_weights)


_KINDS = {
    "automoe": AutoMoe,
    "expanded": Expanded,
    "rank_dedup": RankDedup,
    "level0": Expanded,
    "stock": Stock,
}


@dataclass
class Contender:
    """Operations on groups of their own; ``group`` is set if the backend is automoe."""

    label: str
    operations: Operations
    group: dist.ProcessGroup | None = None

    def explain(self) -> str | None:
        """Say which exchange was chosen and why, where the backend can."""
        if self.group is None:
            return None
        return importlib.import_module("torch_automoe").explain_exchange(self.group)

    def counters(self) -> dict[str, int]:
        """Counters of the library for the contender's group; empty for peers."""
        if self.group is None:
            return {}
        return importlib.import_module("torch_automoe").stats(self.group)


def make_contenders(
    options: argparse.Namespace, node_of_rank: list[int]
) -> list[Contender]:
    """Make what ``--contenders`` names, each with its groups. Collective.

    Raises ``SystemExit`` with a message if the backend automoe is not installed.
    """
    timeout = timedelta(seconds=options.timeout)
    contenders = []
    for label in options.contenders:
        if label == "two_level":
            peer = TwoLevel(node_of_rank, options.experts, timeout=timeout)
            contenders.append(Contender(label, peer))
            continue
        ours = label in ("automoe", "level0")
        if ours and "automoe" not in dist.Backend.backend_list:
            raise SystemExit(
                f"dispatch_combine_bench: {label} needs the backend automoe; install "
                "this package into the environment (pip install .), or leave it out "
                "of --contenders"
            )
        group = dist.new_group(backend="automoe" if ours else "gloo", timeout=timeout)
        operations = _KINDS[label](group, options.experts)
        contenders.append(Contender(label, operations, group if ours else None))
    return contenders


@dataclass
class Measurement:
    """What one contender did on one cell; times are the slowest rank's, in ms.

    ``total_ms`` has one entry per iteration, of plan, dispatch and combine in one go;
    ``phases_ms`` one per iteration and phase, each begun by all ranks together.
    ``tx_bytes`` are those of each node's interface per call, ``counters`` the sums
    over all ranks of what the library counted per call.
    """

    contender: str
    total_ms: list[float] = field(default_factory=list)
    phases_ms: dict[str, list[float]] = field(
        default_factory=lambda: {phase: [] for phase in PHASES}
    )
    wrong: int = 0
    tx_bytes: list[float] | None = None
    counters: dict[str, float] = field(default_factory=dict)


class Progress:
    """Says on rank 0 how far a cell is, once that takes longer than 2 s."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = time.monotonic()
        self._next = self._start + _QUIET_S
        self._speaks = dist.get_rank() == 0

    def step(self, state: str) -> None:
        """Print ``state`` when it is time to."""
        now = time.monotonic()
        if self._speaks and now >= self._next:
            self._next = now + _PROGRESS_S
            text = f"# {self._what}: {state}, {now - self._start:.0f} s"
            print(text, file=sys.stderr, flush=True)


def call(
    contender: Contender,
    payload: MoePayload,
    before_phase: Callable[[], None] | None = None,
) -> tuple[list[float], tuple]:
    """Run plan, dispatch and combine once.

    The stand-in for the experts, between the last two, is not in any time.

    Args:
        before_phase: called before each phase, outside its time.

    Returns:
        seconds of each phase on this rank; rows, weights and sums for
        ``payload.count_wrong``.
    """
    operations, seconds = contender.operations, []

    def timed(action: Callable, *args):
        if before_phase is not None:
            before_phase()
        start = time.perf_counter()
        result = action(*args)
        seconds.append(time.perf_counter() - start)
        return result

    plan = timed(operations.plan, payload.ids)
    rows, received_weights = timed(
        operations.dispatch, payload.x, payload.weights, plan
    )
    payload.apply_experts(rows)
    out = timed(operations.combine, rows, plan, payload.weights, received_weights)
    return seconds, (rows, received_weights, out)


@torch.no_grad()
def run_cell(
    cell: MoeCell,
    contenders: list[Contender],
    options: argparse.Namespace,
    counter: InterfaceCounter,
) -> list[Measurement]:
    """Time every contender on ``cell``, alternating call by call (A B A B ...).

    Collective over the default group, which stands outside the contest.
    """
    progress = Progress(cell.describe())
    payload = MoePayload(cell, dist.get_rank())
    results = [Measurement(contender.label) for contender in contenders]
    iterations = _warm_up(contenders, results, payload, options, progress)
    gc.collect()
    gc.disable()  # a collection inside one timed call would be blamed on it
    try:
        for iteration in range(iterations):
            progress.step(f"iteration {iteration} of {iterations}")
            checked = options.check > 0 and iteration % options.check == 0
            if checked:
                payload.renew(iteration + 1)
            for measure in (_time_whole, _time_phases):
                for contender, result in zip(contenders, results, strict=True):
                    measure(contender, result, payload, checked)
    finally:
        gc.enable()
    for contender, result in zip(contenders, results, strict=True):
        progress.step(f"bytes of {contender.label}")
        _reduce(result)
        _count_bytes(contender, result, payload, counter)
    return results


def _warm_up(
    contenders: list[Contender],
    results: list[Measurement],
    payload: MoePayload,
    options: argparse.Namespace,
    progress: Progress,
) -> int:
    """Run calls that do not count, but are checked; returns the iterations to time."""
    for number in range(options.warmup):
        progress.step(f"warm-up {number} of {options.warmup}")
        seconds = 0.0
        for contender, result in zip(contenders, results, strict=True):
            dist.barrier()
            start = time.perf_counter()
            _, outputs = call(contender, payload)
            seconds += time.perf_counter() - start
            if options.check > 0 and number == 0:
                result.wrong += payload.count_wrong(*outputs)
    if options.cell_seconds is None:
        return options.iters
    # An iteration is two calls of each contender, and as many checks of about a third.
    affordable = torch.tensor([options.cell_seconds / (2.7 * seconds)])
    dist.broadcast(affordable, src=0)
    return min(options.iters, max(_LEAST_ITERATIONS, int(affordable)))


def _time_whole(
    contender: Contender, result: Measurement, payload: MoePayload, checked: bool
) -> None:
    dist.barrier()
    seconds, outputs = call(contender, payload)
    result.total_ms.append(sum(seconds) * 1e3)
    if checked:
        result.wrong += payload.count_wrong(*outputs)


def _time_phases(
    contender: Contender, result: Measurement, payload: MoePayload, checked: bool
) -> None:
    seconds, outputs = call(contender, payload, before_phase=dist.barrier)
    for phase, value in zip(PHASES, seconds, strict=True):
        result.phases_ms[phase].append(value * 1e3)
    if checked:
        result.wrong += payload.count_wrong(*outputs)


def _reduce(result: Measurement) -> None:
    """Slowest rank of each iteration, wrong elements of all ranks."""
    times = torch.tensor(
        [result.total_ms, *result.phases_ms.values()], dtype=torch.float64
    )
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    wrong = torch.tensor([result.wrong])
    dist.all_reduce(wrong)
    result.total_ms, *phases = times.tolist()
    result.phases_ms = dict(zip(PHASES, phases, strict=True))
    result.wrong = int(wrong)


def _count_bytes(
    contender: Contender,
    result: Measurement,
    payload: MoePayload,
    counter: InterfaceCounter,
) -> None:
    """Count what the interfaces sent, and what the library says of it."""
    cell = payload.cell
    rows = max(cell.tokens_of_rank) * cell.topk
    calls = 2 if rows * cell.row_bytes > 2**20 else 10
    before = contender.counters()
    result.tx_bytes = counter.bytes_per_call(lambda: call(contender, payload), calls)
    if result.tx_bytes is None or not before:
        return
    after = contender.counters()
    counted = torch.tensor(
        [after[name] - before[name] for name in before], dtype=torch.float64
    )
    dist.all_reduce(counted)
    result.counters = {
        name: float(value) / calls for name, value in zip(before, counted, strict=True)
    }
