# SPDX-License-Identifier: Apache-2.0
"""Loads ``torch.ops.automoe`` and tells a tracer the shapes of what they return.

The schemas, with all shapes and dtypes, are in csrc/moe_ops/library.cpp. Sizes that
depend on routing are new symbolic sizes. A route is on the CPU wherever the other
tensors are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.library import get_ctx, register_fake

from torch_automoe import _loader

extension = _loader.load()


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which values of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def num_local_experts(num_experts: int, rank: int, size: int) -> int:
    """Return how many experts a rank has: those that DTensor's Shard(0) gives it."""
    chunk = -(-num_experts // size)
    return max(0, min(chunk, num_experts - rank * chunk))


def is_traced(tensor: Tensor) -> bool:
    """Return whether a tensor has no values to read: it is fake, or being traced."""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor


def _int32(like: Tensor, count: Any) -> Tensor:
    return like.new_empty(count, dtype=torch.int32)


def _route(like: Tensor) -> Tensor:
    return like.new_empty(_new_size(), dtype=torch.int32, device="cpu")


def _new_size() -> Any:
    return get_ctx().new_dynamic_size()


@register_fake("automoe::plan")
def _plan_fake(
    topk_ids, num_experts, group_name, align=1, max_recv_tokens=-1, reduction_map=()
):
    group = _resolve_process_group(group_name)
    local = num_local_experts(num_experts, group.rank(), group.size())
    route = _route(topk_ids)
    num_rows = _new_size() if max_recv_tokens == -1 else max_recv_tokens
    return (
        route,
        _int32(topk_ids, num_rows),
        _int32(topk_ids, local),
        _int32(topk_ids, local),
    )


@register_fake("automoe::plan_part")
def _plan_part_fake(route, offsets, part, num_parts):
    return (
        _route(route),
        _int32(offsets, _new_size()),
        torch.empty_like(offsets),
        torch.empty_like(offsets),
    )


@register_fake("automoe::route_facts")
def _route_facts_fake(route):
    return route.new_empty(16, dtype=torch.int64)


@register_fake("automoe::route_reduction_map")
def _route_reduction_map_fake(route):
    return _int32(route, _new_size())


@register_fake("automoe::dispatch")
def _dispatch_fake(xs, topk_weights, route, receive_index, group_name, packed=False):
    num_rows = receive_index.shape[0]
    recv = [x.new_empty((num_rows, *x.shape[1:])) for x in xs]
    if topk_weights is None:
        return recv, xs[0].new_empty(0, dtype=torch.float32)
    return recv, topk_weights.new_empty(num_rows)


@register_fake("automoe::combine")
def _combine_fake(
    rows, weights, scalars, route, receive_index, group_name, num_tokens, topk,
    packed=False,
):  # fmt: skip
    count = _new_size() if packed else num_tokens
    shape = (0,) if scalars is None else (num_tokens, topk)
    out = rows.new_empty((count, *rows.shape[1:]))
    return out, rows.new_empty(shape, dtype=sum_type(rows.dtype))


@register_fake("automoe::pack_rows")
def _pack_rows_fake(x, routes):
    return [x.new_empty((_new_size(), *x.shape[1:])) for _ in routes]


@register_fake("automoe::reduce_partials")
def _reduce_partials_fake(partials, routes, num_tokens):
    return partials[0].new_empty((num_tokens, *partials[0].shape[1:]))


@register_fake("automoe::scale_and_dot")
def _scale_and_dot_fake(grads, values, weights, index):
    dots = grads.new_empty(grads.shape[0], dtype=sum_type(grads.dtype))
    return grads.new_empty(grads.shape), dots


@register_fake("automoe::permute")
def _permute_fake(x, topk_ids, num_experts, align=1):
    num_rows = _new_size()
    return (
        x.new_empty((num_rows, *x.shape[1:])),
        _int32(topk_ids, num_rows),
        _int32(topk_ids, num_experts),
        _int32(topk_ids, num_experts),
    )


@register_fake("automoe::unpermute")
def _unpermute_fake(rows, weights, index, num_tokens, topk):
    return rows.new_empty((num_tokens, *rows.shape[1:]))
