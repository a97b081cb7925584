# SPDX-License-Identifier: Apache-2.0
"""Times calls on one device, caches cold: by events on a GPU, else by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Call = Callable[[], object]

# Cycles of a GPU in which the host gets ahead, so that launches are not in the time.
_HEAD_START = 400_000
_CPU_FLUSH_BYTES = 64 << 20


class Timer:
    """Times calls on a device; between them the caches are filled with other data.

    On a GPU a time is that between two events around the call: without the launch
    where the call does not make the host wait, and with all of it where it does.
    """

    def __init__(self, device: torch.device, flush_bytes: int | None = None) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        if flush_bytes is None:
            flush_bytes = _CPU_FLUSH_BYTES
            if self.on_gpu:
                properties = torch.cuda.get_device_properties(device)
                flush_bytes = 2 * properties.L2_cache_size
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def microseconds(self, call: Call) -> float:
        """The time of one call."""
        self._flush.zero_()
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
