# SPDX-License-Identifier: Apache-2.0
"""The operators of the library, with the time that they take.

On a group of another backend they do the same over its ``all_to_all_single``.
Shape letters: T tokens of this rank, K experts per token, D model width, R rows
that this rank's experts receive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

import torch_automoe as automoe
from torch_automoe.train.timing import comm_timer

KIND = "all_to_all"


def plan(
    topk_ids: torch.Tensor, num_experts: int, group: dist.ProcessGroup
) -> automoe.Plan:
    """Agree with the other ranks on the rows that each expert will receive."""
    with comm_timer.measure(KIND):
        return automoe.plan(topk_ids, num_experts=num_experts, group=group)


def dispatch(
    x: torch.Tensor, topk_weights: torch.Tensor, plan: automoe.Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send rows and weights to the experts: (T, D), (T, K) -> (R, D), (R,)."""
    x = _at_backward(x, comm_timer.stop)
    with comm_timer.measure(KIND):
        recv_x, recv_weights = automoe.dispatch(x, topk_weights, plan)
    return _at_backward(recv_x, comm_timer.start), recv_weights


def combine(
    expert_out: torch.Tensor, recv_weights: torch.Tensor, plan: automoe.Plan
) -> torch.Tensor:
    """Bring the outputs home, mixed by weight: (R, D), (R,) -> (T, D)."""
    expert_out = _at_backward(expert_out, comm_timer.stop)
    with comm_timer.measure(KIND):
        out = automoe.combine(expert_out, plan, weights=recv_weights)
    return _at_backward(out, comm_timer.start)


def _at_backward(x: torch.Tensor, call: Callable[[str], None]) -> torch.Tensor:
    return _CallAtBackward.apply(x, call)


class _CallAtBackward(torch.autograd.Function):
    """Passes a tensor on; calls something when its gradient comes by.

    Of what is ready, autograd runs the node first that was made last. So two of
    these around an operator enclose its backward and nothing else.
    """

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.call(KIND)
        return grad, None
