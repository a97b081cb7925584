# SPDX-License-Identifier: Apache-2.0
"""Which stacked experts may be run in parts: found out by running them so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torch_automoe.parallel.adapters import (
    SortedExperts,
    StackedExperts,
    find_adapter,
    run_on_this_rank,
)
from torch_automoe.parallel.stacked_probe import why_not_in_parts


class PlainExperts(nn.Module):
    """What people write: a loop over all experts, ids and weights in one call."""

    normalises = False
    weights_first = False

    def __init__(self, num_experts: int = 5, dim: int = 6, hidden: int = 8) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.randn(num_experts, dim, hidden).double())
        self.down = nn.Parameter(torch.randn(num_experts, hidden, dim).double())

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        if self.weights_first:
            topk_ids, topk_weights = topk_weights, topk_ids
        if self.normalises:
            topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, pick = torch.where(topk_ids == expert)
            rows = (x[token] @ self.up[expert]).relu() @ self.down[expert]
            out = out.index_add(0, token, rows * topk_weights[token, pick, None])
        return out


class WeightsFirst(PlainExperts):
    weights_first = True


class Normalising(PlainExperts):
    normalises = True


class MixingExperts(PlainExperts):
    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return super().forward(x, topk_ids, topk_weights) - x.mean(0)


class OtherCallExperts(PlainExperts):
    def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        return (x @ self.up).sum(0) * mask.bool() * scale.nosuch


class LoopOverEight(PlainExperts):
    def __init__(self) -> None:
        super().__init__(num_experts=8)
        self.loops = 8

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        self.num_experts = self.loops
        return super().forward(x, topk_ids, topk_weights)


@pytest.mark.parametrize("kind", [PlainExperts, WeightsFirst])
def test_a_sum_over_experts_is_taken(kind: type[PlainExperts]) -> None:
    module = kind()
    before = {name: p.clone() for name, p in module.named_parameters()}
    random = torch.get_rng_state()
    assert find_adapter(module) is StackedExperts
    assert StackedExperts(module).why_not(module, 2) is None
    assert module.training
    assert module.num_experts == 5
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])
    x, ids = torch.randn(7, 6).double(), torch.randint(5, (7, 2))
    weights = torch.rand(7, 2).double()
    pair = (weights, ids) if kind.weights_first else (ids, weights)
    got = run_on_this_rank(StackedExperts(module), module, (x, *pair), {})
    torch.testing.assert_close(got, module(x, *pair))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Normalising, "not the sum over experts of weight times row"),
        (MixingExperts, "not the sum over experts of weight times row"),
        (OtherCallExperts, "did not take random tokens"),
        (LoopOverEight, "fails where a rank has a part of the experts"),
    ],
)
def test_anything_else_is_refused(kind: type[PlainExperts], reason: str) -> None:
    module = kind()
    assert reason in StackedExperts(module).why_not(module, 2)


def test_meta_parameters_cannot_be_run() -> None:
    with torch.device("meta"):
        module = Normalising()
    assert why_not_in_parts(StackedExperts(module), module) is None


class Projection(nn.Module):
    """One stacked matrix; rows are sorted, and counted, by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        parts = rows.split(num_tokens_per_expert.tolist())
        return torch.cat([part @ w for part, w in zip(parts, self.weight, strict=True)])


def test_sorted_rows_keep_their_places() -> None:
    module = Projection()
    assert find_adapter(module) is SortedExperts
    rows, counts = torch.randn(6, 4), torch.tensor([1, 0, 5])
    got = run_on_this_rank(SortedExperts(module), module, (rows, counts), {})
    torch.testing.assert_close(got, module(rows, counts))
