# SPDX-License-Identifier: Apache-2.0
"""The norm of gradients that lie on several meshes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Partial

from torch_automoe.parallel.mesh import MoEMesh


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    mesh: MoEMesh | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Scale gradients in place so that their joint norm is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_``, for parameters on several meshes: experts
    on (efsdp, ep), others on all ranks, stages of a pipeline on some. Each rank sums
    over its own parts, divided by the number of ranks that have the same part, and one
    all-reduce over all ranks makes the sum complete.

    Args:
        parameters: of this rank, or a module that has them.
        max_norm: math.inf only measures.
        norm_type: p of the norm; math.inf is the largest absolute value.
        error_if_nonfinite: raise if the norm is nan or infinite.
        foreach: False scales gradients one by one; default: all at once.
        mesh: needed with pipeline stages, so that their number is known.
        group: all ranks of the model; default: the default group.

    Returns:
        The norm before, a float64 scalar, the same on all ranks.

    Raises:
        ValueError: a gradient is a partial sum.
        RuntimeError: ``error_if_nonfinite`` and the norm is not finite.
    """
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    elif isinstance(parameters, Tensor):
        parameters = [parameters]
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    distributed = dist.is_initialized()
    size = dist.get_world_size(group) if distributed else 1
    stages = mesh.pp.size() if mesh is not None and mesh.pp is not None else 1
    total = _sum_of_powers(grads, norm_type, size // stages)
    if distributed:
        device = parameters[0].device if parameters else torch.device("cpu")
        total = _all_ranks(total.to(device), math.isinf(norm_type), group)
    norm = total if math.isinf(norm_type) else total ** (1.0 / norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"The norm of order {norm_type} of the gradients is {norm.item()}, so they "
            "cannot be clipped; call with error_if_nonfinite=False to scale them "
            "all the same"
        )
    _scale(grads, max_norm, norm, foreach)
    return norm


def _sum_of_powers(grads: list[Tensor], norm_type: float, stage_size: int) -> Tensor:
    """This rank's share of the sum of |x| ** p; of the maximum for p = inf."""
    largest = math.isinf(norm_type)
    shares = []
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        if local.numel() == 0:
            continue
        norm = torch.linalg.vector_norm(local, norm_type, dtype=_wide(local))
        if not largest:
            norm = norm.double() ** norm_type / _copies(grad, stage_size)
        shares.append(norm.double())
    if not shares:
        return torch.zeros((), dtype=torch.float64)
    stacked = torch.stack(shares)
    return stacked.max() if largest else stacked.sum()


def _all_ranks(total: Tensor, largest: bool, group: dist.ProcessGroup | None) -> Tensor:
    """Sum or maximum over the ranks; nan where one of them has nan."""
    if not largest:
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
        return total
    # Backends may take any number for larger than nan.
    pair = torch.stack([total.nan_to_num(nan=0.0, posinf=math.inf), total.isnan()])
    dist.all_reduce(pair, dist.ReduceOp.MAX, group)
    return torch.where(pair[1] > 0, math.nan, pair[0])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _copies(grad: Tensor, stage_size: int) -> float:
    """How many ranks of a stage have the same part of a gradient."""
    if not isinstance(grad, DTensor):
        return stage_size
    parts = 1
    for placement, size in zip(grad.placements, grad.device_mesh.shape, strict=True):
        if isinstance(placement, Partial):
            raise ValueError(
                f"a gradient {tuple(grad.shape)} is placed as {grad.placements}, "
                "expected sums that are complete: clip after the backward of all "
                "micro-batches"
            )
        if not isinstance(placement, Replicate):
            parts *= size
    return stage_size / parts


def _scale(
    grads: list[Tensor], max_norm: float, norm: Tensor, foreach: bool | None
) -> None:
    if math.isinf(max_norm):
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    local = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    if foreach is False:
        for grad in local:
            grad.mul_(factor.to(grad))
        return
    by_kind: dict[tuple, list[Tensor]] = {}
    for grad in local:
        by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    for (device, dtype), same in by_kind.items():
        torch._foreach_mul_(same, factor.to(device=device, dtype=dtype))
