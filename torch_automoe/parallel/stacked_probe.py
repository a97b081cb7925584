# SPDX-License-Identifier: Apache-2.0
"""Whether stacked experts may be run in parts, found out by running them so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from torch_automoe.exchange import permute, unpermute

if TYPE_CHECKING:
    from torch_automoe.parallel.adapters import MoEAdapter

_TOKENS = 24
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_known: dict[tuple, str | None] = {}


@contextmanager
def as_one_of_few(module: nn.Module, num_experts: int, local: int) -> Iterator[None]:
    """Let a module think that it has this rank's experts alone.

    Attributes such as ``num_experts`` are what loops over experts count to.
    """
    named = {
        name: value
        for name, value in module.__dict__.items()
        if type(value) is int and value == num_experts and "expert" in name.lower()
    }
    # Not where traced: there an attribute that changes is a graph that breaks.
    if local == num_experts or torch.compiler.is_compiling():
        named = {}
    module.__dict__.update(dict.fromkeys(named, local))
    try:
        yield
    finally:
        module.__dict__.update(named)


def why_not_in_parts(adapter: MoEAdapter, module: nn.Module) -> str | None:
    """Say why the forward of stacked experts is not a sum over experts; None if it is.

    A few random tokens go through the forward of the class, and through the adapter
    with one half of the experts, then the other. Both have to give the same: not so
    where the forward divides weights by their sum, or mixes tokens, for example.
    Parameters are random too, for those of the module may not be set yet. Layers of
    the same class and sizes are run once.
    """
    parameters = adapter.expert_parameters(module)
    sizes = tuple((name, p.shape, p.dtype, p.device) for name, p in parameters.items())
    key = (type(module), sizes)
    if any(parameter.is_meta for parameter in parameters.values()):
        return None
    if key not in _known:
        training = module.training
        module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=_cuda(parameters)):
                _known[key] = _compare(adapter, module, parameters)
        finally:
            module.train(training)
    return _known[key]


def _cuda(parameters: dict[str, nn.Parameter]) -> list[int]:
    return sorted({p.device.index for p in parameters.values() if p.is_cuda})


def _compare(
    adapter: MoEAdapter, module: nn.Module, parameters: dict[str, nn.Parameter]
) -> str | None:
    values = {name: torch.randn_like(p) * 0.2 for name, p in parameters.items()}
    whole = _run_whole(adapter, module, values)
    if whole is None:
        return (
            "its forward did not take random tokens (T, H), topk_ids (T, K) and "
            "topk_weights (T, K) for any width H that its parameters have"
        )
    x, ids, weights, expected = whole
    try:
        got = _run_parts(adapter, module, values, x, ids, weights)
    except Exception as error:
        return (
            "its forward fails where a rank has a part of the experts: "
            f"{type(error).__name__}: {error}"
        )
    tolerance = _TOLERANCE.get(x.dtype, 5e-2)
    largest = expected.abs().max()
    if (got - expected).abs().max() > tolerance * largest:
        return (
            "its forward is not the sum over experts of weight times row, which is all "
            f"that can be dispatched: on random tokens it gave up to {largest:.3g}, "
            f"with half of the experts at a time {(got - expected).abs().max():.3g} "
            "less or more"
        )
    return None


def _run_whole(
    adapter: MoEAdapter, module: nn.Module, values: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Tokens, ids and weights that the module takes, and what it makes of them."""
    like = next(iter(values.values()))
    widths = {size for p in values.values() if p.ndim == 3 for size in p.shape[1:]}
    topk = min(2, adapter.num_experts)
    for width in sorted(widths):
        x = torch.randn(_TOKENS, width, dtype=like.dtype, device=like.device)
        scores = torch.rand(_TOKENS, adapter.num_experts, device=like.device)
        # Not so that they sum up to 1.
        weights, ids = (scores * 0.7).topk(topk)
        weights = weights.to(like.dtype)
        for pair in ((ids, weights), (weights, ids)):
            out = _attempt(_forward(adapter, module, values), x, *pair)
            if out is not None and out.shape == x.shape and out.isfinite().all():
                return x, ids, weights, out
    return None


def _forward(
    adapter: MoEAdapter, module: nn.Module, values: dict[str, Tensor]
) -> Callable[..., Tensor]:
    from torch_automoe.parallel.adapters import original_forward

    def forward(x: Tensor, *pair: Tensor) -> Tensor:
        adapter.read_call(module, (x, *pair), {})  # remembers the order
        with _reparametrize_module(module, values):
            return original_forward(module)(module, x, *pair)

    return forward


def _attempt(forward: Callable[..., Tensor], *args: Tensor) -> Tensor | None:
    try:
        out = forward(*args)
    except Exception:  # another width, or order of arguments, is the right one
        return None
    return out if isinstance(out, Tensor) else None


def _run_parts(
    adapter: MoEAdapter,
    module: nn.Module,
    values: dict[str, Tensor],
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
) -> Tensor:
    from torch_automoe.parallel.adapters import ReceivedRows

    half = -(-adapter.num_experts // 2)
    total = torch.zeros_like(x)
    for start in range(0, adapter.num_experts, half):
        end = min(start + half, adapter.num_experts)
        own = torch.where((ids >= start) & (ids < end), ids - start, -1)
        rows, how = permute(x, own, num_experts=end - start)
        of_rows = weights.flatten()[how.index]
        received = ReceivedRows(rows, of_rows, how.offsets, start)
        part = {name: value[start:end] for name, value in values.items()}
        total += unpermute(adapter.compute(module, received, part), how)
    return total
