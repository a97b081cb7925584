# SPDX-License-Identifier: Apache-2.0
"""A gather and a weighted reduction of rows in Triton, as peers of the kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _gather(to, source, index, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    taken = tl.load(index + row).to(tl.int64)
    values = tl.load(source + taken * hidden + columns, mask=inside)
    tl.store(to + row * hidden + columns, values, mask=inside)


@triton.jit
def _reduce(to, rows, weights, index, hidden, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOPK):
        row = tl.load(index + token * TOPK + k).to(tl.int64)
        values = tl.load(rows + row * hidden + columns, mask=inside)
        total += tl.load(weights + row) * values.to(tl.float32)
    result = total.to(to.dtype.element_ty)
    tl.store(to + token * hidden + columns, result, mask=inside)


def gather(source: Tensor, index: Tensor) -> Tensor:
    """source[index]; index int32."""
    hidden = source.shape[1]
    to = source.new_empty((index.shape[0], hidden))
    grid = (index.shape[0], triton.cdiv(hidden, _BLOCK))
    with torch.cuda.device(source.device):
        _gather[grid](to, source, index, hidden, BLOCK=_BLOCK)
    return to


def reduce(rows: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """For every token the sum over k of weights[i] * rows[i], i = index[token, k]."""
    tokens, topk = index.shape
    hidden = rows.shape[1]
    to = rows.new_empty((tokens, hidden))
    grid = (tokens, triton.cdiv(hidden, _BLOCK))
    with torch.cuda.device(rows.device):
        _reduce[grid](to, rows, weights, index, hidden, TOPK=topk, BLOCK=_BLOCK)
    return to
