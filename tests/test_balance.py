# SPDX-License-Identifier: Apache-2.0
"""Balance losses, the bias update and the figures, against plain arithmetic."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from torch import Tensor, nn

import torch_automoe as automoe
from torch_automoe.balance.counts import add_once, count_tokens, take_counts

_on_three = pytest.mark.parametrize("rank_pool", [[2, 1]], indirect=True, ids=["2+1"])


def draw(num_tokens: int, num_experts: int, topk: int, seed: int = 0):
    """Probabilities, and ids that hold a -1 here and there."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(
        num_tokens, num_experts, dtype=torch.float64, generator=generator
    )
    topk_ids = torch.randint(-1, num_experts, (num_tokens, topk), generator=generator)
    return logits.softmax(-1), topk_ids


# ---- counts ----


def test_count_tokens_leaves_out_none() -> None:
    ids = torch.tensor([[0, 2], [2, -1], [-1, -1]], dtype=torch.int32)
    assert count_tokens(ids, 4).tolist() == [1, 0, 2, 0]
    assert count_tokens(ids[:0], 2).tolist() == [0, 0]


def test_add_once_is_a_sound_operator() -> None:
    args = (torch.zeros(3), torch.arange(3.0))
    torch.library.opcheck(torch.ops.automoe.add_once.default, args)


def test_add_once_adds_outside_of_a_backward() -> None:
    sums = torch.zeros(2)
    x = torch.ones(2, requires_grad=True)
    add_once(sums, x)
    x.register_hook(lambda grad: add_once(sums, grad))
    (x * 5).sum().backward()
    assert sums.tolist() == [1, 1]


def test_take_counts_needs_no_group_and_empties_the_counters() -> None:
    counters = [torch.tensor([1, 2]), torch.tensor(7), torch.tensor([3])]
    assert not dist.is_initialized()
    taken = take_counts(counters)
    assert [part.tolist() for part in taken] == [[1, 2], 7, [3]]
    assert not any(counter.any() for counter in counters)


# ---- losses ----


def plain_balance(probabilities: Tensor, topk_ids: Tensor) -> float:
    num_tokens, num_experts = probabilities.shape
    picks = [expert for expert in topk_ids.flatten().tolist() if expert >= 0]
    total = 0.0
    for expert in range(num_experts):
        mean = sum(probabilities[:, expert].tolist()) / num_tokens
        total += picks.count(expert) / len(picks) * mean
    return num_experts * total


def test_load_balancing_loss_is_its_formula() -> None:
    probabilities, topk_ids = draw(30, 5, 2)
    found = automoe.load_balancing_loss(probabilities, topk_ids)
    assert found.item() == pytest.approx(plain_balance(probabilities, topk_ids))


def test_sequence_balance_loss_is_the_mean_of_its_sequences() -> None:
    probabilities, topk_ids = draw(30, 5, 2)
    found = automoe.sequence_balance_loss(probabilities, topk_ids, 3)
    pairs = zip(probabilities.split(10), topk_ids.split(10), strict=True)
    expected = sum(plain_balance(*pair) for pair in pairs) / 3
    assert found.item() == pytest.approx(expected)


def test_z_loss_is_its_formula() -> None:
    logits = draw(4, 5, 1)[0].log() * 3
    rows = logits.tolist()
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / 4
    assert automoe.router_z_loss(logits).item() == pytest.approx(expected)


def test_losses_are_one_when_even_and_more_when_not() -> None:
    even = torch.full((6, 4), 0.25)
    topk_ids = torch.tensor([[0, 1], [2, 3]] * 3)
    skewed = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 6)
    for loss in (
        automoe.load_balancing_loss,
        lambda *args: automoe.sequence_balance_loss(*args, 3),
    ):
        assert loss(even, topk_ids).item() == pytest.approx(1.0)
        assert loss(skewed, topk_ids * 0).item() == pytest.approx(4 * 0.7)


