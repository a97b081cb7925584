# SPDX-License-Identifier: Apache-2.0
"""automoe.MoE: on one process a loop over tokens, on many ranks the one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import RankPool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import torch_automoe as automoe

DIM, WIDTH, TOPK = 6, 4, 2


def make_moe(num_experts: int = 5, **options: object) -> automoe.MoE:
    torch.manual_seed(0)
    losses = {"aux_loss_coef": 0.3, "seq_aux_loss_coef": 0.2, "z_loss_coef": 0.1}
    sizes = {"num_experts": num_experts, "top_k": TOPK}
    moe = automoe.MoE(
        DIM,
        automoe.Experts(num_experts, DIM, WIDTH),
        router=automoe.Router(DIM, **sizes, **losses),
        shared_experts=nn.Linear(DIM, DIM),
        **sizes,
        **options,
    )
    return moe.double()


def draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def plain_moe(moe: automoe.MoE, x: Tensor, topk_weights: Tensor, topk_ids: Tensor):
    """The layer's definition, token by token."""
    rows = []
    experts, act = moe.experts, getattr(F, moe.experts.activation)
    for row, weights, ids in zip(x, topk_weights, topk_ids, strict=True):
        out = moe.shared_experts(row)
        for weight, expert in zip(weights, ids.tolist(), strict=True):
            if expert >= 0:
                gate, up = (row @ experts.gate_up_proj[expert]).chunk(2)
                out = out + weight * (act(gate) * up @ experts.down_proj[expert])
        rows.append(out)
    return torch.stack(rows)


