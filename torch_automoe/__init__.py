# SPDX-License-Identifier: Apache-2.0
"""A torch.distributed backend whose all-to-all knows the network.

``import torch`` alone registers the backend "automoe"; importing this package is only
needed for what it offers beside it, and is cheap: attributes load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> the module that defines it.
_LAZY = {
    "ExpertBiasUpdate": "torch_automoe.balance.bias",
    "ExpertParallel": "torch_automoe.parallel.apply",
    "Experts": "torch_automoe.moe_module",
    "MoE": "torch_automoe.moe_module",
    "MoEAdapter": "torch_automoe.parallel.adapters",
    "MoEMesh": "torch_automoe.parallel.mesh",
    "Options": "torch_automoe.options",
    "Pending": "torch_automoe.exchange",
    "Permutation": "torch_automoe.exchange",
    "Plan": "torch_automoe.routing",
    "Router": "torch_automoe.router",
    "Topology": "torch_automoe.backend",
    "as_moe_mesh": "torch_automoe.parallel.mesh",
    "attach_loss": "torch_automoe.balance.losses",
    "balance_losses": "torch_automoe.router",
    "checkpoint_policy": "torch_automoe.checkpoint",
    "clip_grad_norm_": "torch_automoe.parallel.clip",
    "combine": "torch_automoe.exchange",
    "dispatch": "torch_automoe.exchange",
    "explain": "torch_automoe.parallel.apply",
    "explain_exchange": "torch_automoe.backend",
    "explain_topology": "torch_automoe.devices",
    "grouped_mm": "torch_automoe.grouped",
    "init_moe_mesh": "torch_automoe.parallel.mesh",
    "load_balance_stats": "torch_automoe.balance.metrics",
    "load_balancing_loss": "torch_automoe.balance.losses",
    "load_pretrained": "torch_automoe.parallel.load",
    "moe": "torch_automoe.layer",
    "parallelize": "torch_automoe.parallel.apply",
    "permute": "torch_automoe.exchange",
    "plan": "torch_automoe.routing",
    "register_experts_implementation": "torch_automoe.parallel.transformers_experts",
    "register_moe_adapter": "torch_automoe.parallel.adapters",
    "router_z_loss": "torch_automoe.balance.losses",
    "save_pretrained": "torch_automoe.parallel.export",
    "sequence_balance_loss": "torch_automoe.balance.losses",
    "set_balance_loss_scale": "torch_automoe.router",
    "routed_layers": "torch_automoe.parallel.routed",
    "set_gradient_divide_factors": "torch_automoe.parallel.fsdp",
    "shard_placement_fn": "torch_automoe.parallel.fsdp",
    "stats": "torch_automoe.backend",
    "topology": "torch_automoe.backend",
    "unpermute": "torch_automoe.exchange",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("torch_automoe")
    else:
        raise AttributeError(f"module 'torch_automoe' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