def test_losses_of_no_tokens_are_zero() -> None:
    probabilities = torch.zeros(0, 4, requires_grad=True)
    topk_ids = torch.zeros(0, 2, dtype=torch.int64)
    losses = [
        automoe.load_balancing_loss(probabilities, topk_ids),
        automoe.sequence_balance_loss(probabilities, topk_ids, 0),
        automoe.router_z_loss(probabilities),
    ]
    sum(losses).backward()
    assert [loss.item() for loss in losses] == [0, 0, 0]


def test_transformers_loss_is_ours_times_k() -> None:
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = draw(30, 5, 2)[0].log()
    expected = module.load_balancing_loss_func((logits,), 5, 2)
    scores = logits.softmax(-1)
    ours = automoe.load_balancing_loss(scores, scores.topk(2)[1])
    torch.testing.assert_close(2 * ours.float(), expected)


def test_loss_arguments_are_checked() -> None:
    probabilities, topk_ids = draw(6, 4, 2)
    with pytest.raises(ValueError, match=r"probabilities has shape \(1, 6, 4\)"):
        automoe.load_balancing_loss(probabilities[None], topk_ids)
    with pytest.raises(ValueError, match=r"topk_ids has shape \(5, 2\).*6 tokens"):
        automoe.load_balancing_loss(probabilities, topk_ids[1:])
    with pytest.raises(ValueError, match="num_sequences is 4, expected a divisor"):
        automoe.sequence_balance_loss(probabilities, topk_ids, 4)


def test_attached_loss_scales_by_itself() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (100 * automoe.attach_loss(x, x.square().sum(), 0.5)).sum().backward()
    assert x.grad.tolist() == [101.0, 102.0]
    assert automoe.attach_loss(x, torch.tensor(3.0)) is x


