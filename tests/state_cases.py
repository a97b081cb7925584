# SPDX-License-Identifier: Apache-2.0
"""Tiny models, and their training in one process and on ranks, for tests of state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import torch_automoe as automoe

VOCABULARY = 64
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
}


def hf_config(kind: str, **changes: Any) -> Any:
    """A tiny config of one of transformers' families."""
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **{**_COMMON, **_FAMILIES[kind], **changes})


def hf_model(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A tiny transformers model with parameters that matter, the same on all ranks."""
    from transformers import AutoModelForCausalLM

    config = hf_config(kind, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    fill(model.to(dtype))
    return model


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Give all parameters values that are drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3, generator=generator)


def one_process(model: Any) -> Any:
    """A copy to compare with; transformers' own grouped product knows no float64."""
    reference = copy.deepcopy(model)
    if hasattr(reference, "set_experts_implementation"):
        reference.set_experts_implementation("eager")
    return reference


def tokens(num_ranks: int, step: int = 0) -> Tensor:
    """(num_ranks, 12) int64, a sequence for each rank."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, VOCABULARY, (num_ranks, 12), generator=generator)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of transformers' models and of plain ones."""
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next token."""
    logits = logits_of(model, ids)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def shard(model: nn.Module, ep: int, blocks: Any, nested: bool = True) -> Any:
    """parallelize, then stock fully_shard of blocks and model; returns the mesh."""
    mesh = automoe.init_moe_mesh("cpu", ep=ep)
    automoe.parallelize(model, mesh, fully_shard_experts=nested)
    options = {} if nested else {"shard_placement_fn": automoe.shard_placement_fn(mesh)}
    for block in blocks:
        fully_shard(block, mesh=mesh.dense, **options)
    fully_shard(model, mesh=mesh.dense, **options)
    if not nested:
        automoe.set_gradient_divide_factors(model, mesh)
    return mesh


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW over what trains.

    With its usual eps it makes 1e-18 between two gradients near zero 1e-12 between two
    parameters, and that may flip a rounding of a router, which works in float32.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, weight_decay=0.1, fused=True)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    on_gradients: Callable[[nn.Module], None] | None = None,
) -> list[float]:
    """Steps on this rank's sequence; returns the mean losses of all ranks."""
    return list(_train(model, optimizer, steps, on_gradients))


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    on_gradients: Callable[[nn.Module], None] | None,
) -> Iterator[float]:
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in steps:
        loss = loss_of(model, tokens(size, step)[rank : rank + 1])
        loss.backward()
        if on_gradients is not None:
            on_gradients(model)
        automoe.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        yield mean.item() / size


def train_alone(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    num_ranks: int,
    on_gradients: Callable[[nn.Module], None] | None = None,
) -> list[float]:
    """The same in one process: sequences one by one, since routers work in float32."""
    losses = []
    for step in steps:
        ids = tokens(num_ranks, step)
        total = 0.0
        for rank in range(num_ranks):
            loss = loss_of(model, ids[rank : rank + 1]) / num_ranks
            loss.backward()
            total += loss.item()
        if on_gradients is not None:
            on_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, also of a DTensor; collective."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


class PlainExperts(nn.Module):
    """Stacked experts without transformers: (T, H), (T, K), (T, K) -> (T, H)."""

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, dim, 2 * dim))
        self.down = nn.Parameter(torch.empty(num_experts, 2 * dim, dim))

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Each token by its experts, one expert after another."""
        out = torch.zeros_like(x)
        for expert in range(self.up.shape[0]):
            rows, k = (topk_ids == expert).nonzero(as_tuple=True)
            hidden = F.silu(x[rows] @ self.up[expert]) @ self.down[expert]
            out = out.index_add(0, rows, hidden * topk_weights[rows, k, None])
        return out


class PlainBlock(nn.Module):
    """Mixes positions, then routes each to two experts."""

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = PlainExperts(num_experts, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, dim) -> (B, S, dim)."""
        x = x + torch.tanh(self.mix(x.cumsum(1)))
        rows = x.flatten(0, 1)
        weights, ids = self.router(rows).softmax(-1).topk(2)
        return x + self.experts(rows, ids, weights).view_as(x)


class PlainModel(nn.Module):
    """A language model of plain PyTorch; tied embeddings, a buffer that is not saved.

    The buffer is for the tests of what files hold: position scales of (S,).
    """

    def __init__(self, num_experts: int = 8, dim: int = 16, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(PlainBlock(num_experts, dim) for _ in range(2))
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("scale", torch.linspace(0.5, 1, 12), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def reset_parameters(self) -> None:
        """Fill what ``to_empty`` has left without values."""
        self.scale.copy_(torch.linspace(0.5, 1, 12))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, VOCABULARY)."""
        x = self.embed(ids) * self.scale[: ids.shape[1], None]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plain_model(**options: Any) -> PlainModel:
    """A plain model in float64, the same on all ranks."""
    model = PlainModel(**options).double()
    fill(model)
    return model
