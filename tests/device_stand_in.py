# SPDX-License-Identifier: Apache-2.0
"""A device that there is everywhere: its tensors keep their values on the CPU.

To torch it is an accelerator of another kind, so operators are found,
gradients are sent and tensors are moved as on a GPU; but there are no streams.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_NAME = "standin"
DEVICE = f"{_NAME}:0"

copies_to_host = 0  # since the process has begun


def _wrap(values: Tensor) -> Tensor:
    tensor = torch._C._acc.create_empty_tensor(values.shape, values.dtype)
    tensor.values_on_host = values
    return tensor


def _is_ours(item: Any) -> bool:
    return isinstance(item, Tensor) and hasattr(item, "values_on_host")


def _run_on_host(operator, *args, **kwargs):
    """Run any operator of torch on the values."""
    global copies_to_host
    if kwargs.get("device") is not None:
        kwargs["device"] = "cpu"
    if operator is torch.ops.aten._copy_from.default and not _is_ours(args[1]):
        copies_to_host += 1
    given = {}

    def unwrap(item: Any) -> Any:
        if not _is_ours(item):
            if isinstance(item, Tensor) and item.device.type == _NAME:
                raise RuntimeError(f"{operator}: values left behind by another one")
            return item
        given[id(item.values_on_host)] = item
        return item.values_on_host

    args, kwargs = _pytree.tree_map(unwrap, (args, kwargs))
    if operator is torch.ops.aten._copy_from.default:
        found = args[1].copy_(args[0])
    else:
        found = operator(*args, **kwargs)

    def wrap(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        # What works in place gives back what it was given.
        return given[id(item)] if id(item) in given else _wrap(item)

    return _pytree.tree_map(wrap, found)


@cache
def set_up() -> tuple[torch.library.Library, ...]:
    """Make the device known to this process."""
    _setup_privateuseone_for_python_backend(_NAME)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run_on_host, "PrivateUse1")
    # Torch has these for any device, but they leave the values behind.
    library = torch.library.Library("aten", "IMPL")
    for operator in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        library.impl(operator, partial(_run_on_host, operator), "PrivateUse1")
    return everything, library


def to_device(tensor: Tensor) -> Tensor:
    """Return a copy on the device; a leaf that needs a gradient where this one does."""
    set_up()
    return tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad)
