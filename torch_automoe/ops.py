# SPDX-License-Identifier: Apache-2.0
"""Loads ``torch.ops.automoe`` whole: with fake kernels, and the gradients made here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd

from torch_automoe.fake_kernels import is_traced, sum_type

_ops = torch.ops.automoe

# Types of rows that have a gradient.
DIFFERENTIABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# ---- the plan of the forward is the plan of the backward ----


def fingerprint(route: Tensor) -> int | None:
    """Return the hash of what all ranks have planned; None while it is traced."""
    return None if is_traced(route) else int(_ops.route_facts(route)[0])


def _check_plan(expected: int | None, route: Tensor) -> None:
    found = fingerprint(route)
    if None not in (expected, found) and expected != found:
        raise ValueError(
            "topk_ids changed between forward and recompute: the plan has the "
            f"fingerprint {found & (1 << 64) - 1:#x}, expected that of the forward, "
            f"{expected & (1 << 64) - 1:#x}; make the routing deterministic, or save "
            "the plan with torch_automoe.checkpoint_policy"
        )


def _tell_tracer(rows: Tensor, count: int) -> None:
    """Tell a tracer, to which the two are unrelated symbols, that rows has ``count``.

    Only a tracer: the check alone imports sympy, which takes seconds.
    """
    if is_traced(rows):
        torch._check(rows.shape[0] == count)


def _no_gradients(ctx: Any, first: int) -> list[None]:
    """Return None for the inputs from ``first`` on.

    The dispatcher leaves out arguments that have their default, so their number is
    known to the call alone.
    """
    return [None] * (len(ctx.needs_input_grad) - first)


# ---- dispatch ----


@dataclass
class _Sent:
    """What the backward of a dispatch has to know beside tensors."""

    group_name: str
    packed: bool
    num_rows: int  # of each x
    weights_shape: tuple[int, int] | None
    weights_dtype: torch.dtype | None
    fingerprint: int | None


def describe_dispatch(
    xs: Sequence[Tensor],
    topk_weights: Tensor | None,
    route: Tensor,
    group_name: str,
    packed: bool,
) -> _Sent:
    weighted = topk_weights is not None
    return _Sent(
        group_name,
        packed,
        xs[0].shape[0],
        tuple(topk_weights.shape) if weighted else None,
        topk_weights.dtype if weighted else None,
        fingerprint(route),
    )


def combine_gradients(
    sent: _Sent,
    route: Tensor,
    receive_index: Tensor,
    grad_rows: Sequence[Tensor | None],
    grad_weights: Tensor | None,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Send gradients back to the tokens: those of the rows summed per token.

    The gradients of weights ride with the first rows.
    """
    _check_plan(sent.fingerprint, route)
    num_tokens, topk = sent.weights_shape or (sent.num_rows, -1)
    if sent.packed and sent.weights_shape is None:
        num_tokens = -1  # that of the route
    if grad_weights is not None:
        wide = sum_type(grad_weights.dtype)
        if all(rows is None or sum_type(rows.dtype) != wide for rows in grad_rows):
            # No rows to ride with, or they would round the gradient.
            empty = grad_weights.new_empty((grad_weights.shape[0], 0), dtype=wide)
            grad_rows = [*grad_rows, empty]
    found: list[Tensor | None] = []
    found_weights = None
    for rows in grad_rows:
        if rows is None:
            found.append(None)
            continue
        fits = grad_weights is not None and (
            sum_type(rows.dtype) == sum_type(grad_weights.dtype)
        )
        out, scalars = _ops.combine(
            rows, None, grad_weights if fits else None, route, receive_index,
            sent.group_name, num_tokens, topk, sent.packed,
        )  # fmt: skip
        _tell_tracer(out, sent.num_rows)
        found.append(out)
        if fits:
            found_weights = scalars.to(sent.weights_dtype)
            grad_weights = None
    return found, found_weights


def mark_constants(
    ctx: Any, pairs: Sequence[tuple[Sequence[Tensor | None], Tensor]]
) -> None:
    """Outputs have no gradient where none of their inputs has one."""
    constants = [
        output
        for inputs, output in pairs
        if not any(it is not None and it.requires_grad for it in inputs)
    ]
    ctx.mark_non_differentiable(*constants)


def _dispatch_setup(ctx, inputs, output):
    xs, topk_weights, route, receive_index, group_name, packed = inputs
    recv, recv_weights = output
    pairs = [([x], rows) for x, rows in zip(xs, recv, strict=True)]
    mark_constants(ctx, [*pairs, ([topk_weights], recv_weights)])
    ctx.save_for_backward(route, receive_index)
    ctx.sent = describe_dispatch(xs, topk_weights, route, group_name, packed)


def _dispatch_backward(ctx, grad_recv, grad_recv_weights):
    needs_xs, needs_weights = ctx.needs_input_grad[:2]
    rows = [
        grad if need else None for grad, need in zip(grad_recv, needs_xs, strict=True)
    ]
    weights = grad_recv_weights if needs_weights else None
    found, found_weights = combine_gradients(
        ctx.sent, *ctx.saved_tensors, rows, weights
    )
    return found[: len(rows)], found_weights, *_no_gradients(ctx, 2)


register_autograd(
    "automoe::dispatch", _dispatch_backward, setup_context=_dispatch_setup
)


# ---- combine ----


@dataclass
class _Summed:
    """What the backward of a combine has to know beside tensors."""

    group_name: str
    packed: bool
    fingerprint: int | None
    weights_dtype: torch.dtype | None
    scalars_dtype: torch.dtype | None


