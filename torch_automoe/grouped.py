# SPDX-License-Identifier: Apache-2.0
"""Matrix products of sorted rows with the weights of their experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(
    rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiply the rows of each expert by its matrix; differentiable.

    An expert without rows gets a gradient of zero, not none. Under autocast the
    product is taken in the type of autocast, elsewhere in that of ``weight``.

    Args:
        rows: (R, I) float, sorted by expert.
        weight: (e, I, O), possibly a transposed view.
        offsets: (e,) int32, where the rows of each expert end.
        bias: (e, O), added to the rows of each expert; or None.

    Returns:
        (R, O); zeros for rows beyond the last offset.
    """
    device = rows.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    out = _grouped_mm(rows.to(dtype), weight.to(dtype), offsets)
    if bias is None:
        return out
    return out + rows_of_experts(bias.to(dtype), offsets, out.shape[0])


def rows_of_experts(values: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """Give each row the value of its expert, or zero: (e, ...) -> (R, ...)."""
    row = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets, row, right=True)
    # Rows beyond the last offset are padding: zeros.
    return torch.cat([values, values.new_zeros(1, *values.shape[1:])])[expert]


@torch.library.custom_op("automoe::grouped_mm", mutates_args=())
def _grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weight, offs=offsets)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    start = 0
    for matrix, end in zip(weight.unbind(), offsets.tolist(), strict=True):
        torch.mm(rows[start:end], matrix, out=out[start:end])
        start = end
    out[start:].zero_()
    return out


@_grouped_mm.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.custom_op("automoe::grouped_mm_weight_grad", mutates_args=())
def _weight_grad(rows: Tensor, grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    # As weight lies in memory, also where it is a transposed view.
    out = torch.empty_like(weight)
    start = 0
    for matrix, end in zip(out.unbind(), offsets.tolist(), strict=True):
        if start == end:
            matrix.zero_()
        else:
            torch.mm(rows[start:end].t(), grad[start:end], out=matrix)
        start = end
    return out


@_weight_grad.register_fake
def _(rows: Tensor, grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    rows_grad = weight_grad = None
    if ctx.needs_input_grad[0]:
        rows_grad = _grouped_mm(grad, weight.transpose(1, 2), offsets)
    if ctx.needs_input_grad[1]:
        weight_grad = _weight_grad(rows, grad, weight, offsets)
    return rows_grad, weight_grad, None


_grouped_mm.register_autograd(_backward, setup_context=_save)
