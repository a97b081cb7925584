# SPDX-License-Identifier: Apache-2.0
"""Changing what a module does by giving it another class.

A class and not a hook or an attribute: it is what ``fully_shard`` does too, it composes
with it and with ``torch.compile``, and isinstance still holds.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def subclass(cls: type[nn.Module], **members: Any) -> type[nn.Module]:
    """Return a subclass with the same name; one for equal arguments."""
    return _make(cls, tuple(members.items()))


@functools.cache
def _make(cls: type[nn.Module], members: tuple[tuple[str, Any], ...]) -> Any:
    as_before = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**as_before, **dict(members)})
