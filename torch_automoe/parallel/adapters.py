# SPDX-License-Identifier: Apache-2.0
"""What has to be known of a kind of experts module to run it over several ranks."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from torch_automoe.exchange import permute, unpermute
from torch_automoe.grouped import grouped_mm, rows_of_experts
from torch_automoe.parallel.stacked_probe import as_one_of_few, why_not_in_parts


@dataclass(frozen=True)
class Call:
    """What a model asks of its experts in one call.

    Attributes:
        x: (T, H).
        topk_ids: (T, K) int32 or int64, -1 is none.
        topk_weights: (T, K) float, or None: all are 1.
        finish: makes of the sums (T, H) what the module returns.
        overlap: to be called once while tokens travel, or None.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor | None
    finish: Callable[[Tensor], Any]
    overlap: Callable[[], None] | None = None


@dataclass(frozen=True)
class ReceivedRows:
    """Rows that have come to the experts of this rank.

    Attributes:
        rows: (R, H), sorted by expert.
        weights: (R,) of each row, or None; set where ``MoEAdapter.weighs_rows``.
        offsets: (e,) int32, where the rows of each expert end.
        first_expert: number, among all, of this rank's first expert.
    """

    rows: Tensor
    weights: Tensor | None
    offsets: Tensor
    first_expert: int = 0

    @property
    def are_none(self) -> bool:
        """R is 0; not known, so False, where the call is traced."""
        return not torch.compiler.is_compiling() and self.rows.shape[0] == 0

    @property
    def expert_ids(self) -> Tensor:
        """(R,) int64: the expert of each row, counted on this rank."""
        experts = torch.arange(self.offsets.shape[0], device=self.offsets.device)
        return rows_of_experts(experts, self.offsets, self.rows.shape[0])


class MoEAdapter(ABC):
    """How one kind of experts module is read and run; subclass it for your own.

    An adapter belongs to one module and holds no tensors. ``module`` is passed to
    each method.

    Attributes:
        kind: what ``automoe.explain`` calls it.
        weighs_rows: ``compute`` multiplies by the routing weights itself, wherever
            the module does so; else ``combine`` does it.
        num_experts: E, of all ranks.
    """

    kind = "user adapter"
    weighs_rows = False

    def __init__(self, module: nn.Module) -> None:
        self.num_experts = common_experts(module)

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters whose dimension 0 is the experts; default: the module's own."""
        return dict(module.named_parameters(recurse=False))

    def why_not(self, module: nn.Module, ep: int) -> str | None:
        """Say why ``module`` cannot lie on ``ep`` ranks; None if it can."""
        return None

    def read_call(self, module: nn.Module, args: tuple, kwargs: dict) -> Call:
        """Find tokens, ids and weights in the arguments of ``module.forward``."""
        return read_token_call(module, args, kwargs)

    @abstractmethod
    def compute(
        self, module: nn.Module, received: ReceivedRows, parameters: dict[str, Tensor]
    ) -> Tensor:
        """Run the experts of this rank: (R, H) -> (R, H).

        Args:
            module: its forward is the original one inside this call.
            received: R may be 0.
            parameters: of ``expert_parameters``: (e, ...), e of this rank; may be 0.
        """


class StackedExperts(MoEAdapter):
    """Any module whose own parameters are all stacked by expert.

    Its forward takes tokens, ids and weights. It is run as it is, on the rows that
    have come, each with the one expert it is for and the weight it has.
    """

    kind = "stacked parameters"
    weighs_rows = True

    def why_not(self, module: nn.Module, ep: int) -> str | None:
        """As ``MoEAdapter.why_not``: found out by running it."""
        return why_not_in_parts(self, module)

    def compute(
        self, module: nn.Module, received: ReceivedRows, parameters: dict[str, Tensor]
    ) -> Tensor:
        """As ``MoEAdapter.compute``."""
        rows = received.rows
        if received.are_none:
            return touch(rows, *parameters.values())
        weights = received.weights
        if weights is None:
            weights = rows.new_ones(rows.shape[0])
        pair = [received.expert_ids[:, None], weights[:, None]]
        if not self._ids_first:
            pair.reverse()
        return self._run(module, parameters, received, rows, *pair)

    def _run(
        self,
        module: nn.Module,
        parameters: dict[str, Tensor],
        received: ReceivedRows,
        *args: Tensor,
    ) -> Tensor:
        """Call the original forward with the experts of this rank in place."""
        local = received.offsets.shape[0]
        with (
            _reparametrize_module(module, parameters),
            as_one_of_few(module, self.num_experts, local),
        ):
            return original_forward(module)(module, *args)

    def read_call(self, module: nn.Module, args: tuple, kwargs: dict) -> Call:
        """As ``MoEAdapter.read_call``; remembers the order of the arguments."""
        self._ids_first = _is_integer(bind_arguments(module, args, kwargs)[1])
        return super().read_call(module, args, kwargs)


