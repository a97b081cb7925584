# SPDX-License-Identifier: Apache-2.0
"""The library's experts and bias update, with the time that their exchanges take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import torch_automoe as automoe
from torch_automoe.layer import tie
from torch_automoe.parallel.adapters import Call
from torch_automoe.parallel.experts import ParallelExperts, parallel_state
from torch_automoe.train.exchange import combine, dispatch, plan
from torch_automoe.train.timing import comm_timer


class TimedExperts(ParallelExperts):
    """Experts on several ranks whose exchanges count as communication."""

    def _exchange(
        self, module: nn.Module, call: Call, overlap: Callable[[], None] | None
    ) -> torch.Tensor:
        # Nothing overlaps here, so that the time of communication can be told.
        compute, train = self._own_experts(module)
        moe_plan = plan(call.topk_ids, self.adapter.num_experts, self.group)
        rows, weights = dispatch(call.x, call.topk_weights, moe_plan)
        weighs = self.adapter.weighs_rows
        out = compute(rows, weights if weighs else None, moe_plan.offsets)
        return combine(
            tie(out, rows, train),
            None if weighs else weights,
            moe_plan,
        )


def time_experts(model: nn.Module) -> None:
    """Count the time of the exchanges of all experts that lie on several ranks."""
    for module in model.modules():
        state = parallel_state(module)
        if state is not None:
            state.__class__ = TimedExperts


class TimedBiasUpdate(automoe.ExpertBiasUpdate):
    """``automoe.ExpertBiasUpdate`` whose all-reduce counts as communication."""

    def _take_counts(self, counters: list[torch.Tensor]) -> list[torch.Tensor]:
        with comm_timer.measure("all_reduce"):
            return super()._take_counts(counters)
