# SPDX-License-Identifier: Apache-2.0
"""A small GPT over bytes: RoPE, RMSNorm, causal attention, MoE in each block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from torch_automoe.moe_module import Experts, MoE
from torch_automoe.router import Router
from torch_automoe.train.config import ModelConfig

VOCAB_SIZE = 256
# A position is embedded from its byte and the three before it. Single bytes say
# little; this spares the first layer from learning to look them up.
CONTEXT_BYTES = 4


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised q, k."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(dim // heads)
        self.k_norm = nn.RMSNorm(dim // heads)

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """x (B, S, D), rope (2, S, head_dim) -> (B, S, D)."""
        batch, seq_len, dim = x.shape
        head_dim = dim // self.heads  # explicit, since batch may be 0
        qkv = self.qkv_proj(x).view(batch, seq_len, 3, self.heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).reshape(batch, seq_len, dim))


class Block(nn.Module):
    """Attention, then a mixture of experts, each on a normalised input."""

    def __init__(self, config: ModelConfig, aux_loss_coef: float) -> None:
        super().__init__()
        sizes = {"num_experts": config.num_experts, "top_k": config.top_k}
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config.dim, config.heads)
        self.moe_norm = nn.RMSNorm(config.dim)
        self.moe = MoE(
            config.dim,
            Experts(config.num_experts, config.dim, config.expert_dim),
            router=Router(config.dim, **sizes, seq_aux_loss_coef=aux_loss_coef),
            **sizes,
        )

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.moe(self.moe_norm(x))


class ByteMoE(nn.Module):
    """The language model: bytes (B, S) -> logits (B, S, 256)."""

    def __init__(self, config: ModelConfig, aux_loss_coef: float) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.embedding = nn.Embedding(CONTEXT_BYTES * VOCAB_SIZE, config.dim)
        self.blocks = nn.ModuleList(
            Block(config, aux_loss_coef) for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCAB_SIZE, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, S) int64 in [0, 256) -> (B, S, 256)."""
        context = F.pad(tokens, (CONTEXT_BYTES - 1, 0)).unfold(1, CONTEXT_BYTES, 1)
        table = torch.arange(CONTEXT_BYTES) * VOCAB_SIZE
        x = self.embedding(context + table).sum(2)
        rope = rotary_table(tokens.shape[1], self.head_dim).to(x)
        for block in self.blocks:
            x = block(x, rope)
        return self.head(self.norm(x))


def init_weights(model: ByteMoE, seed: int) -> None:
    """Draw all weights from one seed.

    Every rank draws the whole model, so all ranks start alike whatever their
    number. Projections that write to the residual stream start smaller.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_scale = 1 / math.sqrt(2 * len(model.blocks))

    def normal(weight: torch.Tensor, std: float) -> None:
        # Drawn in float64 so that every dtype starts from the same numbers.
        draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            weight.copy_(draw * std)

    normal(model.embedding.weight, CONTEXT_BYTES**-0.5)
    for module in model.modules():
        if isinstance(module, Attention):
            std = module.out_proj.in_features**-0.5
            normal(module.qkv_proj.weight, std)
            normal(module.out_proj.weight, std * residual_scale)
        elif isinstance(module, Router):
            normal(module.weight, module.weight.shape[1] ** -0.5)
        elif isinstance(module, Experts):
            normal(module.gate_up_proj, module.gate_up_proj.shape[1] ** -0.5)
            std = module.down_proj.shape[1] ** -0.5
            normal(module.down_proj, std * residual_scale)
    normal(model.head.weight, 0.1 * model.head.in_features**-0.5)


def rotary_table(seq_len: int, head_dim: int, base: float = 1e4) -> torch.Tensor:
    """Cosines and sines of rotary positions, (2, S, head_dim), float32."""
    frequency = base ** -(torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(seq_len).float(), frequency).repeat(1, 2)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to (B, H, S, head_dim)."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@torch.no_grad()
def generate(
    model: ByteMoE,
    prompt: bytes,
    num_bytes: int,
    *,
    context: int,
    temperature: float,
    seed: int,
    rows: int = 1,
) -> bytes:
    """Continue ``prompt`` by ``num_bytes`` bytes, seeing ``context`` bytes back.

    Every rank must call this, because experts live on all ranks. Ranks that
    pass ``rows=0`` compute no text of their own: they only serve their experts,
    and return the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for length in range(len(prompt), len(prompt) + num_bytes):
        size = min(length, context)
        window = torch.zeros(rows, size, dtype=torch.int64)
        if rows:
            window[:] = torch.tensor(text[-size:])
        logits = model(window)[:, -1, :VOCAB_SIZE].double()
        if rows:
            text.append(_sample(logits[0], temperature, generator))
    return bytes(text)


def _sample(
    logits: torch.Tensor, temperature: float, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
