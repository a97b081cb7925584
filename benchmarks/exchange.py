# SPDX-License-Identifier: Apache-2.0
"""Run the contenders on one cell, in turn, and take their times."""

from __future__ import annotations

import argparse
import gc
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from counters import InterfaceCounter
from payload import Payload
from routing import Cell, even_cell


@dataclass
class Measurement:
    """What one contender did on one cell.

    ``times_us`` has one entry per iteration, the slowest rank's; ``tx_bytes`` the bytes
    that each node's interface sent per call (None with one node).
    """

    backend: str
    times_us: list[float] = field(default_factory=list)
    wrong: int = 0
    tx_bytes: list[float] | None = None


@dataclass
class Contender:
    """A c10d backend with a group of its own over all ranks."""

    label: str
    backend: str
    group: dist.ProcessGroup

    def exchange(self, payload: Payload) -> None:
        """Run one all_to_all_single; returns when this rank's output is complete."""
        dist.all_to_all_single(
            payload.output,
            payload.input,
            payload.output_splits,
            payload.input_splits,
            group=self.group,
        )

    def explain(self) -> str | None:
        """Say which exchange was chosen and why, where the backend can."""
        if self.backend != "automoe":
            return None
        return importlib.import_module("torch_automoe").explain_exchange(self.group)


def make_contenders(options: argparse.Namespace) -> list[Contender]:
    """Make one group per backend: the one under test first, then its c10d peers.

    Raises ``SystemExit`` with a message if torch knows no such backend.
    """
    contenders: list[Contender] = []
    for backend in [options.backend, *options.against]:
        if backend == "mpi":
            continue
        if backend not in dist.Backend.backend_list:
            raise SystemExit(
                f"all_to_all_bench: torch has no backend {backend!r}, it has "
                f"{', '.join(dist.Backend.backend_list)}; for automoe, install this "
                "package into the environment (pip install .)"
            )
        same = sum(other.backend == backend for other in contenders)
        contenders.append(
            Contender(
                label=backend if same == 0 else f"{backend}.{same + 1}",
                backend=backend,
                group=dist.new_group(
                    backend=backend, timeout=timedelta(seconds=options.timeout)
                ),
            )
        )
    return contenders


def supporting(
    contenders: list[Contender], dtype: torch.dtype, note: Callable[[str], None]
) -> list[Contender]:
    """Those contenders whose all_to_all_single takes ``dtype``, by trying one."""
    able = []
    cell = even_cell(1, dtype, dist.get_world_size())
    for contender in contenders:
        try:
            contender.exchange(Payload(cell, dist.get_rank()))
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            note(f"{contender.label}: left out for {dtype}: {reason}")
        else:
            able.append(contender)
    return able


def run_cell(
    cell: Cell,
    contenders: list[Contender],
    options: argparse.Namespace,
    counter: InterfaceCounter,
) -> list[Measurement]:
    """Time every contender on ``cell``, alternating call by call (A B A B ...).

    Collective over the default group, which stands outside the contest.
    """
    payload = Payload(cell, dist.get_rank())
    results = [Measurement(contender.label) for contender in contenders]
    for _ in range(options.warmup):
        for contender in contenders:
            dist.barrier()
            contender.exchange(payload)
    gc.collect()
    gc.disable()  # a collection inside one timed call would be blamed on it
    try:
        for iteration in range(options.iters):
            for contender, result in zip(contenders, results, strict=True):
                _time_once(iteration, contender, result, payload, options)
    finally:
        gc.enable()
    for contender, result in zip(contenders, results, strict=True):
        reduce_over_ranks(result)
        result.tx_bytes = counter.bytes_per_call(
            lambda contender=contender: contender.exchange(payload),
            calls=2 if cell.size_bytes > 2**20 else 10,
        )
    return results


def _time_once(
    iteration: int,
    contender: Contender,
    result: Measurement,
    payload: Payload,
    options: argparse.Namespace,
) -> None:
    checked = options.check > 0 and iteration % options.check == 0
    if checked:
        payload.renew(iteration)
    dist.barrier()
    start = time.perf_counter_ns()
    for _ in range(options.agg_iters):
        contender.exchange(payload)
    elapsed = time.perf_counter_ns() - start
    result.times_us.append(elapsed / 1e3 / options.agg_iters)
    if checked:
        result.wrong += payload.count_wrong()


def reduce_over_ranks(result: Measurement) -> None:
    """Set times to the slowest rank's, wrong elements to their sum. Collective."""
    times = torch.tensor(result.times_us, dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    wrong = torch.tensor([result.wrong])
    dist.all_reduce(wrong)
    result.times_us, result.wrong = times.tolist(), int(wrong)
