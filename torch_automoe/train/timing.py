# SPDX-License-Identifier: Apache-2.0
"""Measure the wall time that a rank spends in communication calls.

On CPU the calls below block until the data is there, so their duration is the
time in which this rank did not compute: transfer, and waiting for slower
ranks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule


class CommTimer:
    """Adds up the time of each kind of communication call."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._started: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Add the duration of the ``with`` body to ``kind``."""
        self.start(kind)
        try:
            yield
        finally:
            self.stop(kind)

    def start(self, kind: str) -> None:
        """Begin to measure ``kind``."""
        self._started[kind] = time.perf_counter()

    def stop(self, kind: str) -> None:
        """Add the time since ``start``, if there was one."""
        started = self._started.pop(kind, None)
        if started is not None:
            self._seconds[kind] += time.perf_counter() - started

    def take_shares(self) -> dict[str, float]:
        """Each kind's share of the wall time since the last call, from 0 to 1."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        shares = {kind: spent / elapsed for kind, spent in self._seconds.items()}
        self._seconds.clear()
        self._since = now
        return shares


comm_timer = CommTimer()


# The names of torch 2.13 and later, and the older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


class _Allocate:
    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)


class _TimedAllGather(_Allocate):
    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        with comm_timer.measure("fsdp"):
            return _all_gather(
                output_tensor, input_tensor, group=group, async_op=async_op
            )


class _TimedReduceScatter(_Allocate):
    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        with comm_timer.measure("fsdp"):
            return _reduce_scatter(
                output_tensor, input_tensor, op=op, group=group, async_op=async_op
            )


def time_fsdp_collectives(model: torch.nn.Module) -> None:
    """Count the time of FSDP2's collectives, through its own hooks for them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_TimedAllGather())
            module.set_custom_reduce_scatter(_TimedReduceScatter())


def all_reduce(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    """``dist.all_reduce`` over all ranks, timed; returns ``tensor``."""
    with comm_timer.measure("all_reduce"):
        dist.all_reduce(tensor, op=op)
    return tensor
