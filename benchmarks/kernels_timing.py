# SPDX-License-Identifier: Apache-2.0
"""Times calls on one device, caches cold: of one rank, or of all ranks together."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

Call = Callable[[], object]

# Cycles of a GPU in which the host gets ahead, so that launches are not in the time.
_HEAD_START = 400_000
_CPU_FLUSH_BYTES = 64 << 20


class Caches:
    """The caches of a device, which can be filled with other data.

    Args:
        flush_bytes: to write; None: twice the L2 of a GPU, 64 MiB on the CPU.
    """

    def __init__(self, device: torch.device, flush_bytes: int | None = None) -> None:
        if flush_bytes is None:
            flush_bytes = _CPU_FLUSH_BYTES
            if device.type == "cuda":
                properties = torch.cuda.get_device_properties(device)
                flush_bytes = 2 * properties.L2_cache_size
        self._other = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def flush(self) -> None:
        self._other.zero_()


class Timer:
    """Times calls of this rank alone; between them the caches are flushed.

    On a GPU a time is that between two events around the call: without the launch
    where the call does not make the host wait, and with all of it where it does.
    """

    def __init__(self, device: torch.device, flush_bytes: int | None = None) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._caches = Caches(device, flush_bytes)

    def microseconds(self, call: Call) -> float:
        """The time of one call."""
        self._caches.flush()
        if not self.on_gpu:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e6
        torch.cuda._sleep(_HEAD_START)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def in_turn(self, calls: list[Call], iters: int, warmup: int) -> list[list[float]]:
        """Times of every call: A B C A B C, so that a slow phase meets all of them."""
        for call in calls:
            for _ in range(warmup):
                call()
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(iters):
            for own, call in zip(times, calls, strict=True):
                own.append(self.microseconds(call))
        return times


class Contest:
    """Times calls of all ranks, by the clock: from a meeting of the ranks, with their
    caches flushed, to the end of the slowest one."""

    def __init__(
        self,
        device: torch.device,
        iters: int,
        warmup: int,
        flush_bytes: int | None = None,
    ) -> None:
        self.device, self.iters, self.warmup = device, iters, warmup
        self._caches = Caches(device, flush_bytes)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def in_turn(self, calls: list[Call]) -> list[list[float]]:
        """Microseconds of each call: A B C A B C. Collective."""
        times: list[list[float]] = [[] for _ in calls]
        for step in range(self.warmup + self.iters):
            for own, call in zip(times, calls, strict=True):
                self._caches.flush()
                self.synchronize()
                dist.all_reduce(torch.zeros(1))
                begin = time.perf_counter()
                call()
                self.synchronize()
                if step >= self.warmup:
                    own.append((time.perf_counter() - begin) * 1e6)
        slowest = torch.tensor(times, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.tolist()
