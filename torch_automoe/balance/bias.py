# SPDX-License-Identifier: Apache-2.0
"""Balance without a loss: the bias of busy experts is lowered before each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_automoe.balance.counts import take_counts

Layer = nn.Module | tuple[Tensor, Tensor]


class ExpertBiasUpdate:
    """Before each optimizer step, moves the bias of every expert by ``rate``.

    b_i += rate * sign(mean load - load_i), from "Auxiliary-Loss-Free Load Balancing
    Strategy for Mixture-of-Experts" (2024), algorithm 1; then the mean of the moves is
    taken off, since only differences matter to top-k. Loads are those since the last
    step, over all ranks: one all-reduce serves all layers, and gradient accumulation
    needs nothing.

    Attributes:
        num_tokens_per_expert: (E,) int64 of each layer: counts of the last step over
            all ranks, for ``load_balance_stats``.
        num_dropped: int64 of each layer that counts what capacity has dropped.
    """

    def __init__(
        self,
        layers: nn.Module | Iterable[Layer],
        optimizer: torch.optim.Optimizer,
        rate: float = 1e-3,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Register the update as a step pre-hook of the optimizer.

        Args:
            layers: a model, whose modules with tensors ``expert_bias`` (E,) and
                ``num_tokens_per_expert`` (E,) int64 are taken, as ``Router`` has them;
                or such modules, or pairs (bias, counts), for a model that keeps them
                elsewhere. Counts are read and set to zero by every update.
            optimizer: of the model.
            rate: of the bias, in units of scores; 0 only counts.
            group: all ranks that hold the same layers and different tokens. Default:
                the default group, if there is one. With pipeline parallelism give the
                group of this stage's ranks.

        Raises:
            ValueError: there is no such layer, shapes differ, or ``rate`` is negative.
        """
        if rate < 0:
            raise ValueError(f"rate is {rate}, expected at least 0 (0: only count)")
        self._layers = _find_layers(layers)
        self.rate = rate
        self.group = group
        self.num_tokens_per_expert: list[Tensor] = []
        self.num_dropped: list[Tensor] = []
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def update(self) -> None:
        """Sum the counts over the ranks, move the biases; collective over the group."""
        # Looked up anew: model.to() replaces buffers.
        pairs = [_pair(layer) for layer in self._layers]
        dropped = [getattr(layer, "num_dropped", None) for layer in self._layers]
        counters = [counts for _, counts in pairs]
        counters += [tensor for tensor in dropped if tensor is not None]
        sums = self._take_counts(counters)
        self.num_tokens_per_expert = sums[: len(pairs)]
        self.num_dropped = sums[len(pairs) :]
        for (bias, _), counts in zip(pairs, self.num_tokens_per_expert, strict=True):
            # In whole numbers: an expert at the mean does not move.
            step = torch.sign(counts.sum() - counts * counts.shape[0])
            step = step.to(torch.promote_types(bias.dtype, torch.float32))
            bias.add_(self.rate * (step - step.mean()))

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        self._hook.remove()

    def _take_counts(self, counters: list[Tensor]) -> list[Tensor]:
        return take_counts(counters, self.group)

    def _before_step(self, *_: Any) -> None:
        self.update()


def _find_layers(layers: nn.Module | Iterable[Layer]) -> list[Layer]:
    if isinstance(layers, nn.Module):
        found = [module for module in layers.modules() if _is_layer(module)]
        where = f"{type(layers).__name__} has no module"
    else:
        found = list(layers)
        where = "layers is empty"
    if not found:
        raise ValueError(
            f"{where}: expected modules with tensors expert_bias and "
            "num_tokens_per_expert, as torch_automoe.Router has them, or pairs of such"
        )
    for number, layer in enumerate(found):
        _check_pair(number, layer)
    return found


def _is_layer(module: nn.Module) -> bool:
    names = ("expert_bias", "num_tokens_per_expert")
    return all(isinstance(getattr(module, name, None), Tensor) for name in names)


def _pair(layer: Layer) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.Module):
        return layer.expert_bias, layer.num_tokens_per_expert
    return layer


def _check_pair(number: int, layer: Layer) -> None:
    if isinstance(layer, nn.Module) and not _is_layer(layer):
        raise ValueError(
            f"layers[{number}] is a {type(layer).__name__} without tensors expert_bias "
            "and num_tokens_per_expert; give a pair (bias, counts) instead"
        )
    bias, counts = _pair(layer)
    if bias.shape != counts.shape or bias.dim() != 1:
        raise ValueError(
            f"layers[{number}]: bias has shape {tuple(bias.shape)} and counts "
            f"{tuple(counts.shape)}, expected (E,) for both"
        )
    if not bias.dtype.is_floating_point or counts.dtype != torch.int64:
        raise ValueError(
            f"layers[{number}]: bias is {bias.dtype} and counts {counts.dtype}, "
            "expected a floating-point type and torch.int64"
        )
