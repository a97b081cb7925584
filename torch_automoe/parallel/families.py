# SPDX-License-Identifier: Apache-2.0
"""Families of transformers whose experts are unlike all others.

Classes are known by name, so that transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_automoe.grouped import grouped_mm
from torch_automoe.parallel.adapters import (
    Call,
    MoEAdapter,
    ReceivedRows,
    SortedExperts,
)


class DbrxExperts(MoEAdapter):
    """Experts whose matrices stand one below the other: (E * F, H) in a child."""

    kind = "dbrx experts"

    def __init__(self, module: nn.Module) -> None:
        self.num_experts = module.num_experts

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """As ``MoEAdapter.expert_parameters``, with E * F as dimension 0."""
        return dict(module.named_parameters())

    def why_not(self, module: nn.Module, ep: int) -> str | None:
        """As ``MoEAdapter.why_not``."""
        if self.num_experts % ep == 0:
            return None
        return (
            f"its matrices of {self.num_experts} experts stand one below the other, "
            f"and would be cut inside an expert: expected a divisor of "
            f"{self.num_experts} as ep, got {ep}"
        )

    def read_call(self, module: nn.Module, args: tuple, kwargs: dict) -> Call:
        """As ``MoEAdapter.read_call``: tokens are (B, S, H), ids (B * S, K)."""
        x, *pair = args
        flat = x.reshape(-1, x.shape[-1])
        call = super().read_call(module, (flat, *pair), kwargs)
        return replace(
            call, finish=lambda out: torch.ops.aten._unsafe_view(out, x.shape)
        )

    def compute(
        self, module: nn.Module, received: ReceivedRows, parameters: dict[str, Tensor]
    ) -> Tensor:
        """As ``MoEAdapter.compute``."""
        w1, v1, w2 = (
            parameters[name].unflatten(0, (-1, module.ffn_hidden_size))
            for name in ("mlp.w1", "mlp.v1", "mlp.w2")
        )
        rows, offsets = received.rows, received.offsets
        gate = grouped_mm(rows, w1.transpose(1, 2), offsets)
        up = grouped_mm(rows, v1.transpose(1, 2), offsets)
        hidden = module.mlp.activation_fn(gate) * up
        return grouped_mm(hidden, w2, offsets)


class JetMoeExperts(SortedExperts):
    """One projection of sorted rows, each with the matrix of its expert."""

    kind = "jetmoe projection of sorted rows"

    def read_call(self, module: nn.Module, args: tuple, kwargs: dict) -> Call:
        """As ``MoEAdapter.read_call``; the model gives counts as a list."""
        rows, counts = args
        counts = torch.as_tensor(counts, device=rows.device)
        return super().read_call(module, (rows, counts), kwargs)

    def compute(
        self, module: nn.Module, received: ReceivedRows, parameters: dict[str, Tensor]
    ) -> Tensor:
        """As ``MoEAdapter.compute``."""
        weight = parameters["weight"].transpose(1, 2)
        return grouped_mm(received.rows, weight, received.offsets)


class Llama4Experts(MoEAdapter):
    """Experts whose rows are weighted before, not after; see ``Llama4Block``."""

    kind = "llama4 experts, weighted rows"
    weighs_rows = True

    def read_call(self, module: nn.Module, args: tuple, kwargs: dict) -> Call:
        """As ``MoEAdapter.read_call``."""
        return Call(*args, lambda out: out)

    def compute(
        self, module: nn.Module, received: ReceivedRows, parameters: dict[str, Tensor]
    ) -> Tensor:
        """As ``MoEAdapter.compute``."""
        rows, offsets = received.rows, received.offsets
        # As the model does: the product has the type of the rows.
        rows = rows * received.weights.to(rows.dtype)[:, None]
        gate_up = grouped_mm(rows, parameters["gate_up_proj"], offsets)
        gate, up = gate_up.chunk(2, dim=-1)
        return grouped_mm(up * module.act_fn(gate), parameters["down_proj"], offsets)


def run_llama4_block(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward of Llama 4's block, with ids and weights for its experts.

    The original gives every expert all tokens, those that are not for it as zeros.
    """
    x = x.reshape(-1, block.hidden_dim)
    scores, logits = block.router(x)
    topk_ids = logits.topk(block.top_k, dim=1).indices
    out = block.experts(x, topk_ids, scores.gather(1, topk_ids))
    return block.shared_expert(x) + out, logits


_MODELS = "transformers.models."
_ADAPTERS = {
    "dbrx.modeling_dbrx.DbrxExperts": DbrxExperts,
    "jetmoe.modeling_jetmoe.JetMoeParallelExperts": JetMoeExperts,
    "llama4.modeling_llama4.Llama4TextExperts": Llama4Experts,
}
_BLOCKS = {
    "llama4.modeling_llama4.Llama4TextMoe": run_llama4_block,
}
_REFUSED = {
    "doge.modeling_doge.DogeCDMoE": (
        "its experts are single rows of two embeddings, found by product keys: they "
        "would have to be looked up, not dispatched to"
    ),
}


def _qualified_names(module: nn.Module) -> list[str]:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return [name.removeprefix(_MODELS) for name in names if name.startswith(_MODELS)]


def find_family_adapter(module: nn.Module) -> type[MoEAdapter] | None:
    """Return the adapter of a family's own class of experts."""
    names = _qualified_names(module)
    return next((_ADAPTERS[name] for name in names if name in _ADAPTERS), None)


def find_family_block(
    module: nn.Module,
) -> Callable[[nn.Module, Tensor], Any] | None:
    """Return the forward of a family's block that has to be another one."""
    names = _qualified_names(module)
    return next((_BLOCKS[name] for name in names if name in _BLOCKS), None)


def why_not_family(module: nn.Module) -> str | None:
    """Return why a family's block cannot be handled, where that is known."""
    names = _qualified_names(module)
    return next((_REFUSED[name] for name in names if name in _REFUSED), None)
