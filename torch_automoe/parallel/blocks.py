# SPDX-License-Identifier: Apache-2.0
"""Blocks whose forward holds the routing, and has to be replaced with the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torch_automoe.parallel.expert_lists import (
    ExpertList,
    experts_of,
    is_container,
    is_list_of_experts,
    stacked_shapes,
    why_not_stackable,
)
from torch_automoe.parallel.families import (
    find_family_adapter,
    find_family_block,
    why_not_family,
)
from torch_automoe.parallel.probing import Routing, find_routing
from torch_automoe.parallel.subclass import subclass

_FORWARD = "_automoe_block_forward"


class Block:
    """A block that calls its experts in a way of its own.

    Attributes:
        module: the block.
        child: name of its experts; empty for a block that is refused as a whole.
        parameters: those that experts will have once the block is converted.
        note: what was found, for ``explain``.
    """

    def __init__(
        self,
        module: nn.Module,
        child: str,
        parameters: dict[str, nn.Parameter],
        *,
        forward: Callable[[nn.Module, Tensor], Any] | None = None,
        reason: str | None = None,
    ) -> None:
        self.module = module
        self.child = child
        self.parameters = parameters
        self.note: str | None = None
        self._forward = forward
        self._reason = reason

    def why_not(self) -> str | None:
        """Say why it cannot be converted; None if it can. Changes nothing."""
        if self._forward is None and self._reason is None:
            self._probe()
        return self._reason

    def _probe(self) -> None:
        child = self.child
        self._reason = why_not_stackable(getattr(self.module, child))
        if self._reason is not None:
            return
        found = find_routing(self.module, child)
        if not isinstance(found, Routing):
            self._reason = found
            return
        self.note = f"routing found by running it: {found.describe()}"
        self._forward = lambda block, x: found.run(block, x, getattr(block, child))

    def convert(self) -> nn.Module:
        """Change the block; return its experts, which an adapter knows now.

        Raises:
            ValueError: it cannot be done.
        """
        reason = self.why_not()
        if reason is not None:
            raise ValueError(reason)
        experts = getattr(self.module, self.child)
        if is_list_of_experts(experts):
            experts = ExpertList(experts)
            self.module.add_module(self.child, experts)
        self.module.__dict__[_FORWARD] = self._forward
        self.module.__class__ = subclass(type(self.module), forward=_forward)
        return experts


def find_block(module: nn.Module) -> Block | None:
    """Return a block that has to be converted; None if it is nothing of the kind."""
    if _FORWARD in module.__dict__:
        return None
    reason = why_not_family(module)
    if reason is not None:
        return Block(module, "", {}, reason=reason)
    forward = find_family_block(module)
    if forward is not None:
        wrapped = find_family_adapter(module.experts) is None
        reason = "it is wrapped in another module" if wrapped else None
        parameters = dict(module.experts.named_parameters())
        return Block(module, "experts", parameters, forward=forward, reason=reason)
    for name, child in module.named_children():
        named = "expert" in name.lower() and "shared" not in name.lower()
        if named and is_list_of_experts(child) and not is_container(child):
            return Block(module, name, stacked_shapes(experts_of(child)))
    return None


def _forward(self: nn.Module, hidden_states: Tensor) -> Any:
    return self.__dict__[_FORWARD](self, hidden_states)
