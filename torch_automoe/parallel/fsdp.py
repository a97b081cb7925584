# SPDX-License-Identifier: Apache-2.0
"""Stock FSDP2 beside expert parallelism: how experts are sharded, gradients scaled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from torch_automoe.parallel.experts import parallel_state
from torch_automoe.parallel.mesh import MoEMesh, as_moe_mesh


def shard_experts(
    module: nn.Module,
    mesh: MoEMesh,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | int = True,
    offload_policy: OffloadPolicy | None = None,
) -> None:
    """Apply ``fully_shard`` to an experts module, over the ranks beside ep.

    Also where there are none: the unit then casts and scales all the same.

    Raises:
        ValueError: a parameter has no dimension that can be dealt evenly.
    """
    for name, parameter in module.named_parameters():
        expert_shard_dim(name, parameter, mesh.sparse)
    options: dict[str, Any] = {"reshard_after_forward": reshard_after_forward}
    if mp_policy is not None:
        # Routing weights are an input, and stay as exact as the router made them.
        options["mp_policy"] = replace(mp_policy, cast_forward_inputs=False)
    if offload_policy is not None:
        options["offload_policy"] = offload_policy
    fully_shard(
        module,
        mesh=mesh.sparse,
        shard_placement_fn=lambda p: Shard(expert_shard_dim("", p, mesh.sparse)),
        **options,
    )


def expert_shard_dim(name: str, parameter: nn.Parameter, sparse: DeviceMesh) -> int:
    """Which dimension of an expert's parameter FSDP shards.

    Not 0, which belongs to ep, and one that can be dealt evenly, as FSDP wants it.

    Raises:
        ValueError: there is none.
    """
    size = sparse.size(sparse.ndim - 1)
    for dim in range(1, parameter.ndim):
        if parameter.shape[dim] % size == 0:
            return dim
    if size == 1:
        return 0
    raise ValueError(
        f"its parameter {name} {tuple(parameter.shape)} cannot be dealt over the "
        f"{size} ranks beside ep: expected a dimension after the first that is a "
        f"multiple of {size}; choose a larger ep, so that fewer ranks are beside it"
    )


def shard_placement_fn(
    mesh: MoEMesh | DeviceMesh,
) -> Callable[[nn.Parameter], Any]:
    """Make the ``shard_placement_fn`` with which one ``fully_shard`` does it all.

    For ``parallelize(..., fully_shard_experts=False)``, and then::

        fn = automoe.shard_placement_fn(mesh)
        for block in model.layers:
            fully_shard(block, mesh=mesh.dense, shard_placement_fn=fn)
        fully_shard(model, mesh=mesh.dense, shard_placement_fn=fn)
        automoe.set_gradient_divide_factors(model, mesh)

    Parameters of experts then have a mesh of their own in the unit of their block,
    whose gathers overlap with those of the dense parameters.

    Raises:
        ValueError: this torch does not know meshes of single parameters (< 2.13).
    """
    mesh = as_moe_mesh(mesh)
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import (
            ShardPlacementResult,
        )
        from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info
    except ImportError:
        raise ValueError(
            "shard_placement_fn: this torch has no meshes of single parameters in "
            "fully_shard; leave fully_shard_experts=True in automoe.parallelize"
        ) from None
    info = _get_mesh_info(mesh.sparse)

    def place(parameter: nn.Parameter) -> Any:
        if not (isinstance(parameter, DTensor) and parameter.device_mesh == mesh.ep):
            return None
        dim = expert_shard_dim("", parameter, mesh.sparse)
        if mesh.ep.size() == 1 and mesh.tp is None:
            return Shard(dim)  # the same ranks as those of other parameters
        return ShardPlacementResult(placement=Shard(dim), mesh_info=info)

    return place


def set_gradient_divide_factors(
    model: nn.Module, mesh: MoEMesh | DeviceMesh, factor: float | None = None
) -> None:
    """Make FSDP scale the gradients of experts as it scales all others.

    The backward of dispatch sums over the ranks of ep, and FSDP divides by the ranks
    beside ep alone, so gradients of experts would come out ep times too large.
    ``parallelize`` calls this; call it again after ``fully_shard`` where one unit
    holds experts and other parameters (``shard_placement_fn``).

    Args:
        model: its FSDP units are changed, those with experts only, if no ``factor``
            is given.
        mesh: as for ``parallelize``.
        factor: sums of gradients over the ranks are divided by it, on all units;
            default: the number of data parallel ranks, as FSDP does. 1.0 is for a
            loss that is divided by the tokens of all ranks.
    """
    mesh = as_moe_mesh(mesh)
    if factor is not None and factor <= 0:
        raise ValueError(f"factor is {factor}, expected None or a positive number")
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        holds_experts = _holds_experts(module)
        if factor is None and not holds_experts:
            continue
        if holds_experts:
            _leave_out_empty(module)
        for group in _parameter_groups(module):
            _set_factor(group, factor or float(mesh.data_parallel_size))


def _set_factor(group: Any, factor: float) -> None:
    """Have a group of parameters divide its sums of gradients by ``factor``."""
    alone = group.mesh_info.shard_mesh_size == 1
    policy = group.mp_policy
    dtype = policy.reduce_dtype or policy.param_dtype
    parameters = (p.sharded_param.dtype for p in group.fsdp_params)
    dtype = dtype or next(parameters, torch.float32)
    divides_around = dtype not in (torch.float32, torch.bfloat16)
    # Not in a group of one with these types, which has no sum to be scaled around.
    # Elsewhere FSDP would ask for PREMUL_SUM, which Gloo and many others lack.
    group.force_sum_reduction_for_comms = not alone or divides_around
    # A group of one rank divides both around its sum and where it would have summed
    # (torch 2.11 to 2.14), so each gets a part of the factor.
    group.gradient_divide_factor = (
        math.sqrt(factor) if alone and divides_around else factor
    )


def _leave_out_empty(unit: FSDPModule) -> None:
    """Have a rank without experts keep its empty parts, and FSDP leave them alone.

    FSDP cannot reduce gradients of no elements (torch 2.11 to 2.14). The ranks beside
    this one have no experts either, so none of them waits for it.
    """
    for group in _parameter_groups(unit):
        if any(math.prod(p._orig_size) for p in group.fsdp_params):
            continue
        for parameter in group.fsdp_params:
            # FSDP has set the dimension that it shards to 0, but the parts of all
            # ranks have the same shape behind dimension 0.
            size = list(parameter._orig_size)
            size[parameter.fsdp_placement.dim] //= group.mesh_info.shard_mesh_size
            part = parameter.sharded_param._local_tensor
            parameter.sharded_param._local_tensor = part.new_empty(size)
        _remove_group(unit, group)


def _remove_group(unit: FSDPModule, group: Any) -> None:
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        state._fsdp_param_groups.remove(group)
    else:
        state._fsdp_param_group = None


def _parameter_groups(unit: FSDPModule) -> list[Any]:
    """FSDP's groups of the parameters of a unit; torch < 2.13 has one at most."""
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def _holds_experts(unit: FSDPModule) -> bool:
    """Return whether parameters of experts belong to this unit, not to a nested one."""
    waiting: list[nn.Module] = [unit]
    while waiting:
        module = waiting.pop()
        if parallel_state(module) is not None:
            return True
        waiting += [
            child for child in module.children() if not isinstance(child, FSDPModule)
        ]
    return False