def save_for_combine(ctx, needs_weights, rows, weights, scalars, route, index, *how):
    # The rows are read for the gradient of the weights alone.
    kept = rows if needs_weights else None
    ctx.save_for_backward(kept, weights, route, index)
    ctx.summed = _Summed(
        *how,
        fingerprint(route),
        None if weights is None else weights.dtype,
        None if scalars is None else scalars.dtype,
    )


def dispatch_gradients(
    ctx: Any, grad_out: Tensor, grad_scalars: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Send gradients to the experts' rows; those of rows, weights and scalars."""
    rows, weights, route, receive_index = ctx.saved_tensors
    summed = ctx.summed
    _check_plan(summed.fingerprint, route)
    (grad,), grad_of_scalars = _ops.dispatch(
        [grad_out], grad_scalars, route, receive_index, summed.group_name, summed.packed
    )
    if grad_scalars is not None:
        grad_of_scalars = grad_of_scalars.to(summed.scalars_dtype)
    if weights is None:
        return grad, None, grad_of_scalars
    values = grad if rows is None else rows
    grad, dots = _ops.scale_and_dot(grad, values, weights, receive_index)
    return grad, dots.to(summed.weights_dtype), grad_of_scalars


def _combine_setup(ctx, inputs, output):
    (
        rows, weights, scalars, route, receive_index, group_name, _, _, packed
    ) = inputs  # fmt: skip
    out, scalars_out = output
    mark_constants(ctx, [([rows, weights], out), ([scalars], scalars_out)])
    save_for_combine(
        ctx, ctx.needs_input_grad[1], rows, weights, scalars, route, receive_index,
        group_name, packed,
    )  # fmt: skip


def _combine_backward(ctx, grad_out, grad_scalars_out):
    needs_rows, needs_weights, needs_scalars = ctx.needs_input_grad[:3]
    grads = dispatch_gradients(
        ctx, grad_out, grad_scalars_out if needs_scalars else None
    )
    return (
        grads[0] if needs_rows else None,
        grads[1] if needs_weights else None,
        grads[2] if needs_scalars else None,
        *_no_gradients(ctx, 3),
    )


register_autograd("automoe::combine", _combine_backward, setup_context=_combine_setup)


# ---- parts of a plan ----


def _pack_rows_setup(ctx, inputs, output):
    x, routes = inputs
    ctx.save_for_backward(*routes)
    ctx.num_tokens = x.shape[0]


def _pack_rows_backward(ctx, grads):
    routes = list(ctx.saved_tensors)
    grad = _ops.reduce_partials(list(grads), routes, ctx.num_tokens)
    return grad, [None] * len(routes)


def _reduce_partials_setup(ctx, inputs, output):
    partials, routes, _ = inputs
    ctx.save_for_backward(*routes)
    ctx.counts = [partial.shape[0] for partial in partials]


def _reduce_partials_backward(ctx, grad):
    routes = list(ctx.saved_tensors)
    grads = _ops.pack_rows(grad, routes)
    for part, count in zip(grads, ctx.counts, strict=True):
        _tell_tracer(part, count)
    return grads, [None] * len(routes), None


register_autograd(
    "automoe::pack_rows", _pack_rows_backward, setup_context=_pack_rows_setup
)
register_autograd(
    "automoe::reduce_partials",
    _reduce_partials_backward,
    setup_context=_reduce_partials_setup,
)


# ---- on one rank ----


def _scale_and_dot_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _scale_and_dot_backward(ctx, grad_scaled, grad_dots):
    """Only second derivatives come here."""
    grads, values, weights, index = ctx.saved_tensors
    wide = sum_type(grads.dtype)
    real = (index >= 0).to(wide)
    shape = (-1, *[1] * (grads.dim() - 1))
    to_scaled = grad_scaled.to(wide) * real.view(shape)
    to_dots = (grad_dots * real).view(shape)
    scale = 1 if weights is None else weights.to(wide).view(shape)
    grad_weights = None
    if weights is not None:
        grad_weights = (to_scaled * grads).flatten(1).sum(1).to(weights.dtype)
    return (
        (to_scaled * scale + to_dots * values).to(grads.dtype),
        (to_dots * grads).to(values.dtype),
        grad_weights,
        None,
    )


register_autograd(
    "automoe::scale_and_dot",
    _scale_and_dot_backward,
    setup_context=_scale_and_dot_setup,
)


def _permute_setup(ctx, inputs, output):
    x, topk_ids, _, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.shape = topk_ids.shape


def _permute_backward(ctx, grad_rows, *unused):
    (index,) = ctx.saved_tensors
    return _ops.unpermute(grad_rows, None, index, *ctx.shape), *_no_gradients(ctx, 1)


def _unpermute_setup(ctx, inputs, output):
    rows, weights, index, _, topk = inputs
    needs_weights = ctx.needs_input_grad[1]
    ctx.save_for_backward(rows if needs_weights else None, weights, index)
    ctx.topk = topk


def _unpermute_backward(ctx, grad_out):
    rows, weights, index = ctx.saved_tensors
    tokens = index.clamp(min=0).div(max(ctx.topk, 1), rounding_mode="floor")
    grad = grad_out.index_select(0, tokens)
    values = grad if rows is None else rows
    # Without weights too: it clears the padding.
    grad, dots = _ops.scale_and_dot(grad, values, weights, index)
    grad_weights = dots.to(weights.dtype) if rows is not None else None
    return grad, grad_weights, *_no_gradients(ctx, 2)


register_autograd("automoe::permute", _permute_backward, setup_context=_permute_setup)
register_autograd(
    "automoe::unpermute", _unpermute_backward, setup_context=_unpermute_setup
)