def compare_global_loss() -> None:
    """The mean of the ranks' losses and gradients is that of the global batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    drawn = [draw(8, 5, 2, seed=rank) for rank in range(size)]
    parts = [probabilities.requires_grad_() for probabilities, _ in drawn]
    ids = [topk_ids for _, topk_ids in drawn]
    expected = automoe.load_balancing_loss(torch.cat(parts), torch.cat(ids))
    (grad,) = torch.autograd.grad(expected, parts[rank])
    mine = automoe.load_balancing_loss(parts[rank], ids[rank], group=dist.group.WORLD)
    mine.backward()
    mean = mine.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / size, expected.detach())
    torch.testing.assert_close(parts[rank].grad / size, grad)
    alone = automoe.load_balancing_loss(parts[rank], ids[rank])
    assert abs(alone - mine) > 1e-6, "the group made no difference"


@_on_three
def test_load_balancing_loss_over_a_group(rank_pool: RankPool) -> None:
    rank_pool.run(compare_global_loss)


# ---- the bias update ----


def plain_update(bias: Tensor, counts: list[int], rate: float) -> list[float]:
    mean = sum(counts) / len(counts)
    step = [rate * ((mean > count) - (mean < count)) for count in counts]
    shift = sum(step) / len(step)
    return [old + move - shift for old, move in zip(bias.tolist(), step, strict=True)]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_update_is_its_formula_for_layers_of_any_width() -> None:
    model = nn.ModuleList([automoe.Router(4, 3, 1), nn.Linear(2, 2)])
    model.append(automoe.Router(4, 5, 2))
    optimizer = make_optimizer(model)
    balance = automoe.ExpertBiasUpdate(model, optimizer, 0.1)
    expected = []
    counts_of_layer = {0: [5, 2, 2], 2: [0, 9, 1, 0, 0]}
    for layer, counts in counts_of_layer.items():
        router = model[layer]
        router.expert_bias.normal_()
        router.num_tokens_per_expert += torch.tensor(counts)
        router.num_dropped += layer
        expected.append(plain_update(router.expert_bias, counts, 0.1))
    optimizer.step()
    for layer, bias in zip(counts_of_layer, expected, strict=True):
        assert model[layer].expert_bias.tolist() == pytest.approx(bias, abs=1e-6)
        assert not model[layer].num_tokens_per_expert.any()
    kept = [counts.tolist() for counts in balance.num_tokens_per_expert]
    assert kept == list(counts_of_layer.values())
    assert [int(number) for number in balance.num_dropped] == [0, 2]


def test_an_even_load_moves_nothing() -> None:
    router = automoe.Router(4, 3, 1)
    optimizer = make_optimizer(router)
    automoe.ExpertBiasUpdate(router, optimizer, 0.1)
    # The mean of these is no float32.
    router.num_tokens_per_expert.fill_(2**24 + 1)
    optimizer.step()
    optimizer.step()  # no token at all
    assert not router.expert_bias.any()


def test_pairs_of_bias_and_counts() -> None:
    bias, counts = torch.zeros(2, dtype=torch.float64), torch.tensor([1, 3])
    optimizer = make_optimizer(nn.Linear(1, 1))
    balance = automoe.ExpertBiasUpdate([(bias, counts)], optimizer, 0.5)
    optimizer.step()
    assert bias.tolist() == [0.5, -0.5]
    assert counts.tolist() == [0, 0]
    assert balance.num_dropped == []
    balance.remove()
    counts += torch.tensor([1, 3])
    optimizer.step()
    assert bias.tolist() == [0.5, -0.5]
    assert counts.tolist() == [1, 3]


def test_update_follows_a_model_that_moves() -> None:
    model = nn.Sequential(automoe.Router(4, 2, 1))
    optimizer = make_optimizer(model)
    automoe.ExpertBiasUpdate(model, optimizer, 0.5)
    model.double()
    model[0].num_tokens_per_expert += torch.tensor([4, 0])
    optimizer.step()
    assert model[0].expert_bias.tolist() == [-0.5, 0.5]


def test_bias_evens_out_a_skewed_router() -> None:
    torch.manual_seed(0)
    router = automoe.Router(8, 8, 2, score_func="sigmoid")
    optimizer = make_optimizer(router)
    balance = automoe.ExpertBiasUpdate(router, optimizer, 0.02)
    x = torch.randn(256, 8) + 1.0
    figures = []
    for _ in range(60):
        router(x)
        optimizer.step()
        stats = automoe.load_balance_stats(balance.num_tokens_per_expert)
        figures.append(stats["moe/cv_mean"])
    assert figures[0] > 0.3
    assert max(figures[-5:]) < figures[0] / 3


def update_over_ranks() -> None:
    """One all-reduce; the sum over the ranks; alike on all ranks, and in a subgroup."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = nn.ModuleList([automoe.Router(4, 3, 1), automoe.Router(4, 4, 1)])
    optimizer = make_optimizer(model)
    balance = automoe.ExpertBiasUpdate(model, optimizer, 0.1)

    def count() -> None:
        for router in model:
            router.num_tokens_per_expert[rank] += 1
            router.num_dropped += rank

    count()
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        optimizer.step()
    assert all_reduce.call_count == 1
    assert [it.tolist() for it in balance.num_tokens_per_expert] == [
        [1, 1, 1],
        [1, 1, 1, 0],
    ]
    assert [int(it) for it in balance.num_dropped] == [size * (size - 1) // 2] * 2
    assert not model[0].expert_bias.any()
    expected = plain_update(torch.zeros(4), [1, 1, 1, 0], 0.1)
    assert model[1].expert_bias.tolist() == pytest.approx(expected)

    balance.remove()
    pair = dist.new_group([0, 1])
    if rank < 2:
        balance = automoe.ExpertBiasUpdate(model, optimizer, 0.1, group=pair)
        count()
        optimizer.step()
        assert balance.num_tokens_per_expert[0].tolist() == [1, 1, 0]


@_on_three
def test_update_sums_over_ranks(rank_pool: RankPool) -> None:
    rank_pool.run(update_over_ranks)


@pytest.mark.parametrize(
    ("layers", "rate", "message"),
    [
        (nn.Linear(2, 2), 0.1, "Linear has no module: expected modules with tensors"),
        (automoe.Router(4, 2, 1, expert_bias=False), 0.1, "Router has no module"),
        ([], 0.1, "layers is empty"),
        ([nn.Linear(2, 2)], 0.1, r"layers\[0\] is a Linear without tensors"),
        (
            [(torch.zeros(2), torch.zeros(3, dtype=torch.int64))],
            0.1,
            r"bias has shape \(2,\) and counts \(3,\), expected \(E,\) for both",
        ),
        ([(torch.zeros(2), torch.zeros(2))], 0.1, "counts torch.float32, expected"),
        (automoe.Router(4, 2, 1), -1.0, "rate is -1.0, expected at least 0"),
    ],
)
def test_wrong_layers_are_named(layers, rate, message) -> None:
    with pytest.raises(ValueError, match=message):
        automoe.ExpertBiasUpdate(layers, make_optimizer(nn.Linear(1, 1)), rate)


# ---- figures ----


def test_stats_are_their_definitions() -> None:
    counts = torch.tensor([[3, 1, 0, 4], [2, 2, 2, 2]])
    stats = automoe.load_balance_stats(counts, num_dropped=[1, 3], ep_size=2)
    cv = math.sqrt(((3 - 2) ** 2 + (1 - 2) ** 2 + (0 - 2) ** 2 + (4 - 2) ** 2) / 4) / 2
    shares = [3 / 8, 1 / 8, 4 / 8]
    entropy = -sum(share * math.log(share) for share in shares) / math.log(4)
    expected = {
        "moe/cv_mean": cv / 2,
        "moe/cv_median": cv / 2,
        "moe/cv_min": 0.0,
        "moe/cv_max": cv,
        "moe/expert_utilization_min": 0.0,
        "moe/expert_utilization_p25": 0.875,
        "moe/expert_utilization_median": 1.0,
        "moe/expert_utilization_p75": 1.125,
        "moe/expert_utilization_max": 2.0,
        "moe/dead_expert_frac_mean": 0.125,
        "moe/load_entropy_mean": (1 + entropy) / 2,
        "moe/load_entropy_min": entropy,
        "moe/avg_overload_factor": 1.0,
        "moe/max_overload_factor": 1.0,
        "moe/dropped_tokens": 4.0,
        "moe/dropped_frac": 0.25,
        "moe/layer_0/cv": cv,
        "moe/layer_1/cv": 0.0,
    }
    assert stats == pytest.approx(expected)


def test_stats_of_uneven_layers_and_ranks() -> None:
    counts = [torch.tensor([4, 1, 1]), torch.tensor([3, 1, 0, 0, 0])]
    stats = automoe.load_balance_stats(counts, ep_size=2)
    # Two experts and one; three and two.
    assert stats["moe/avg_overload_factor"] == pytest.approx((5 / 3 + 4 / 2) / 2)
    assert stats["moe/max_overload_factor"] == pytest.approx(2.0)
    assert stats["moe/dead_expert_frac_mean"] == pytest.approx((0 + 3 / 5) / 2)
    assert "moe/dropped_tokens" not in stats


def test_stats_of_no_tokens_are_finite() -> None:
    stats = automoe.load_balance_stats(torch.zeros(1, 4), num_dropped=[0], ep_size=4)
    assert all(math.isfinite(value) for value in stats.values())
    assert stats["moe/dead_expert_frac_mean"] == 1
    with pytest.raises(ValueError, match="num_tokens_per_expert is empty"):
        automoe.load_balance_stats([])
    with pytest.raises(ValueError, match="ep_size is 0"):
        automoe.load_balance_stats(torch.ones(1, 2), ep_size=0)
