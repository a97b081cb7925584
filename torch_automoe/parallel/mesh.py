# SPDX-License-Identifier: Apache-2.0
"""Two views of the same ranks: one for dense parameters, one for experts.

Ranks of one ep group are consecutive, so they fill one node before the next. The rule
is dp_shard * cp * tp = efsdp * ep: what the dense part uses for data, sequence and
tensor parallelism, the experts use for ep and for sharding beside it (efsdp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_VIEWS = "_automoe_views"
_DENSE_AXES = ("dp", "dp_replicate", "dp_shard", "fsdp", "efsdp")


@dataclass(frozen=True)
class MoEMesh:
    """The ranks of a job as the parts of an MoE model see them.

    Attributes:
        dense: for ``fully_shard`` of everything but experts: the dp_shard * cp ranks,
            or two axes, dp_replicate and these.
        sparse: for ``fully_shard`` of experts: ("efsdp",), or
            ("dp_replicate", "efsdp").
        ep: ranks that share the experts of a layer.
        tp: tensor parallel ranks, or None where there is one.
        cp: context parallel ranks, or None.
        pp: pipeline stages, or None.
    """

    dense: DeviceMesh
    sparse: DeviceMesh
    ep: DeviceMesh
    tp: DeviceMesh | None = None
    cp: DeviceMesh | None = None
    pp: DeviceMesh | None = None

    @property
    def data_parallel_size(self) -> int:
        """Ranks whose losses are averaged: dp_replicate * dp_shard * cp."""
        return self.dense.size()


def init_moe_mesh(
    device_type: str,
    *,
    ep: int,
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    dp_replicate: int = 1,
    backend_override: dict[str, Any] | None = None,
) -> MoEMesh:
    """Arrange all ranks of the job for a model with experts; collective.

    Ranks are ordered (pp, dp_replicate, dp_shard, cp, tp) for the dense part and
    (pp, dp_replicate, efsdp, ep) for the experts. dp_shard and efsdp follow from the
    number of ranks.

    Args:
        device_type: "cpu" or "cuda".
        ep: ranks that share the experts; divides dp_shard * cp * tp.
        tp: tensor parallel ranks of the dense part.
        cp: context parallel ranks.
        pp: pipeline stages.
        dp_replicate: replicas of the whole model (HSDP).
        backend_override: axis name -> backend, or (backend, options), as
            ``init_device_mesh`` takes it: ``{"ep": "automoe"}`` puts experts alone on
            this backend. Default: every axis is on the backend of the default group.

    Raises:
        ValueError: a size is not positive, or the number of ranks is not a multiple.
    """
    sizes = {"pp": pp, "dp_replicate": dp_replicate, "cp": cp, "tp": tp, "ep": ep}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}, expected a positive number of ranks")
    if not dist.is_initialized():
        raise ValueError(
            "init_moe_mesh: there is no default process group: call "
            "torch.distributed.init_process_group first"
        )
    world = dist.get_world_size()
    axes = {*sizes, "dp_shard", "efsdp"}
    if unknown := set(backend_override or {}) - axes:
        raise ValueError(
            f"backend_override names {sorted(unknown)}, expected some of {sorted(axes)}"
        )
    replicas = pp * dp_replicate
    inner = world // replicas
    if world % (replicas * cp * tp):
        raise ValueError(
            f"pp * dp_replicate * cp * tp is {replicas * cp * tp}, expected a divisor "
            f"of the number of ranks, {world}"
        )
    if inner % ep:
        raise ValueError(
            f"ep is {ep}, expected a divisor of the ranks of one stage and replica, "
            f"{inner} (dp_shard * cp * tp)"
        )
    dense_sizes = {**sizes, "dp_shard": inner // (cp * tp)}
    sparse_sizes = {**sizes, "efsdp": inner // ep}
    overrides = dict(backend_override or {})
    world_mesh = init_device_mesh(device_type, (world,), mesh_dim_names=("world",))
    dense = _unflatten(
        world_mesh,
        dense_sizes,
        ("pp", "dp_replicate", "dp_shard", "cp", "tp"),
        ("dp_shard",),
        overrides,
    )
    sparse = _unflatten(
        world_mesh,
        sparse_sizes,
        ("pp", "dp_replicate", "efsdp", "ep"),
        ("efsdp", "ep"),
        overrides,
    )
    return MoEMesh(
        dense=_dense_view(dense, cp, dp_replicate, overrides),
        sparse=sparse["dp_replicate", "efsdp"] if dp_replicate > 1 else sparse["efsdp"],
        ep=sparse["ep"],
        **{
            name: dense[name] if size > 1 else None
            for name, size in (("tp", tp), ("cp", cp), ("pp", pp))
        },
    )


def _unflatten(
    world: DeviceMesh,
    sizes: dict[str, int],
    names: tuple[str, ...],
    kept: tuple[str, ...],
    overrides: dict[str, Any],
) -> DeviceMesh:
    """Give the ranks axes; an axis of one rank needs no group unless it is kept."""
    names = tuple(name for name in names if sizes[name] > 1 or name in kept)
    chosen = {name: overrides[name] for name in names if name in overrides}
    return world._unflatten(
        0, tuple(sizes[name] for name in names), names, backend_override=chosen or None
    )


def _dense_view(
    dense: DeviceMesh, cp: int, dp_replicate: int, overrides: dict[str, Any]
) -> DeviceMesh:
    if cp == 1:
        shard = dense["dp_shard"]
    else:
        override = overrides.get("dp_shard")
        shard = dense["dp_shard", "cp"]._flatten("fsdp", backend_override=override)
    if dp_replicate == 1:
        return shard
    return DeviceMesh._concatenate([dense["dp_replicate"], shard])


def as_moe_mesh(mesh: MoEMesh | DeviceMesh) -> MoEMesh:
    """Return ``mesh``, or the views of a user's own mesh that has an axis "ep".

    Other axes of such a mesh are data parallel, as in ``init_device_mesh("cpu", (2, 4),
    mesh_dim_names=("dp", "ep"))``: experts are sharded over them, the rest of the model
    over all ranks.

    Raises:
        ValueError: the mesh has no axis "ep", or axes that are not data parallel.
    """
    if isinstance(mesh, MoEMesh):
        return mesh
    # Once for each mesh: views may need groups of their own.
    made = getattr(mesh, _VIEWS, None)
    if made is None:
        made = _views_of(mesh)
        setattr(mesh, _VIEWS, made)
    return made


def _views_of(mesh: DeviceMesh) -> MoEMesh:
    names = mesh.mesh_dim_names if isinstance(mesh, DeviceMesh) else None
    if names is None or "ep" not in names:
        raise ValueError(
            f"mesh is {mesh!r}, expected automoe.init_moe_mesh(...) or a DeviceMesh "
            'with an axis that is named "ep"'
        )
    others = tuple(name for name in names if name != "ep")
    unknown = [name for name in others if name not in _DENSE_AXES]
    replicate = "dp_replicate" in others
    if unknown or len(others) > 1 + replicate or names[-1] != "ep":
        raise ValueError(
            f'mesh has the axes {names}, expected ("ep",), ("dp", "ep") or '
            '("dp_replicate", "dp", "ep"); use automoe.init_moe_mesh for tp, cp and pp'
        )
    if not others:
        # A mesh of one rank beside ep, so that everything else is the same.
        mesh = mesh._unflatten(0, (1, mesh.size()), ("efsdp", "ep"))
        others = ("efsdp",)
    shard = tuple(name for name in others if name != "dp_replicate")
    if not shard:
        raise ValueError(
            f'mesh has the axes {names}, expected an axis "dp" between them'
        )
    flat = mesh[(*shard, "ep")]._flatten("dense")
    dense = DeviceMesh._concatenate([mesh["dp_replicate"], flat]) if replicate else flat
    return MoEMesh(dense=dense, sparse=mesh[others], ep=mesh["ep"])
