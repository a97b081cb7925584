# SPDX-License-Identifier: Apache-2.0
"""The layer of experts: dispatch, experts and combine, in chunks that overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_automoe.exchange import (
    Pending,
    Rows,
    combine,
    dispatch,
    start_combine,
    start_dispatch,
)
from torch_automoe.routing import Plan, has_values, plan

_ops = torch.ops.automoe

# Chunks whose rows to other nodes are smaller than this gain less than they cost.
_CHUNK_BYTES = 4 << 20
_MAX_CHUNKS = 8

Experts = Callable[[Rows, Tensor], Tensor]


def moe(
    x: Tensor | Sequence[Tensor],
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    experts: Experts,
    group: dist.ProcessGroup | str | None = None,
    *,
    num_experts: int | None = None,
    num_chunks: int | str = "auto",
    align: int = 1,
    max_recv_tokens: int | None = None,
    overlap: Callable[[], None] | None = None,
    experts_need_grad: bool = True,
) -> Tensor:
    """Run a layer of experts on tokens; collective over the group, as its backward is.

    The rows that stay inside their node go first, then pieces of the others: the
    experts work on one chunk while the next is on the wire. For experts that treat
    each row for itself, the result and the gradients of ``x`` and ``topk_weights``
    have the bits of ``dispatch`` and ``combine``, whatever the number of chunks.

    Args:
        x: (T, ...) of any type, or several such that travel side by side.
        topk_ids: (T, K) int32 or int64, -1 is none, as for ``plan``.
        topk_weights: (T, K) float, or None: all are 1.
        experts: called once per chunk with (recv_x, offsets) and returns (R, H): what
            the experts of this rank make of their rows. recv_x is (R, ...), or a tuple
            as ``x`` is; rows are sorted by local expert and offsets (e,) int32 says
            where each expert's rows end, as ``grouped_mm`` takes it. R may be 0. Its
            parameters' gradients add up over the chunks.
        group: as for ``plan``; default: the default group.
        num_experts: E, of all ranks; default: ``experts.num_experts``.
        num_chunks: 1 is dispatch, experts, combine. "auto" looks at the bytes of all
            ranks that cross between nodes; it is 1 where the call is traced, by
            torch.compile for example, and with ``max_recv_tokens``.
        align: begin the rows of each expert at a multiple of this.
        max_recv_tokens: as for ``plan``: without chunks, recv_x has that many rows, and
            what experts make of those behind the last offset counts for nothing.
        overlap: called once, while the first rows travel: for work that does not
            need them, as that of a shared expert. Not called where traced.
        experts_need_grad: False says that no rank's experts need a gradient. A rank
            without rows cannot see it, and goes backward for the others' sake.

    Returns:
        (T, H): for every token, the weighted sum over its experts.

    Raises:
        ValueError: as ``plan``, ``dispatch`` and ``combine`` do; ``num_chunks`` or
            ``num_experts`` is not a positive number.
        torch.distributed.DistBackendError: the communication failed.
    """
    whole = plan(
        topk_ids,
        num_experts=_checked_num_experts(num_experts, experts),
        group=group,
        align=align,
        max_recv_tokens=max_recv_tokens,
    )
    if max_recv_tokens is not None and num_chunks == "auto":
        num_chunks = 1  # chunks have sizes that depend on the routing
    xs = [x] if isinstance(x, Tensor) else list(x)
    chunks = _checked_num_chunks(num_chunks, whole, xs)
    if chunks > 1:
        single = isinstance(x, Tensor)
        return _run_chunks(
            xs,
            topk_weights,
            experts,
            whole,
            chunks,
            single,
            overlap,
            experts_need_grad,
        )
    recv, recv_weights = dispatch_beside(x, topk_weights, whole, overlap)
    rows = tie(experts(recv, whole.offsets), recv, experts_need_grad)
    return combine(rows, whole, recv_weights)


def dispatch_beside(
    x: Tensor | Sequence[Tensor],
    topk_weights: Tensor | None,
    whole: Plan,
    overlap: Callable[[], None] | None,
) -> tuple[Rows, Tensor | None]:
    """Dispatch, and do something else while rows travel."""
    if overlap is None or not has_values(whole):
        return dispatch(x, topk_weights, whole)
    pending = dispatch(x, topk_weights, whole, async_op=True)
    overlap()
    return pending.wait()


def _run_chunks(
    xs: list[Tensor],
    topk_weights: Tensor | None,
    experts: Experts,
    whole: Plan,
    num_chunks: int,
    single: bool,
    overlap: Callable[[], None] | None,
    experts_need_grad: bool,
) -> Tensor:
    parts = [whole.part(index, num_chunks) for index in range(num_chunks)]
    routes = [part.route for part in parts]
    # One operator packs for all parts, so that one sums up their gradients: in the
    # order of the whole, not of the parts.
    packed = list(zip(*(_ops.pack_rows(x, routes) for x in xs), strict=True))

    def start(index: int) -> Pending:
        rows = list(packed[index])
        return start_dispatch(rows, topk_weights, parts[index], packed=True)

    sums = []
    on_the_wire = start(0)
    if overlap is not None:
        overlap()
    for index, part in enumerate(parts):
        recv, recv_weights = on_the_wire.wait()
        if index + 1 < num_chunks:
            on_the_wire = start(index + 1)
        recv = recv[0] if single else recv
        rows = tie(experts(recv, part.offsets), recv, experts_need_grad)
        sums.append(start_combine(rows, part, recv_weights, packed=True))
    partials = [pending.wait() for pending in sums]
    return _ops.reduce_partials(partials, routes, whole.num_tokens)


class _Tie(torch.autograd.Function):
    """Makes the backward of ``rows`` reach the nodes of ``others``, with no gradient.

    Collectives run in the backward too, so every rank has to go through the same ones,
    also a rank without experts or rows, whose ``rows`` may depend on nothing.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *others: Tensor) -> Tensor:
        ctx.num_others = len(others)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, *[None] * ctx.num_others


