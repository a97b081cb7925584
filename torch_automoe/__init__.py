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
    "Pending": "torch_automoe.exchange",
    "Permutation": "torch_automoe.exchange",
    "Plan": "torch_automoe.routing",
    "Topology": "torch_automoe.backend",
    "checkpoint_policy": "torch_automoe.checkpoint",
    "combine": "torch_automoe.exchange",
    "dispatch": "torch_automoe.exchange",
    "explain_exchange": "torch_automoe.backend",
    "moe": "torch_automoe.layer",
    "permute": "torch_automoe.exchange",
    "plan": "torch_automoe.routing",
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
