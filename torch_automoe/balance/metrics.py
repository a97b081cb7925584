# SPDX-License-Identifier: Apache-2.0
"""Figures of load balance, under the names that the field uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def load_balance_stats(
    num_tokens_per_expert: Tensor | Sequence[Tensor],
    *,
    num_dropped: Tensor | Sequence[Tensor] | None = None,
    ep_size: int = 1,
) -> dict[str, float]:
    """Return figures of how evenly experts were used, from counts over all ranks.

    ``expert_utilization``: an expert's tokens over the fair share, 1 = fair, 0 = dead;
    over all experts of all layers. ``cv``: standard deviation (of the whole, not of a
    sample) over mean, within a layer. ``overload_factor``: the tokens of the busiest of
    ``ep_size`` ranks over the fair share of a rank. ``load_entropy``: entropy of the
    load over that of an even one, 1 = even, 0 = one expert has all.

    Args:
        num_tokens_per_expert: (layers, E), or (E,) of each layer, where E may differ.
        num_dropped: picks that capacity has dropped, of each layer.
        ep_size: ranks that share the experts, as DTensor's ``Shard(0)`` places them.

    Returns:
        ``moe/cv_{mean,median,min,max}``,
        ``moe/expert_utilization_{min,p25,median,p75,max}``,
        ``moe/dead_expert_frac_mean``, ``moe/load_entropy_{mean,min}``,
        ``moe/{avg,max}_overload_factor`` where ``ep_size`` > 1,
        ``moe/dropped_tokens`` (picks) and ``moe/dropped_frac`` of all picks where
        ``num_dropped`` is given, and ``moe/layer_<i>/cv``.

    Raises:
        ValueError: there is no layer, or ``ep_size`` is not positive.
    """
    layers = [counts.double() for counts in num_tokens_per_expert]
    if not layers:
        raise ValueError(
            "num_tokens_per_expert is empty, expected counts of at least one layer: "
            "take them after an optimizer step"
        )
    if ep_size < 1:
        raise ValueError(f"ep_size is {ep_size}, expected at least 1")
    shares = [load / load.mean().clamp(min=1e-12) for load in layers]
    cv = torch.stack([share.std(correction=0) for share in shares])
    entropy = torch.stack([_relative_entropy(load) for load in layers])
    dead = torch.stack([(load == 0).double().mean() for load in layers])
    stats = _spread("moe/cv", cv, ("mean", "median", "min", "max"))
    names = ("min", "p25", "median", "p75", "max")
    stats |= _spread("moe/expert_utilization", torch.cat(shares), names)
    stats["moe/dead_expert_frac_mean"] = dead.mean()
    stats |= _spread("moe/load_entropy", entropy, ("mean", "min"))
    if ep_size > 1:
        overload = torch.stack([_overload(load, ep_size) for load in layers])
        stats["moe/avg_overload_factor"] = overload.mean()
        stats["moe/max_overload_factor"] = overload.max()
    if num_dropped is not None:
        dropped = sum(int(number) for number in num_dropped)
        picks = sum(int(load.sum()) for load in layers)
        stats["moe/dropped_tokens"] = dropped
        stats["moe/dropped_frac"] = dropped / max(picks, 1)
    stats |= {f"moe/layer_{layer}/cv": value for layer, value in enumerate(cv)}
    return {name: float(value) for name, value in stats.items()}


def _spread(prefix: str, values: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    quantiles = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
    return {
        f"{prefix}_{name}": (
            values.mean() if name == "mean" else values.quantile(quantiles[name])
        )
        for name in names
    }


def _relative_entropy(load: Tensor) -> Tensor:
    if load.numel() == 1:
        return load.new_ones(())
    share = load / load.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum() / math.log(load.numel())


def _overload(load: Tensor, ep_size: int) -> Tensor:
    chunk = -(-load.numel() // ep_size)
    busiest = max(part.sum() for part in load.split(chunk))
    return busiest * ep_size / load.sum().clamp(min=1e-12)
