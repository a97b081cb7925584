# SPDX-License-Identifier: Apache-2.0
"""What is sharded where: expert parallelism by one call, FSDP2 for the rest."""

from __future__ import annotations

import gc
import math
from contextlib import suppress

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import torch_automoe as automoe
from torch_automoe.train.moe import time_experts
from torch_automoe.train.timing import comm_timer, time_fsdp_collectives


def parallelize(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: automoe.MoEMesh,
    mp_policy: MixedPrecisionPolicy,
) -> None:
    """Shard the experts over ep and the ranks beside, everything else over all."""
    # With reshard_after_forward=False the backward reuses the parameters that
    # the forward gathered: one collective less per block and step, at the
    # price of holding the (small) dense part unsharded in between.
    options = {"mp_policy": mp_policy, "reshard_after_forward": False}
    automoe.parallelize(model, mesh, **options)
    for block in blocks:
        fully_shard(block, mesh=mesh.dense, **options)
    fully_shard(model, mesh=mesh.dense, **options)
    # Gradients must be sums: the loss is already divided by the tokens of all ranks.
    automoe.set_gradient_divide_factors(model, mesh, 1.0)
    time_experts(model)
    time_fsdp_collectives(model)


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


def clip_grad_norm_(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their joint norm is at most ``max_norm``.

    ``max_norm`` 0 only measures.

    Returns:
        The norm before clipping, the same on every rank.
    """
    with comm_timer.measure("all_reduce"):
        return automoe.clip_grad_norm_(model, max_norm or math.inf).item()