class SortedExperts(StackedExperts):
    """Stacked experts whose forward takes sorted rows, and how many each expert has.

    The second argument is (E,) counts, or where rows end if it is called offsets.
    ``automoe.MoE`` passes tokens, ids and weights instead: a token travels once.
    """

    kind = "stacked parameters, sorted rows"
    weighs_rows = False

    def why_not(self, module: nn.Module, ep: int) -> str | None:
        """As ``MoEAdapter.why_not``: rows have one expert each, nothing is summed."""
        return None

    def read_call(self, module: nn.Module, args: tuple, kwargs: dict) -> Call:
        """As ``MoEAdapter.read_call``: one expert a row, rows beyond have none."""
        if len(args) == 3:
            x, topk_ids, topk_weights = args
            return Call(x, topk_ids, topk_weights, lambda out: out, **kwargs)
        x, counts = bind_arguments(module, args, kwargs)[:2]
        if not (_is_integer(counts) and counts.shape == (self.num_experts,)):
            raise ValueError(
                f"{type(module).__name__} was called with {_shown(x)} and "
                f"{_shown(counts)}, expected rows (R, H) and, as (E,) = "
                f"({self.num_experts},) integers, how many each expert has"
            )
        offsets = counts if self._takes_offsets(module) else counts.cumsum(0)
        ids = torch.arange(self.num_experts + 1, device=x.device)
        ids[-1] = -1
        ends = torch.cat([offsets, offsets.new_tensor([x.shape[0]])])
        ids = rows_of_experts(ids, ends, x.shape[0])[:, None]
        return Call(x, ids, None, lambda out: out)

    def compute(
        self, module: nn.Module, received: ReceivedRows, parameters: dict[str, Tensor]
    ) -> Tensor:
        """As ``MoEAdapter.compute``."""
        rows, offsets = received.rows, received.offsets
        if received.are_none:
            return touch(rows, *parameters.values())
        second = offsets
        if not self._takes_offsets(module):
            second = offsets.diff(prepend=offsets.new_zeros(1))
        return self._run(module, parameters, received, rows, second)

    @staticmethod
    def _takes_offsets(module: nn.Module) -> bool:
        return parameters_of_forward(module)[1].name in ("offsets", "offs")


class InterfaceExperts(MoEAdapter):
    """Experts of transformers that are written for its experts interface.

    The class says how its stacked parameters lie (``use_experts_implementation``), so
    each projection is one grouped product over sorted rows.
    """

    kind = "transformers experts interface"

    def why_not(self, module: nn.Module, ep: int) -> str | None:
        """As ``MoEAdapter.why_not``."""
        for name, child in module.named_children():
            shapes = {key: tuple(p.shape) for key, p in child.named_parameters()}
            if shapes:
                return (
                    f"its {name} has parameters that all experts share, {shapes}: "
                    "each rank would have a gradient of its own for them"
                )
        return None

    def read_call(self, module: nn.Module, args: tuple, kwargs: dict) -> Call:
        """As ``MoEAdapter.read_call``; an id of E or more is none in transformers."""
        call = super().read_call(module, args, kwargs)
        none = call.topk_ids >= self.num_experts
        return replace(call, topk_ids=call.topk_ids.masked_fill(none, -1))

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """As ``MoEAdapter.expert_parameters``."""
        return {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if name.split("_bias")[0] in ("gate_up_proj", "up_proj", "down_proj")
        }

    def compute(
        self, module: nn.Module, received: ReceivedRows, parameters: dict[str, Tensor]
    ) -> Tensor:
        """As ``MoEAdapter.compute``."""
        rows, offsets = received.rows, received.offsets

        def project(x: Tensor, name: str) -> Tensor:
            weight = parameters[name]
            if not module.is_transposed:
                weight = weight.transpose(1, 2)
            bias = parameters[f"{name}_bias"] if module.has_bias else None
            return grouped_mm(x, weight, offsets, bias)

        if module.has_gate:
            hidden = module._apply_gate(project(rows, "gate_up_proj"))
        else:
            hidden = module.act_fn(project(rows, "up_proj"))
        out = project(hidden, "down_proj")
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
        return out.to(rows.dtype)


_registered: dict[type[nn.Module], type[MoEAdapter]] = {}


def register_moe_adapter(
    module_class: type[nn.Module], adapter: type[MoEAdapter]
) -> None:
    """Say how experts modules of a class, and of its subclasses, are run.

    Raises:
        ValueError: an argument is not such a class.
    """
    for name, got, base in (
        ("module_class", module_class, nn.Module),
        ("adapter", adapter, MoEAdapter),
    ):
        if not (isinstance(got, type) and issubclass(got, base)):
            raise ValueError(
                f"{name} is {got!r}, expected a subclass of {base.__name__}"
            )
    _registered[module_class] = adapter


def find_adapter(module: nn.Module) -> type[MoEAdapter] | None:
    """Return the adapter class for an experts module; None if it is not one."""
    # These build on this module.
    from torch_automoe.parallel.expert_lists import find_list_adapter
    from torch_automoe.parallel.families import find_family_adapter

    for base in type(module).__mro__:
        if base in _registered:
            return _registered[base]
    found = find_family_adapter(module) or find_list_adapter(module)
    if found is not None:
        return found
    if uses_experts_interface(module):
        return InterfaceExperts
    return _stacked_adapter(module) if is_stacked(module) else None


