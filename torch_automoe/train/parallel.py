# SPDX-License-Identifier: Apache-2.0
"""What is sharded where: FSDP2 for the dense part, expert parallelism beside.

Two views of the same ranks: ``dp`` holds them all (dense parameters are
sharded over it); ``efsdp`` x ``ep`` holds the experts. Ranks of one ``ep``
group are consecutive, so they fill one node before the next.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torch_automoe.moe_module import Experts, MoE
from torch_automoe.train.model import ByteMoE
from torch_automoe.train.timing import all_reduce


@dataclass(frozen=True)
class TrainMesh:
    """The dense and the sparse view of the ranks; dp = efsdp * ep."""

    dp: DeviceMesh
    efsdp: DeviceMesh
    ep: DeviceMesh


def init_train_mesh(ep: int) -> TrainMesh:
    """Arrange all ranks; every group uses the default group's backend."""
    world_size = dist.get_world_size()
    sparse = init_device_mesh(
        "cpu", (world_size // ep, ep), mesh_dim_names=("efsdp", "ep")
    )
    return TrainMesh(
        dp=sparse["efsdp", "ep"]._flatten("dp"),
        efsdp=sparse["efsdp"],
        ep=sparse["ep"],
    )


def parallelize(
    model: ByteMoE, mesh: TrainMesh, mp_policy: MixedPrecisionPolicy
) -> None:
    """Shard the experts over ``ep`` and ``efsdp``, everything else over ``dp``."""
    expert_parameters = set()
    for module in model.modules():
        if isinstance(module, MoE):
            module.group = mesh.ep.get_group()
            _shard_experts(module.experts, mesh.ep)
            expert_parameters.update(module.experts.parameters())

    # With reshard_after_forward=False the backward reuses the parameters that
    # the forward gathered: one collective less per block and step, at the
    # price of holding the (small) dense part unsharded in between.
    options = {"mp_policy": mp_policy, "reshard_after_forward": False}
    dense = {**options, "mesh": mesh.dp, "ignored_params": expert_parameters}
    for block in model.blocks:
        if mesh.efsdp.size() > 1:
            # Shard(1), not Shard(0): dimension 0 already belongs to ep.
            fully_shard(
                block.moe.experts,
                mesh=mesh.efsdp,
                shard_placement_fn=lambda _: Shard(1),
                **options,
            )
        fully_shard(block, **dense)
    fully_shard(model, **dense)

    # Gradients must be sums. The loss is already divided by the tokens of all
    # ranks, and the backward of dispatch sums over ep, so FSDP's division by
    # the size of its mesh would leave expert gradients ep times too large.
    # (With force_sum, FSDP asks for SUM and not for PREMUL_SUM.)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _shard_experts(experts: Experts, ep: DeviceMesh) -> None:
    for name, weight in list(experts.named_parameters(recurse=False)):
        # src_data_rank=None: every rank holds the same full tensor and keeps
        # its own slice, so nothing is sent.
        weight = distribute_tensor(weight.data, ep, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(weight))


def release_groups() -> None:
    """Let go of the groups of a finished run, once nothing else holds them.

    DTensor remembers the meshes it has seen, and with them their groups. The
    threads of a Gloo group that is still there when the interpreter ends can
    abort the process, while they free a last tensor (seen with torch 2.13).
    """
    with suppress(ImportError, AttributeError):
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
    gc.collect()


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their joint norm is at most ``max_norm``.

    The parameters live on different meshes, where the stock function cannot
    stack their norms. But every element lives on exactly one rank, so one sum
    over all ranks is enough. ``max_norm`` 0 only measures.

    Returns:
        The norm before clipping, the same on every rank.
    """
    grads = [_local_shard(p.grad) for p in model.parameters()]
    norms = torch.stack(torch._foreach_norm(grads)).double()
    total = all_reduce(norms.square().sum(), dist.ReduceOp.SUM).sqrt().item()
    if max_norm > 0 and total > max_norm:
        torch._foreach_mul_(grads, max_norm / total)
    return total


def _local_shard(grad: torch.Tensor) -> torch.Tensor:
    if not isinstance(grad, DTensor) or any(
        not placement.is_shard() and size > 1
        for placement, size in zip(grad.placements, grad.device_mesh.shape, strict=True)
    ):
        raise ValueError(
            "clip_grad_norm_ expects gradients that are sharded over all ranks, "
            f"got {grad.placements if isinstance(grad, DTensor) else type(grad)}"
        )
    return grad.to_local()