def tie(rows: Tensor, recv: Rows, experts_need_grad: bool = True) -> Tensor:
    """Make the backward of experts' outputs reach the rows that were received."""
    if not torch.is_grad_enabled():
        return rows
    others = [recv] if isinstance(recv, Tensor) else list(recv)
    others = [other for other in others if other.requires_grad]
    needs_none = not others and not rows.requires_grad
    if needs_none and experts_need_grad and rows.shape[0] == 0:
        # The parameters of other ranks' experts do, or may do.
        others = [rows.new_empty(0, requires_grad=True)]
    return _Tie.apply(rows, *others) if others else rows


def _checked_num_experts(num_experts: int | None, experts: Experts) -> int:
    if num_experts is None:
        num_experts = getattr(experts, "num_experts", None)
    if not isinstance(num_experts, int | torch.SymInt) or num_experts < 1:
        raise ValueError(
            f"num_experts is {num_experts!r}, expected the number of experts of all "
            "ranks, here or as experts.num_experts"
        )
    return num_experts


def _checked_num_chunks(num_chunks: int | str, whole: Plan, xs: list[Tensor]) -> int:
    if num_chunks == "auto":
        return _choose_num_chunks(whole, xs) if has_values(whole) else 1
    if not isinstance(num_chunks, int) or num_chunks < 1:
        raise ValueError(
            f"num_chunks is {num_chunks!r}, expected 'auto' or a positive number"
        )
    return num_chunks


def _choose_num_chunks(whole: Plan, xs: list[Tensor]) -> int:
    """Choose by what all ranks know, so that they choose the same."""
    facts = whole.facts
    others = min(whole.topk, facts.num_nodes - 1)
    row_bytes = sum(x.element_size() * x.shape[1:].numel() for x in xs)
    size = whole.group.size()
    total = facts.total_tokens * others * row_bytes // size
    return 1 + min(_MAX_CHUNKS - 1, total // _CHUNK_BYTES) if others else 1
