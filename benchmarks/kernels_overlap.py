# SPDX-License-Identifier: Apache-2.0
"""The chain of launches, and what hides behind other work, for kernels_bench.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from kernels_timing import Contest
from torch import Tensor

import torch_automoe as automoe
from torch_automoe import ops  # noqa: F401  (loads the operators)

_ops = torch.ops.automoe
Call = Callable[[], Tensor | None]
# Of one chunk, in microseconds: its dispatch, its experts, its combine.
Chunk = tuple[float, float, float]


def count_launches(chain: Callable[[], object]) -> int:
    """Kernels, copies and fills that a call puts on the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        chain()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in found.events())


def one_chain(x: Tensor, plan: automoe.Plan) -> Callable[[], Tensor]:
    """dispatch and combine, in one call."""

    def run() -> Tensor:
        rows, _ = automoe.dispatch(x, None, plan)
        return automoe.combine(rows, plan)

    return run


def launch_empty(count: int) -> None:
    for _ in range(count):
        torch.cuda._sleep(0)


def hidden_share(serial: float, overlapped: float, can_hide: float) -> float | None:
    """What was hidden of what can be; None where nothing can."""
    return (serial - overlapped) / can_hide if can_hide > 0 else None


def overlap_calls(
    contest: Contest, x: Tensor, plan: automoe.Plan, size: int
) -> list[Call]:
    """A dispatch, products that last as long, and both at once. Collective."""
    matrix = torch.randn(size, size, device=x.device).to(x.dtype)
    repeats = 1

    def communicate() -> Tensor:
        return automoe.dispatch(x, None, plan, async_op=True).wait()[0]

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(matrix, matrix)

    def both() -> Tensor:
        pending = automoe.dispatch(x, None, plan, async_op=True)
        multiply()
        return pending.wait()[0]

    alone, one = map(statistics.median, contest.in_turn([communicate, multiply]))
    repeats = max(1, round(alone / one))
    return [communicate, multiply, both]


def pipelined(chunks: Sequence[Chunk]) -> float:
    """How long chunks take at least, as ``moe`` posts them.

    Transfers run one after the other, experts too, and nothing else is waited for: the
    next chunk's dispatch is posted before the experts of this one, its combine after.
    """
    transfers = computed = 0.0
    arrived = []
    if chunks:
        transfers = chunks[0][0]
        arrived.append(transfers)
    for index, (_, experts, combine) in enumerate(chunks):
        if index + 1 < len(chunks):
            transfers += chunks[index + 1][0]
            arrived.append(transfers)
        computed = max(computed, arrived[index]) + experts
        transfers = max(transfers, computed) + combine
    return transfers


class ChunkedLayer:
    """A layer of experts in chunks, and the steps of its chunks. Collective.

    The experts multiply by the identity, often enough to last about as long as the
    exchange: so results are exact, whichever product torch takes for so many rows.
    """

    def __init__(
        self,
        contest: Contest,
        x: Tensor,
        ids: Tensor,
        num_experts: int,
        num_chunks: int,
        group: dist.ProcessGroup,
    ) -> None:
        self.x, self.ids = x, ids
        self._num_experts, self._num_chunks, self._group = (
            num_experts, num_chunks, group,
        )  # fmt: skip
        self._identity = torch.eye(x.shape[1], device=x.device).to(x.dtype)
        self._repeats = 1
        plan = self._plan()
        rows = automoe.dispatch(x, None, plan)[0]
        exchange, product = map(
            statistics.median,
            contest.in_turn(
                [one_chain(x, plan), lambda: self._experts(rows, plan.offsets)]
            ),
        )
        self._repeats = max(1, round(exchange / product))

    def _plan(self) -> automoe.Plan:
        return automoe.plan(self.ids, num_experts=self._num_experts, group=self._group)

    def _parts(self, plan: automoe.Plan) -> list[automoe.Plan]:
        return [plan.part(index, self._num_chunks) for index in range(self._num_chunks)]

    def _experts(self, rows: Tensor, _: Tensor) -> Tensor:
        for _ in range(self._repeats):
            rows = torch.mm(rows, self._identity)
        return rows

    def _dispatch(self, rows: Tensor, part: automoe.Plan) -> Tensor:
        return _ops.dispatch(
            [rows], None, part.route, part.receive_index, part.group_name, True
        )[0][0]

    def _combine(self, rows: Tensor, part: automoe.Plan) -> Tensor:
        return _ops.combine(
            rows, None, None, part.route, part.receive_index, part.group_name,
            -1, -1, True,
        )[0]  # fmt: skip

    def run(self, num_chunks: int) -> Tensor:
        """``automoe.moe``."""
        return automoe.moe(
            self.x,
            self.ids,
            None,
            self._experts,
            self._group,
            num_experts=self._num_experts,
            num_chunks=num_chunks,
        )

    def run_one_by_one(self) -> Tensor:
        """The same chunks, of which each is waited for."""
        parts = self._parts(self._plan())
        routes = [part.route for part in parts]
        partials = []
        for rows, part in zip(_ops.pack_rows(self.x, routes), parts, strict=True):
            received = self._dispatch(rows, part)
            partials.append(self._combine(self._experts(received, part.offsets), part))
        return _ops.reduce_partials(partials, routes, self.x.shape[0])

    def steps(self) -> list[Call]:
        """Dispatch, experts and combine of every chunk, each to be timed alone."""
        parts = self._parts(self._plan())
        calls: list[Call] = []
        packed = _ops.pack_rows(self.x, [part.route for part in parts])
        for rows, part in zip(packed, parts, strict=True):
            received = self._dispatch(rows, part)
            calls += [
                lambda rows=rows, part=part: self._dispatch(rows, part),
                lambda it=received, part=part: self._experts(it, part.offsets),
                lambda it=received, part=part: self._combine(it, part),
            ]
        return calls


def chunks_of(medians: Sequence[float]) -> list[Chunk]:
    """The times of ``ChunkedLayer.steps``, by chunk."""
    return list(zip(medians[::3], medians[1::3], medians[2::3], strict=True))
