# SPDX-License-Identifier: Apache-2.0
"""A shared expert that is run while the tokens of the other experts travel.

A model's block calls its experts, then its shared expert, on the same tokens. With the
experts on other ranks, the shared one can run while tokens are under way: the block is
left as it is, and gets the result that is there already when it asks for it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_automoe.parallel.subclass import subclass

# As transformers' blocks call them.
_NAMES = ("shared_experts", "shared_expert", "shared_mlp", "shared_expert_mlp")
_STATE = "_automoe_early"


class EarlyShared:
    """Runs a shared expert ahead of the call for it.

    Only for a block that calls it after the experts (``find_shared``), and its result
    counts only if it is called on the very tokens that the experts had.

    Attributes:
        hits: results that were there when they were asked for.
        misses: results that were made for nothing.
    """

    def __init__(self, block: nn.Module, shared: nn.Module) -> None:
        self.hits = self.misses = 0
        self._asked: tuple | None = None
        self._result: Tensor | None = None
        self._shared = [shared]  # in a list: not a submodule, not copied into state
        shared.__dict__[_STATE] = self
        cls = type(shared)
        members = {"forward": _forward, "_automoe_early_original": cls}
        shared.__class__ = subclass(cls, **members)
        # Also where a recompute stops early, in the middle of the block.
        block.register_forward_hook(self._forget, always_call=True)

    def begin(self, x: Tensor) -> Callable[[], None] | None:
        """Hear of the experts' tokens; return what to do while they travel."""
        return None if torch.compiler.is_compiling() else lambda: self._run(x)

    def _run(self, x: Tensor) -> None:
        self._result = self._shared[0](x)
        self._asked = _identity(x)

    def forward(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Stand in for the forward of the shared expert."""
        original = type(module)._automoe_early_original.forward
        result = self._result
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if torch.compiler.is_compiling() or result is None or not alone:
            return original(module, *args, **kwargs)
        x = args[0]
        if _identity(x) != self._asked:
            return original(module, *args, **kwargs)
        self.hits += 1
        self._asked = self._result = None
        return result.view(*x.shape[:-1], result.shape[-1])

    def _forget(self, block: nn.Module, args: tuple, result: Any) -> None:
        # A recompute that stops early has no result, and was not in vain.
        self.misses += self._result is not None and result is not None
        self._asked = self._result = None


def find_shared(block: nn.Module, experts: str) -> nn.Module | None:
    """Return the shared expert that a block calls after the child ``experts``.

    The order is read from the source of the block's forward. Not from a first call:
    a forward and its repetition by activation checkpointing have to do the same.
    """
    for name in _NAMES:
        child = getattr(block, name, None)
        if isinstance(child, nn.Module) and any(True for _ in child.parameters()):
            fits = _takes_tokens_alone(child) and _calls_in_order(block, experts, name)
            return child if fits else None
    return None


def _takes_tokens_alone(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [
        p for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    return len(needed) == 1


def _calls_in_order(block: nn.Module, first: str, second: str) -> bool:
    try:
        source = inspect.getsource(type(block).forward)
    except (OSError, TypeError):
        return False
    calls = re.findall(rf"self\.({first}|{second})\(", source)
    return calls == [first, second]


def _identity(x: Tensor) -> tuple:
    """Equal for views of the same values that differ in leading dimensions alone."""
    return x.data_ptr(), x.numel(), x.shape[-1], x.dtype, x._version


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self.__dict__[_STATE].forward(self, args, kwargs)