def gradients(moe: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in moe.named_parameters()}
    missing = [name for name, grad in found.items() if grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: _local(grad) for name, grad in found.items()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- one process ----


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("capacity_factor", [None, 0.7])
def test_layer_without_a_group_is_a_loop(activation, capacity_factor) -> None:
    assert not dist.is_initialized()
    moe = make_moe(num_experts=16)
    moe.experts.activation = activation
    moe.router.capacity_factor = capacity_factor
    x = draw(3, 4, DIM).requires_grad_()
    out = moe(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    found = {"x": x.grad, "out": out.detach(), **gradients(moe)}
    counts = moe.router.num_tokens_per_expert
    assert (counts == 0).any(), "no expert was without tokens"
    for name in ("gate_up_proj", "down_proj"):
        assert found[f"experts.{name}"][counts == 0].eq(0).all()

    moe.zero_grad()
    x = x.detach().requires_grad_()
    tokens = x.reshape(-1, DIM)
    topk_weights, topk_ids = moe.router(tokens, 3)
    assert (topk_ids == -1).any() == (capacity_factor is not None)
    expected = plain_moe(moe, tokens, topk_weights, topk_ids).view(x.shape)
    expected.square().sum().backward()
    expected = {"x": x.grad, "out": expected.detach(), **gradients(moe)}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_batches_without_sequences_and_tokens_without_batches() -> None:
    moe = make_moe()
    out = moe(draw(0, 4, DIM))
    assert out.shape == (0, 4, DIM)
    out.sum().backward()
    assert all(grad.eq(0).all() for grad in gradients(moe).values())
    x = draw(1, 7, DIM)
    assert torch.equal(moe(x[0]), moe(x)[0])


def test_own_router_and_no_shared_expert() -> None:
    class FirstTwo(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            assert x.dim() == 2
            ids = torch.tensor([[1, -1]] * len(x), dtype=torch.int32)
            return x.new_full(ids.shape, 0.5), ids

    experts = automoe.Experts(3, DIM, WIDTH).double()
    moe = automoe.MoE(DIM, experts, num_experts=3, top_k=2, router=FirstTwo())
    x = draw(2, 3, DIM)
    gate, up = (x @ experts.gate_up_proj[1]).chunk(2, dim=-1)
    expected = 0.5 * (F.silu(gate) * up @ experts.down_proj[1])
    torch.testing.assert_close(moe(x), expected)
    default = automoe.MoE(DIM, experts, num_experts=3, top_k=2).router
    assert (default.num_experts, default.top_k) == (3, 2)


def test_experts_cast_to_the_type_of_rows_or_of_autocast() -> None:
    experts = automoe.Experts(2, 8, 8)
    rows, offsets = torch.randn(5, 8), torch.tensor([2, 5], dtype=torch.int32)
    exact = experts(rows, offsets)
    assert exact.dtype == torch.float32
    assert experts(rows.bfloat16(), offsets).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        rough = experts(rows, offsets)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.02)
    for parameter in experts.parameters():
        parameter.grad = None
    rough.float().sum().backward()
    assert experts.down_proj.grad.dtype == torch.float32


def test_rows_behind_the_last_expert_are_zero() -> None:
    experts = automoe.Experts(2, DIM, WIDTH)
    out = experts(torch.randn(5, DIM), torch.tensor([1, 3], dtype=torch.int32))
    assert out[3:].eq(0).all()
    assert out[:3].ne(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_dim": 0}, "expert_dim is 0, expected at least 1"),
        ({"activation": "tanh"}, "activation is 'tanh', expected one of"),
    ],
)
def test_wrong_arguments_are_named(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        options = {"num_experts": 2, "dim": 4, "expert_dim": 4, **change}
        automoe.Experts(**options)


def test_offsets_of_other_experts_are_refused() -> None:
    experts = automoe.Experts(2, DIM, WIDTH)
    offsets = torch.tensor([1, 2, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="offsets has 3 entries, expected 2"):
        experts(torch.randn(3, DIM), offsets)


def test_compiled_layer() -> None:
    torch._dynamo.reset()
    moe = make_moe()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    results = []
    for call in (moe, compiled):
        moe.zero_grad()
        moe.router.num_tokens_per_expert.zero_()
        x = draw(3, 4, DIM).requires_grad_()
        out = call(x)
        out.square().sum().backward()
        counts = moe.router.num_tokens_per_expert.clone()
        results.append({"out": out.detach(), "x": x.grad, "counts": counts})
        results[-1].update(gradients(moe))
    torch.testing.assert_close(results[1], results[0])


# ---- many ranks ----


def shard(moe: automoe.MoE, group: dist.ProcessGroup) -> automoe.MoE:
    """The layer of this rank: expert parameters as DTensors over the group."""
    moe = copy.deepcopy(moe)
    mesh = DeviceMesh.from_group(group, "cpu")
    for name, weight in list(moe.experts.named_parameters()):
        weight = distribute_tensor(weight.data, mesh, [Shard(0)], src_data_rank=None)
        setattr(moe.experts, name, nn.Parameter(weight))
    moe.group = group
    return moe


def train_steps(moe, optimizer, batches: list[Tensor], scale: float, call=None):
    """A step per batch; gradients of the first one, summed over ranks."""
    first = None
    automoe.set_balance_loss_scale(moe, scale)
    balance = automoe.ExpertBiasUpdate(moe, optimizer, 0.1)
    for step in range(len(batches)):
        x = batches[step].clone().requires_grad_()
        (call or moe)(x).square().sum().backward()
        for name, parameter in moe.named_parameters():
            if dist.is_initialized() and not name.startswith("experts"):
                dist.all_reduce(parameter.grad, group=moe.group)
        if step == 0:
            first = {"x": x.grad, **{k: v.clone() for k, v in gradients(moe).items()}}
        optimizer.step()
        optimizer.zero_grad()
    balance.remove()
    return first, balance.num_tokens_per_expert[0]


def compare_with_one_process(num_experts: int, num_chunks: int, recompute: bool):
    """Gradients, parameters, counts and bias after three steps with balance."""
    group = dist.group.WORLD
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = make_moe(num_experts)
    mine = shard(whole, group)
    mine.num_chunks = num_chunks
    # The aux loss within the global batch: as one process has it.
    mine.router.balance_group = group
    batches = [draw(2 * size, 3, DIM, seed=step) for step in range(3)]
    own = slice(2 * rank, 2 * rank + 2)

    def once_more(x: Tensor) -> Tensor:
        return checkpoint(mine, x, use_reentrant=False)

    optimizers = [torch.optim.AdamW(moe.parameters(), lr=0.01) for moe in (whole, mine)]
    with torch.no_grad():
        assert torch.allclose(mine(batches[0][own]), whole(batches[0])[own], atol=1e-12)
    for moe in (whole, mine):
        for buffer in ("num_tokens_per_expert", "balance_loss_sums"):
            getattr(moe.router, buffer).zero_()
    found, counts = train_steps(
        mine,
        optimizers[1],
        [batch[own] for batch in batches],
        1 / size,
        once_more if recompute else None,
    )
    logged = automoe.balance_losses(mine)
    # The counts of the whole batch, not the sum of what all ranks have.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        expected, whole_counts = train_steps(whole, optimizers[0], batches, 1.0)
    assert torch.equal(counts, whole_counts)
    for name, value in automoe.balance_losses(whole).items():
        mean = logged[name].clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / size, value)

    per_rank = -(-num_experts // size)
    part = slice(rank * per_rank, (rank + 1) * per_rank)
    expected["x"] = expected["x"][own]
    state = {name: _local(it.detach()) for name, it in mine.named_parameters()}
    other = {name: it.detach() for name, it in whole.named_parameters()}
    for names in (expected, other):
        for name in names:
            names[name] = names[name][part] if "experts.g" in name else names[name]
            names[name] = names[name][part] if "experts.d" in name else names[name]
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(state, other, **close)
    bias = whole.router.expert_bias
    torch.testing.assert_close(mine.router.expert_bias, bias, **close)
    assert bias.abs().max() > 0.01


@pytest.mark.parametrize("rank_pool", [[2, 2]], indirect=True, ids=["2x2"])
@pytest.mark.parametrize(
    ("num_experts", "num_chunks", "recompute"),
    [(8, 1, False), (5, 3, False), (6, 1, True), (3, 2, True)],
)
def test_ranks_train_as_one_process(
    rank_pool: RankPool, num_experts, num_chunks, recompute
) -> None:
    rank_pool.run(compare_with_one_process, num_experts, num_chunks, recompute)


def order_of_calls(num_chunks: int) -> list[str]:
    """The shared expert runs once, before the first rows are there."""
    moe = shard(make_moe(), dist.group.WORLD)
    moe.num_chunks = num_chunks
    calls = []
    moe.shared_experts.register_forward_pre_hook(lambda *_: calls.append("shared"))
    moe.experts.register_forward_pre_hook(lambda *_: calls.append("experts"))
    moe(draw(2, 3, DIM))
    return calls


@pytest.mark.parametrize("rank_pool", [[2, 2]], indirect=True, ids=["2x2"])
def test_shared_expert_runs_while_tokens_travel(rank_pool: RankPool) -> None:
    for num_chunks in (1, 3):
        for calls in rank_pool.run(order_of_calls, num_chunks):
            assert calls == ["shared", *["experts"] * num_chunks]


def compare_with_group_of_one() -> None:
    """A group of one rank gives the bits of none, and of the exchange."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    moe = make_moe()
    x = draw(2, 3, DIM)
    expected = moe(x)
    moe.group = groups[dist.get_rank()]
    assert torch.equal(moe(x), expected)
    topk_weights, topk_ids = moe.router(x.view(-1, DIM))
    out = automoe.moe(x.view(-1, DIM), topk_ids, topk_weights, moe.experts, moe.group)
    assert torch.equal(out.view(x.shape) + moe.shared_experts(x), expected)


@pytest.mark.parametrize("rank_pool", [[2, 2]], indirect=True, ids=["2x2"])
def test_group_of_one_is_no_group(rank_pool: RankPool) -> None:
    rank_pool.run(compare_with_group_of_one)
