# SPDX-License-Identifier: Apache-2.0
"""A small transformer with experts, in plain PyTorch: what users write themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Partial


@dataclass(frozen=True)
class Spec:
    """A model and its training; the same on all ranks, and hashable.

    Attributes:
        num_experts: E of each block.
        topk: K.
        layers: blocks.
        sequences: how many each data parallel rank has in a step.
        steps: of the optimizer.
        tied: all blocks use the experts of the first.
        favourites: the first so many experts get all tokens; 0: the router decides.
        drop_below: picks with a smaller weight get the id -1; their weight stays.
        frozen: parts of names of parameters that need no gradient.
        dtype: of the parameters.
    """

    num_experts: int = 6
    topk: int = 2
    layers: int = 2
    sequences: tuple[int, ...] = (2, 2, 2, 2)
    steps: int = 5
    tied: bool = False
    favourites: int = 0
    drop_below: float = 0.0
    frozen: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64


VOCAB, DIM, HEAD_DIM, HIDDEN, SEQ_LEN = 24, 16, 4, 12, 8


class Attention(nn.Module):
    """Causal attention; ``cp`` is set where a sequence lies on several ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(DIM, DIM, bias=False) for _ in range(4)
        )
        self.cp: DeviceMesh | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        start = 0
        if self.cp is not None:
            start = self.cp.get_local_rank() * q.shape[2]
            k, v = _whole_sequence(k, self.cp), _whole_sequence(v, self.cp)
        place = torch.arange(k.shape[2])
        seen = place <= place[start : start + q.shape[2], None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o(out.transpose(1, 2).flatten(2))


def _whole_sequence(part: Tensor, cp: DeviceMesh) -> Tensor:
    """Gather (B, heads, S, D) over S; the backward sums what all ranks have."""
    whole = DTensor.from_local(part.contiguous(), cp, [Shard(2)], run_check=False)
    whole = whole.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()])


class Router(nn.Module):
    """Softmax, top-k, weights that add up to 1."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, spec.num_experts, bias=False)
        self.spec = spec

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(x).softmax(-1)
        chosen = scores
        if self.spec.favourites:
            chosen = scores[..., : self.spec.favourites]
        ids = chosen.topk(self.spec.topk, dim=-1)[1]
        weights = scores.gather(-1, ids)
        weights = weights / weights.sum(-1, keepdim=True)
        return ids.masked_fill(weights < self.spec.drop_below, -1), weights


class Experts(nn.Module):
    """Stacked experts, each run on all tokens: the definition, and no more."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, DIM, 2 * HIDDEN))
        self.down = nn.Parameter(torch.empty(num_experts, HIDDEN, DIM))
        self.bias = nn.Parameter(torch.empty(num_experts, DIM))

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(self.down.shape[0]):
            weight = (topk_weights * (topk_ids == expert)).sum(-1, keepdim=True)
            gate, up = (x @ self.gate_up[expert]).chunk(2, dim=-1)
            rows = (F.silu(gate) * up) @ self.down[expert] + self.bias[expert]
            out = out + (rows * weight).to(x.dtype)
        return out


class DenseMLP(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class MoE(nn.Module):
    """Router, experts, and a shared expert beside them."""

    def __init__(self, spec: Spec, experts: Experts) -> None:
        super().__init__()
        self.router = Router(spec)
        self.experts = experts
        self.shared_expert = DenseMLP()

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.router(x)
        out = self.experts(x, ids, weights)
        return out + self.shared_expert(x)


class Block(nn.Module):
    """Attention and experts, each behind a norm and beside the residual."""

    def __init__(self, spec: Spec, experts: Experts) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = (nn.RMSNorm(DIM, 1e-6) for _ in range(2))
        self.attention = Attention()
        self.moe = MoE(spec, experts)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class Model(nn.Module):
    """Token ids (B, S) to logits (B, S, VOCAB).

    A stage of a pipeline lacks embed, or norm and head, and some layers.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Embedding(VOCAB, DIM)
        shared = Experts(spec.num_experts) if spec.tied else None
        self.layers = nn.ModuleDict(
            {
                str(index): Block(spec, shared or Experts(spec.num_experts))
                for index in range(spec.layers)
            }
        )
        self.norm: nn.Module | None = nn.RMSNorm(DIM, 1e-6)
        self.head: nn.Module | None = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(self.norm(x))


def build(spec: Spec) -> Model:
    """The model with the same numbers wherever it is built."""
    model = Model(spec).to(spec.dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale, shift = (0.1, 1.0) if "norm" in name else (0.4, 0.0)
            parameter.copy_(drawn * scale + shift)
            parameter.requires_grad_(not any(part in name for part in spec.frozen))
    return model
