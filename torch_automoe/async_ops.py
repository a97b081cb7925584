# SPDX-License-Identifier: Apache-2.0
"""dispatch and combine of ``torch.ops.automoe`` without blocking, with gradients."""

from __future__ import annotations

import torch

from torch_automoe.fake_kernels import extension
from torch_automoe.ops import (
    combine_gradients,
    describe_dispatch,
    dispatch_gradients,
    mark_constants,
    save_for_combine,
)


class StartDispatch(torch.autograd.Function):
    """The operator dispatch without blocking; appends its Work to ``works``."""

    @staticmethod
    def forward(
        ctx, works, group_name, packed, route, receive_index, topk_weights, *xs
    ):  # fmt: skip
        work, recv, recv_weights = extension.dispatch_async(
            list(xs), topk_weights, route, receive_index, group_name, packed
        )
        works.append(work)
        ctx.save_for_backward(route, receive_index)
        pairs = [([x], rows) for x, rows in zip(xs, recv, strict=True)]
        mark_constants(ctx, [*pairs, ([topk_weights], recv_weights)])
        ctx.sent = describe_dispatch(xs, topk_weights, route, group_name, packed)
        return recv_weights, *recv

    @staticmethod
    def backward(ctx, grad_recv_weights, *grad_recv):
        _, _, _, _, _, needs_weights, *needs_xs = ctx.needs_input_grad
        rows = [
            g if need else None for g, need in zip(grad_recv, needs_xs, strict=True)
        ]
        weights = grad_recv_weights if needs_weights else None
        found, found_weights = combine_gradients(
            ctx.sent, *ctx.saved_tensors, rows, weights
        )
        return *[None] * 5, found_weights, *found[: len(rows)]


class StartCombine(torch.autograd.Function):
    """The operator combine without blocking; appends its Work to ``works``."""

    @staticmethod
    def forward(
        ctx, works, group_name, num_tokens, topk, packed, route, receive_index, weights,
        rows,
    ):  # fmt: skip
        work, out, _ = extension.combine_async(
            rows, weights, None, route, receive_index, group_name, num_tokens, topk,
            packed,
        )  # fmt: skip
        works.append(work)
        save_for_combine(
            ctx, ctx.needs_input_grad[7], rows, weights, None, route, receive_index,
            group_name, packed,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, grad_out):
        grad_rows, grad_weights, _ = dispatch_gradients(ctx, grad_out, None)
        needs_weights, needs_rows = ctx.needs_input_grad[7:]
        return (
            *[None] * 7,
            grad_weights if needs_weights else None,
            grad_rows if needs_rows else None,
        )