def _stacked_adapter(module: nn.Module) -> type[MoEAdapter] | None:
    """Tell tokens, ids and weights from sorted rows and counts by the arguments.

    Other modules have stacked matrices and three arguments too, so something has to be
    called as experts or their choice are.
    """
    names = [parameter.name for parameter in parameters_of_forward(module)]
    spoken = " ".join([type(module).__name__, *names]).lower()
    if not re.search("expert|moe|top_?k|rout", spoken):
        return None
    if len(names) == 3:
        return StackedExperts
    counts = r"count|size|offs|split|lens|lengths|num_tokens|tokens_per"
    if len(names) == 2 and re.search(counts, names[1]):
        return SortedExperts
    return None


def run_on_this_rank(
    adapter: MoEAdapter, module: nn.Module, args: tuple, kwargs: dict
) -> Any:
    """Run a module that has all experts; ``torch.distributed`` is not needed."""
    call = adapter.read_call(module, args, kwargs)
    rows, how = permute(call.x, call.topk_ids, num_experts=adapter.num_experts)
    weights = call.topk_weights
    if weights is not None:
        weights = weights.flatten()[how.index]
    weighs = adapter.weighs_rows
    received = ReceivedRows(rows, weights if weighs else None, how.offsets)
    out = adapter.compute(module, received, adapter.expert_parameters(module))
    return call.finish(unpermute(out, how, None if weighs else weights))


def uses_experts_interface(module: nn.Module) -> bool:
    """Return whether transformers' decorator has been applied to the class."""
    return all(
        hasattr(module, name)
        for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    )


def is_stacked(module: nn.Module) -> bool:
    """Return whether a module looks like stacked experts.

    All of its parameters are its own and share dimension 0, and one at least has
    three dimensions.
    """
    own = list(module.parameters(recurse=False))
    if not any(parameter.ndim == 3 for parameter in own):
        return False
    if len(own) != len(list(module.parameters())):
        return False
    return len({parameter.shape[:1] for parameter in own}) == 1


def common_experts(module: nn.Module) -> int:
    """E of stacked parameters.

    Raises:
        ValueError: dimension 0 of the parameters differs.
    """
    sizes = {
        name: parameter.shape[0]
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"dimension 0 of its parameters is {sizes}, expected one number of experts"
        )
    return next(iter(sizes.values()))


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the class that the module had before ``parallelize``."""
    cls = type(module)
    original = getattr(cls, "_automoe_original", cls)
    return original.forward


def read_token_call(module: nn.Module, args: tuple, kwargs: dict) -> Call:
    """Read (tokens, ids, weights), ids and weights in any order.

    All may have the same leading dimensions instead of one of T tokens.

    Raises:
        ValueError: there are no such arguments.
    """
    values = bind_arguments(module, args, kwargs)
    x, *pair = values[:3]
    ids = next((value for value in pair if _is_integer(value)), None)
    weights = next((value for value in pair if _is_floating(value)), None)
    fits = ids is not None and (weights is None or weights.shape == ids.shape)
    if not _is_floating(x) or not fits or ids.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{type(module).__name__} was called with "
            f"({', '.join(map(_shown, values))}), expected tokens (T, H), topk_ids "
            "(T, K) int32 or int64 and topk_weights (T, K); write an adapter "
            "(automoe.register_moe_adapter) for another call"
        )
    shape, topk = x.shape, ids.shape[-1]
    # Not a view: blocks add to the result in place, and on a view that would drop the
    # hook by which FSDP knows of the backward.
    return Call(
        x.reshape(-1, shape[-1]),
        ids.reshape(-1, topk),
        None if weights is None else weights.reshape(-1, topk),
        lambda out: out if len(shape) == 2 else torch.ops.aten._unsafe_view(out, shape),
    )


def touch(out: Tensor, *parameters: Tensor) -> Tensor:
    """Give parameters that ``out`` does not depend on a gradient of zero, not none.

    FSDP, gradient clipping and optimizers have to do the same on all ranks.
    """
    needing = [p for p in parameters if p.requires_grad]
    if not torch.is_grad_enabled() or not needing:
        return out
    return _Touch.apply(out, *needing)


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *parameters: Tensor) -> Tensor:
        # Not the parameters: their memory may be freed before the backward.
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device)
            for shape, dtype, device in ctx.like
        )
        return grad, *zeros


def bind_arguments(module: nn.Module, args: tuple, kwargs: dict) -> list[Any]:
    """Arguments of a call in the order of the module's forward, three at least."""
    names = [parameter.name for parameter in parameters_of_forward(module)]
    values = list(args)
    values += [kwargs[name] for name in names[len(args) :] if name in kwargs]
    return values + [None] * (3 - len(values))


def parameters_of_forward(module: nn.Module) -> list[inspect.Parameter]:
    forward = inspect.unwrap(original_forward(module))
    return list(inspect.signature(forward).parameters.values())[1:]


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return repr(value)
