# SPDX-License-Identifier: Apache-2.0
"""Ranks that have nothing to do, and arguments that cannot be meant."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_automoe as automoe
from torch_automoe.grouped import grouped_mm
from torch_automoe.parallel.experts import parallel_state
from torch_automoe.parallel.shared import EarlyShared

DIM = 8


class FirstExpert(nn.Module):
    """A router that sends every token to expert 0."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(x.shape[0], 1, dtype=torch.int64)
        return torch.ones(x.shape[0], 1), ids


def layer(**options: object) -> automoe.MoE:
    torch.manual_seed(0)
    experts = automoe.Experts(4, DIM, 16)
    return automoe.MoE(DIM, experts, num_experts=4, top_k=1, **options)


# ---- on ranks ----


def under_autocast() -> None:
    """Ranks without rows do not hear what autocast makes of the others' rows."""
    moe = layer(router=FirstExpert())
    alone = layer(router=FirstExpert())
    automoe.parallelize(moe, automoe.init_moe_mesh("cpu", ep=dist.get_world_size()))
    x = torch.randn(3, DIM, generator=torch.Generator().manual_seed(dist.get_rank()))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = moe(x), alone(x)
    torch.testing.assert_close(out.float(), expected.float(), atol=2e-2, rtol=2e-2)
    out.float().sum().backward()
    for parameter in moe.experts.parameters():
        assert parameter.grad is not None


def frozen_experts() -> None:
    """Nothing to learn in the experts or before: no rank goes backward in them."""
    moe = layer(router=FirstExpert(), group=dist.group.WORLD)
    size, rank = dist.get_world_size(), dist.get_rank()
    for name, weight in list(moe.experts.named_parameters()):
        own = weight.data.chunk(size)[rank].clone()
        setattr(moe.experts, name, nn.Parameter(own, requires_grad=False))
    head = nn.Linear(DIM, 1)
    head(moe(torch.randn(2, DIM))).sum().backward()
    dist.barrier()  # and all come here


def rows_and_scales() -> None:
    """Tensors that travel beside rows may be one number each; chunks are chosen."""
    size = dist.get_world_size()
    x = torch.randn(5, DIM)
    ids = torch.randint(4, (5, 2))

    def experts(received: tuple[Tensor, Tensor], offsets: Tensor) -> Tensor:
        rows, scales = received
        return rows * scales[:, None]

    scales = torch.arange(1.0, 6.0)
    out = automoe.moe((x, scales), ids, torch.ones(5, 2), experts, num_experts=4)
    assert size == 4
    torch.testing.assert_close(out, 2 * x * scales[:, None])


def balanced_layers() -> None:
    """The bias of a stock router is found, and counts are made where it has none."""
    import transformers

    transformers.logging.set_verbosity_error()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    sizes |= {"moe_intermediate_size": 16, "num_attention_heads": 4, "head_dim": 8}
    kinds = {
        "deepseek_v3": {"n_routed_experts": 8, "first_k_dense_replace": 0},
        "qwen3_moe": {"num_experts": 8},
    }
    for kind, more in kinds.items():
        more |= {"num_experts_per_tok": 2, "num_key_value_heads": 4}
        if kind == "deepseek_v3":
            more |= {"n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8}
            more |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
        config = transformers.AutoConfig.for_model(kind, **sizes, **more)
        model = transformers.AutoModelForCausalLM.from_config(config)
        automoe.parallelize(model, automoe.init_moe_mesh("cpu", ep=4))
        ((bias, counts),) = automoe.routed_layers(model)
        buffers = {id(buffer) for buffer in model.buffers()}
        found = bias.data_ptr() in {b.data_ptr() for b in model.buffers()}
        assert found == (kind == "deepseek_v3"), buffers
        model.train()(input_ids=torch.randint(64, (1, 6)))
        assert counts.sum() == 6 * 2


# ---- tests ----

ON_RANKS = [under_autocast, frozen_experts, rows_and_scales]


@pytest.mark.parametrize("rank_pool", [[2, 2]], indirect=True)
@pytest.mark.parametrize("case", ON_RANKS, ids=lambda case: case.__name__)
def test_on_ranks(rank_pool: RankPool, case) -> None:
    rank_pool.run(case)


@pytest.mark.parametrize("rank_pool", [[4]], indirect=True)
def test_balanced_layers(rank_pool: RankPool) -> None:
    pytest.importorskip("transformers", reason="the models are its")
    rank_pool.run(balanced_layers)


def test_grouped_mm_leaves_padding_at_zero() -> None:
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([2, 2, 4], dtype=torch.int32)
    out = grouped_mm(rows, weight, offsets, bias)
    expected = torch.cat(
        [
            rows[:2] @ weight[0] + bias[0],
            rows[2:4] @ weight[2] + bias[2],
            torch.zeros(2, 2, dtype=torch.float64),
        ]
    )
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close(bias.grad[:, 0], torch.tensor([2.0, 0.0, 2.0]).double())
    assert torch.equal(weight.grad[1], torch.zeros(3, 2).double())
    args = (rows, weight, offsets, bias)
    assert torch.autograd.gradcheck(grouped_mm, args)


class Block(nn.Module):
    """Experts, then a shared expert, as blocks of transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_experts = nn.Linear(DIM, DIM)
        self.early = EarlyShared(self, self.shared_experts)
        self.last = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        self.early.begin(x)()
        return self.last(self.shared_experts(x))


def test_an_early_result_does_not_outlive_a_recompute() -> None:
    block = Block()
    x = torch.randn(2, DIM, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert block.early._result is None
    assert (block.early.hits, block.early.misses) == (2, 0)


def test_a_buffer_that_nothing_computes_is_named(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="files of weights")

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("cosines", torch.ones(2), persistent=False)

    safetensors.save_file({"0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(Table())
    with pytest.raises(ValueError, match=r"0 \(Table\) has buffers .*cosines"):
        automoe.load_pretrained(model, tmp_path)
    assert automoe.load_pretrained(nn.Sequential(Table()), tmp_path) is not None


def test_arguments_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="num_chunks is 0"):
        automoe.ExpertParallel(num_chunks=0)
    with pytest.raises(ValueError, match="tokens is 'split'"):
        automoe.ExpertParallel(tokens="split")


def refused() -> list[str]:
    texts = []
    moe = layer()
    mesh = automoe.init_moe_mesh("cpu", ep=2)
    for attempt in (
        lambda: automoe.parallelize(moe, mesh, {"*.expert": None}),
        lambda: automoe.init_moe_mesh("cpu", ep=2, backend_override={"exp": "gloo"}),
        lambda: automoe.set_gradient_divide_factors(moe, mesh, 0.0),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        texts.append(str(error.value))
    assert all(parallel_state(module) is None for module in moe.modules())
    return texts


@pytest.mark.parametrize("rank_pool", [[4]], indirect=True)
def test_refusals_name_what_was_got(rank_pool: RankPool) -> None:
    for styles, override, factor in rank_pool.run(refused):
        assert "'*.expert'" in styles
        assert "experts" in styles
        assert "['exp']" in override
        assert "factor is 0.0" in factor
