# SPDX-License-Identifier: Apache-2.0
"""Registers the c10d backend "automoe"; what torch's entry points call.

A module of its own that imports nothing of the package: torch calls it at the end of
``import torch``, which may itself be in the middle of an import of ours.
"""

from __future__ import annotations

from typing import Any

BACKEND = "automoe"
_DEVICES = ["cpu", "cuda"]


def autoload() -> None:
    """Register the backend; torch calls this at the end of ``import torch``.

    Cheap, and never fails an import of torch: the C++ extension is loaded when the
    first group is made.
    """
    import torch.distributed as dist

    if not dist.is_available() or BACKEND in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(
        BACKEND, _create, extended_api=True, devices=list(_DEVICES)
    )


def _create(options: Any, pg_options: Any) -> Any:
    from torch_automoe.backend import create

    return create(options, pg_options)
