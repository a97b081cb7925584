# SPDX-License-Identifier: Apache-2.0
"""Bring token rows to their experts and back, over ``all_to_all_single``.

``plan`` decides which row goes where, ``dispatch`` sends the rows, ``combine``
brings the experts' outputs home and mixes them. Shape letters: T tokens of
this rank, K experts per token, D model width, E experts in all, P ranks of
the expert-parallel group, e experts per rank (the last ranks may own fewer),
R rows that this rank's experts receive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from torch_automoe.train.timing import comm_timer


@dataclass(frozen=True)
class ExchangePlan:
    """Where each (token, expert) row goes, and where the answers come from.

    Rows leave sorted by expert. Experts are split over the ranks in
    contiguous pieces, so that order is also sorted by destination rank.
    """

    send_order: torch.Tensor  # (T*K,) the (token, k) slot of each row sent
    slot_row: torch.Tensor  # (T*K,) the inverse: the row of each slot
    expert_order: torch.Tensor  # (R,) rank-major rows -> expert-major rows
    rank_order: torch.Tensor  # (R,) the inverse of expert_order
    input_splits: list[int]  # rows sent to each rank
    output_splits: list[int]  # rows received from each rank
    num_tokens_per_expert: list[int]  # rows of each expert of this rank
    top_k: int
    group: dist.ProcessGroup


def plan(
    topk_ids: torch.Tensor, num_experts: int, group: dist.ProcessGroup
) -> ExchangePlan:
    """Agree with the other ranks on the rows that each expert will receive.

    Args:
        topk_ids: (T, K) the experts chosen for each token, each in
            [0, num_experts). T may be 0.
        num_experts: experts in all. Rank p of the group owns the p-th piece of
            ceil(num_experts / P) experts, which is DTensor's ``Shard(0)``.
        group: the expert-parallel group.
    """
    num_ranks = group.size()
    per_rank = -(-num_experts // num_ranks)
    slot_expert = topk_ids.flatten()
    send_order = torch.argsort(slot_expert, stable=True)

    sent = torch.bincount(slot_expert, minlength=per_rank * num_ranks)
    sent = sent.view(num_ranks, per_rank)
    received = torch.empty_like(sent)  # (source rank, expert of this rank)
    with comm_timer.measure("all_to_all"):
        dist.all_to_all_single(received, sent, group=group)

    # The rows arrive by source rank, then expert; experts want them by expert,
    # then source rank. A stable sort by expert is that permutation.
    row_expert = torch.arange(per_rank).repeat(num_ranks)
    row_expert = row_expert.repeat_interleave(received.flatten())
    expert_order = torch.argsort(row_expert, stable=True)
    num_local_experts = min(max(num_experts - group.rank() * per_rank, 0), per_rank)
    return ExchangePlan(
        send_order=send_order,
        slot_row=torch.argsort(send_order),
        expert_order=expert_order,
        rank_order=torch.argsort(expert_order),
        input_splits=sent.sum(1).tolist(),
        output_splits=received.sum(1).tolist(),
        num_tokens_per_expert=received.sum(0)[:num_local_experts].tolist(),
        top_k=topk_ids.shape[1],
        group=group,
    )


def dispatch(x: torch.Tensor, plan: ExchangePlan) -> torch.Tensor:
    """Send each token's row to its experts: (T, D) -> (R, D), expert-major."""
    rows = x.index_select(0, plan.send_order // plan.top_k)
    rows = _ExchangeRows.apply(rows, plan.output_splits, plan.input_splits, plan.group)
    return rows.index_select(0, plan.expert_order)


def combine(
    expert_out: torch.Tensor, topk_weights: torch.Tensor, plan: ExchangePlan
) -> torch.Tensor:
    """Bring the outputs home and mix them by weight: (R, D), (T, K) -> (T, D)."""
    rows = expert_out.index_select(0, plan.rank_order)
    rows = _ExchangeRows.apply(rows, plan.input_splits, plan.output_splits, plan.group)
    rows = rows.index_select(0, plan.slot_row).view(*topk_weights.shape, rows.shape[1])
    # The weights are float32 or wider, and so is the sum over the K experts.
    out = (rows * topk_weights.unsqueeze(-1)).sum(1)
    return out.to(expert_out.dtype)


class _ExchangeRows(torch.autograd.Function):
    """``all_to_all_single`` on rows; gradients travel the same way back."""

    @staticmethod
    def forward(ctx, rows, output_splits, input_splits, group):
        ctx.output_splits, ctx.input_splits, ctx.group = (
            output_splits,
            input_splits,
            group,
        )
        return _all_to_all_rows(rows, output_splits, input_splits, group)

    @staticmethod
    def backward(ctx, grad):
        grad = _all_to_all_rows(grad, ctx.input_splits, ctx.output_splits, ctx.group)
        return grad, None, None, None


def _all_to_all_rows(
    rows: torch.Tensor,
    output_splits: list[int],
    input_splits: list[int],
    group: dist.ProcessGroup,
) -> torch.Tensor:
    out = rows.new_empty(sum(output_splits), rows.shape[1])
    with comm_timer.measure("all_to_all"):
        dist.all_to_all_single(
            out, rows.contiguous(), output_splits, input_splits, group=group
        )
    return out
