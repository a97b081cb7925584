# SPDX-License-Identifier: Apache-2.0
"""Lists of like experts: their parameters are stacked, one of them runs for all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from torch_automoe.parallel.adapters import (
    Call,
    MoEAdapter,
    ReceivedRows,
    bind_arguments,
    original_forward,
    parameters_of_forward,
    read_token_call,
    run_on_this_rank,
    touch,
)

_STATE = "_automoe_list"
_Scalar = bool | int | float | str | bytes | None | torch.dtype


@dataclass
class _Stacked:
    """What a holder of stacked parameters keeps beside them.

    Attributes:
        template: an expert; its submodules are children of the holder, so that it has
            the stacked parameters but for the moment in which it runs for one expert.
        keys: names that the experts had as children.
    """

    template: nn.Module
    keys: list[str]


class ExpertList(nn.Module):
    """E like experts with stacked parameters, in place of a list of modules.

    Parameters are called as those of one expert and have E as dimension 0.
    """

    def __init__(self, experts: nn.ModuleList | nn.ModuleDict) -> None:
        super().__init__()
        stack_experts(self, experts_of(experts))

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Weighted sums (T, H) for tokens (T, H), ids and weights (T, K)."""
        args = (x, topk_ids, topk_weights)
        return run_on_this_rank(ListExperts(self), self, args, {})

    def extra_repr(self) -> str:
        """How many experts there are, on all ranks."""
        return f"num_experts={len(self.__dict__[_STATE].keys)}"


class ListExperts(MoEAdapter):
    """Stacked experts of which each is run by itself."""

    kind = "list of experts"

    def __init__(self, module: nn.Module) -> None:
        state = module.__dict__.get(_STATE)
        self.num_experts = len(state.keys if state else experts_of(module))

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """As ``MoEAdapter.expert_parameters``; on the meta device before stacking."""
        if _STATE in module.__dict__:
            return dict(module.named_parameters())
        return stacked_shapes(experts_of(module))

    def compute(
        self, module: nn.Module, received: ReceivedRows, parameters: dict[str, Tensor]
    ) -> Tensor:
        """As ``MoEAdapter.compute``."""
        calls = _calls_of_experts(module, parameters)
        outputs = []
        start = 0
        for call, end in zip(calls, received.offsets.tolist(), strict=True):
            if end > start:
                outputs.append(call(received.rows[start:end]))
            start = end
        if outputs:
            # Parameters of the others have a gradient of zero, as parts of the same.
            return torch.cat(outputs)
        return touch(received.rows, *parameters.values())


class ContainerExperts(ListExperts):
    """A list of experts with a forward of its own, which stays the one that runs.

    The forward takes tokens, ids and weights; ids may be one-hot, (T, K, E).
    """

    kind = "list of experts with its own forward"
    weighs_rows = True

    def read_call(self, module: nn.Module, args: tuple, kwargs: dict) -> Call:
        """As ``MoEAdapter.read_call``; remembers how ids were given."""
        values = bind_arguments(module, args, kwargs)
        second = values[1]
        self._ids_first = isinstance(second, Tensor) and not second.is_floating_point()
        ids = values[1] if self._ids_first else values[2]
        self._one_hot = (
            isinstance(ids, Tensor) and ids.ndim == values[0].ndim + 1
        ) and ids.shape[-1] == self.num_experts
        if self._one_hot:
            chosen = ids.argmax(-1).masked_fill(ids.sum(-1) == 0, -1)
            values[1 if self._ids_first else 2] = chosen
        return read_token_call(module, tuple(values[:3]), {})

    def compute(
        self, module: nn.Module, received: ReceivedRows, parameters: dict[str, Tensor]
    ) -> Tensor:
        """As ``MoEAdapter.compute``."""
        rows, weights = received.rows, received.weights
        if received.are_none:
            return touch(rows, *parameters.values())
        if weights is None:
            weights = rows.new_ones(rows.shape[0])
        # Experts are known to the module by their number among all, so they keep it.
        first = received.first_expert
        ids = received.expert_ids[:, None] + first
        if self._one_hot:
            ids = nn.functional.one_hot(ids, self.num_experts)
        pair = [ids, weights[:, None]]
        if not self._ids_first:
            pair.reverse()
        with _experts_as_children(module, parameters, first):
            return original_forward(module)(module, rows, *pair)


def experts_of(module: nn.Module) -> dict[str, nn.Module]:
    """The experts in a list: its children of the most frequent class."""
    by_class: dict[type[nn.Module], dict[str, nn.Module]] = {}
    # Not named_children, which leaves out a module that is there twice.
    for name, child in module._modules.items():
        by_class.setdefault(type(child), {})[name] = child
    return max(by_class.values(), key=len, default={})


def is_list_of_experts(module: nn.Module) -> bool:
    """Return whether a module is a list of two or more modules of one class."""
    return (
        isinstance(module, nn.ModuleList | nn.ModuleDict)
        and len(experts_of(module)) > 1
        and any(True for _ in module.parameters())
    )


def is_container(module: nn.Module) -> bool:
    """Return whether a list of experts has a forward of its own, stacked or not."""
    if isinstance(module, ExpertList):
        return False
    if _STATE in module.__dict__:
        return True
    named = re.search("expert|moe", type(module).__name__.lower())
    has_forward = type(module).forward is not nn.Module.forward
    return bool(named) and has_forward and is_list_of_experts(module)


