# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model route tokens, for what balances their load."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_automoe.parallel.experts import parallel_state
from torch_automoe.router import Router

# The buffer of a bias that moves the choice of experts, as models call it.
_BIASES = ("expert_bias", "e_score_correction_bias")


def routed_layers(model: nn.Module) -> list[nn.Module | tuple[Tensor, Tensor]]:
    """Return what ``ExpertBiasUpdate`` needs of each layer of a parallel model.

    A ``Router`` counts for itself. Of other layers it is the pair of the bias that the
    model's own router has (a buffer ``e_score_correction_bias``, as DeepSeek-V3 has it)
    and the counts of the tokens that its experts were sent in training; a router
    without such a bias gets one that nothing reads, so that tokens are counted.

    Args:
        model: ``parallelize`` has been called on it.

    Returns:
        routers, and pairs of bias (E,) float and counts (E,) int64.
    """
    layers: list[nn.Module | tuple[Tensor, Tensor]] = []
    for name, module in model.named_modules():
        state = parallel_state(module)
        if state is None:
            continue
        while name.endswith(".base_layer"):  # of LoRA
            name = name.rpartition(".")[0]
        block = model.get_submodule(name.rpartition(".")[0])
        router = getattr(block, "router", None)
        if isinstance(router, Router):
            layers.append(router)
            continue
        counts = state.count_tokens()
        bias = _find_bias(block, counts.numel())
        if bias is None:
            bias = torch.zeros(counts.numel(), device=counts.device)
        layers.append((bias, counts))
    return layers


def _find_bias(block: nn.Module, num_experts: int) -> Tensor | None:
    for name, buffer in block.named_buffers():
        named = name.rpartition(".")[2] in _BIASES
        if named and buffer.numel() == num_experts and buffer.is_floating_point():
            return buffer.view(-1)
    return None
