# SPDX-License-Identifier: Apache-2.0
"""The experts implementation "automoe" of transformers.

    model.set_experts_implementation("automoe")

Nothing but the registration happens when this module is imported, so that it costs
next to nothing beside transformers.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

NAME = "automoe"
_INTERFACE = "transformers.integrations.moe"


def register_experts_implementation() -> None:
    """Make "automoe" known as an implementation of experts in transformers.

    Experts whose parameters are DTensors, sharded by expert over a mesh of one
    dimension, are then run by the ranks of that mesh; experts with plain parameters on
    this rank alone, without ``torch.distributed``. Experts of ``automoe.parallelize``
    need it not: they are parallel whatever implementation is set.

    ``automoe.parallelize`` calls it, and so does the first use of any name of
    ``torch_automoe.parallel``, where transformers has been imported by then.

    Raises:
        ValueError: transformers is not installed, or is older than 5.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ValueError(
            f"register_experts_implementation: {error}; expected transformers 5 or "
            "newer: pip install 'transformers>=5'"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def register_if_imported() -> None:
    """Register if transformers' interface has been imported already."""
    # Not while it is imported, as when it is what imports torch, which imports this.
    if hasattr(sys.modules.get(_INTERFACE), "ALL_EXPERTS_FUNCTIONS"):
        register_experts_implementation()


def experts_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run experts: what transformers calls in place of ``module.forward``.

    Raises:
        ValueError: the parameters are sharded in another way than by expert.
    """
    from torch_automoe.parallel.adapters import InterfaceExperts, run_on_this_rank
    from torch_automoe.parallel.experts import ParallelExperts

    adapter = InterfaceExperts(module)
    mesh = _mesh_of(adapter.expert_parameters(module))
    if mesh is None:
        return run_on_this_rank(adapter, module, args, kwargs)
    return ParallelExperts(adapter, mesh).forward(module, args, kwargs)


def _mesh_of(parameters: dict[str, nn.Parameter]) -> DeviceMesh | None:
    """The mesh over which experts are dealt; None if this rank has them all."""
    from torch.distributed.tensor import DTensor, Shard

    found = None
    for name, parameter in parameters.items():
        if not isinstance(parameter, DTensor):
            continue
        mesh, placements = parameter.device_mesh, parameter.placements
        if placements != (Shard(0),) or found not in (None, mesh):
            raise ValueError(
                f"its parameter {name} is placed as {placements} on {mesh}, expected "
                "Shard(0), by expert, on the one dimension of a mesh, the same for all "
                "of its parameters; automoe.parallelize does that"
            )
        found = mesh
    return found