def find_list_adapter(module: nn.Module) -> type[MoEAdapter] | None:
    """Return the adapter of a list that has a forward, or of stacked experts."""
    if isinstance(module, ExpertList):
        return ListExperts
    return ContainerExperts if is_container(module) else None


def why_not_stackable(module: nn.Module) -> str | None:
    """Say why the experts in a list cannot be run by one of them; None if they can."""
    arguments = [parameter.name for parameter in parameters_of_forward(module)]
    if is_container(module) and len(arguments) != 3:
        return (
            f"its forward takes {', '.join(arguments)}, expected tokens, topk_ids and "
            "topk_weights"
        )
    experts = experts_of(module)
    template = next(iter(experts.values()))
    names = [name for name, _ in template.named_parameters(remove_duplicate=False)]
    parameters = {id(p) for expert in experts.values() for p in expert.parameters()}
    if len(parameters) != len(names) * len(experts):
        return "its experts share parameters with each other"
    for name, child in module.named_children():
        if name not in experts and any(True for _ in child.parameters()):
            return f"its child {name} is no expert and has parameters"
    for name, expert in experts.items():
        if any(True for _ in expert.buffers()):
            return f"its expert {name} has buffers, which cannot be stacked"
        if any(m._forward_hooks or m._forward_pre_hooks for m in expert.modules()):
            return f"its expert {name} has hooks, which would be lost"
        if _description(expert) != _description(template):
            return f"its expert {name} is not like its first one"
    return None


def _description(expert: nn.Module) -> tuple:
    """All that makes two experts alike, but for the values of parameters."""
    parameters = tuple(
        (name, p.shape, p.dtype, p.device, p.requires_grad)
        for name, p in expert.named_parameters()
    )
    attributes = tuple(
        (name, key, value)
        for name, child in expert.named_modules()
        for key, value in child.__dict__.items()
        if isinstance(value, _Scalar) and key != "training"
    )
    return repr(expert), parameters, attributes


def stacked_shapes(experts: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters as they will be once stacked, on the meta device."""
    first = next(iter(experts.values()))
    return {
        name: nn.Parameter(
            torch.empty(len(experts), *p.shape, dtype=p.dtype, device="meta"),
            requires_grad=p.requires_grad,
        )
        for name, p in first.named_parameters()
    }


def stack_experts(holder: nn.Module, experts: dict[str, nn.Module]) -> None:
    """Give ``holder`` the stacked parameters of ``experts`` in place of the experts."""
    template, *others = experts.values()
    for key in experts:
        holder._modules.pop(key, None)
    for name, parameter in list(template.named_parameters()):
        parts = [parameter, *(other.get_parameter(name) for other in others)]
        stacked = nn.Parameter(
            torch.stack([part.detach() for part in parts]),
            requires_grad=parameter.requires_grad,
        )
        path, _, leaf = name.rpartition(".")
        # The same module as below ``holder``, unless the parameter is its own.
        owner = template.get_submodule(path) if path else holder
        owner.register_parameter(leaf, stacked)
        if not path:
            # Only its place is needed, not the memory.
            template.register_parameter(leaf, nn.Parameter(parameter.to("meta")))
        for other in others:
            del other.get_submodule(path)._parameters[leaf]
    for name, child in template.named_children():
        holder.add_module(name, child)
    holder.__dict__[_STATE] = _Stacked(template, list(experts))


def names_in_lists(model: nn.Module) -> dict[str, list[str]]:
    """Name of each parameter that was stacked -> its names in the list of experts."""
    names = {}
    for path, holder in model.named_modules():
        state = holder.__dict__.get(_STATE)
        if state is None:
            continue
        start = f"{path}." if path else ""
        for leaf, _ in holder.named_parameters():
            names[start + leaf] = [f"{start}{key}.{leaf}" for key in state.keys]
    return names


def stack_container(module: nn.Module) -> None:
    """Stack the experts of a list that has a forward of its own; else do nothing."""
    if is_container(module) and _STATE not in module.__dict__:
        stack_experts(module, experts_of(module))


def _calls_of_experts(
    holder: nn.Module, parameters: dict[str, Tensor]
) -> list[Callable[[Tensor], Tensor]]:
    """A callable for each expert of this rank."""
    template = holder.__dict__[_STATE].template
    template.training = holder.training

    def bind(own: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        def call(rows: Tensor) -> Tensor:
            with _reparametrize_module(template, own):
                return template(rows)

        return call

    parts = [parameter.unbind() for parameter in parameters.values()]
    return [bind(dict(zip(parameters, own, strict=True))) for own in zip(*parts)]  # noqa: B905


@contextmanager
def _experts_as_children(
    holder: nn.Module, parameters: dict[str, Tensor], first: int
) -> Iterator[None]:
    """Let ``holder`` look as it did with its experts, for one forward."""
    calls = _calls_of_experts(holder, parameters)
    children = holder._modules
    experts: dict[str, Any] = {}
    for number, key in enumerate(holder.__dict__[_STATE].keys):
        own = 0 <= number - first < len(calls)
        experts[key] = calls[number - first] if own else _call_without_rows
    holder._modules = {**experts, **children}
    try:
        yield
    finally:
        holder._modules = children


def _call_without_rows(rows: Tensor) -> Tensor:
    """Stand in for an expert of another rank, which has no rows here."""
    if rows.shape[0]:
        raise RuntimeError(
            f"{rows.shape[0]} rows were given to an expert of another rank: the "
            "forward of the list of experts chooses experts in some other way than by "
            "its ids"
        )
    return rows
