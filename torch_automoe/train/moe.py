# SPDX-License-Identifier: Apache-2.0
"""The library's layer and bias update, with the time that their exchanges take."""

from __future__ import annotations

from collections.abc import Callable

import torch

import torch_automoe as automoe
from torch_automoe.train.exchange import combine, dispatch, plan
from torch_automoe.train.timing import comm_timer


class TimedMoE(automoe.MoE):
    """``automoe.MoE`` whose exchanges count as communication.

    ``group`` is the expert-parallel group; ``parallelize`` sets it.
    """

    def run_experts(
        self,
        tokens: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        overlap: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """plan, dispatch, experts, combine: (T, D), (T, K), (T, K) -> (T, D)."""
        moe_plan = plan(topk_ids, self.num_experts, self.group)
        recv_x, recv_weights = dispatch(tokens, topk_weights, moe_plan)
        expert_out = self.experts(recv_x, moe_plan.offsets)
        return combine(expert_out, recv_weights, moe_plan)


class TimedBiasUpdate(automoe.ExpertBiasUpdate):
    """``automoe.ExpertBiasUpdate`` whose all-reduce counts as communication."""

    def _take_counts(self, counters: list[torch.Tensor]) -> list[torch.Tensor]:
        with comm_timer.measure("all_reduce"):
            return super()._take_counts(counters)
