# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens to their experts and back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torch_automoe import async_ops, ops
from torch_automoe.fake_kernels import extension
from torch_automoe.routing import Plan, has_values

Rows = Tensor | tuple[Tensor, ...]
Result = TypeVar("Result")
_ops = torch.ops.automoe
# Overloads, not packets: for small calls it shows that none has to be chosen.
_dispatch, _combine = _ops.dispatch.default, _ops.combine.default


def _graph_for(plan: Plan, *tensors: Tensor | None) -> AbstractContextManager[object]:
    """Skip the making of a graph, which takes longer than a small call, if none is."""
    needed = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    if needed or not has_values(plan):
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


@dataclass(frozen=True)
class Pending(Generic[Result]):
    """The outcome of a call with ``async_op=True``; inputs must not change until then.

    It may be dropped without ``wait``.
    """

    _work: dist.Work | None
    _result: Result

    def wait(self) -> Result:
        """Block until the call is done; return what it gives without ``async_op``.

        Raises:
            torch.distributed.DistBackendError: the communication failed.
        """
        if self._work is not None:
            self._work.wait()
        return self._result


def dispatch(
    x: Tensor | Sequence[Tensor],
    topk_weights: Tensor | None,
    plan: Plan,
    *,
    async_op: bool = False,
) -> tuple[Rows, Tensor | None] | Pending[tuple[Rows, Tensor | None]]:
    """Send the rows of tokens to their experts; collective over the plan's group.

    Differentiable in ``x`` (where it is float64, float32, bfloat16 or float16) and in
    ``topk_weights``; the backward is collective too, so ranks must agree about what
    requires a gradient.

    Args:
        x: (T, ...) of any type, or several such that travel side by side (fp8 rows and
            their scales). Trailing shapes and types are the same on all ranks.
        topk_weights: (T, K) float, or None.
        plan: made of the ids of these tokens.
        async_op: return a ``Pending`` at once; its backward blocks.

    Returns:
        recv_x (R, ...), or a tuple as ``x`` is: rows sorted by (local expert, source
        rank, source row), padding is zero; recv_weights (R,), or None.

    Raises:
        ValueError: ``x`` or ``topk_weights`` does not fit the plan, or to other ranks.
        torch.distributed.DistBackendError: the communication failed.
    """
    xs = [x] if isinstance(x, Tensor) else list(x)
    for number, rows in enumerate(xs):
        _check_device(f"x[{number}]", rows, plan)
        _check_differentiable(f"x[{number}]", rows, plan)
    pending = start_dispatch(xs, topk_weights, plan, blocking=not async_op)
    recv, recv_weights = pending._result
    rows = recv[0] if isinstance(x, Tensor) else recv
    pending = Pending(pending._work, (rows, recv_weights))
    return pending if async_op else pending.wait()


def combine(
    expert_out: Tensor,
    plan: Plan,
    weights: Tensor | None = None,
    *,
    async_op: bool = False,
) -> Tensor | Pending[Tensor]:
    """Sum the experts' rows of every token; collective over the plan's group.

    Sums are taken in float32 (float64 for float64) in an order that the plan's
    reduction map fixes, so their bits do not depend on how they travel.
    Differentiable in ``expert_out`` and ``weights``, by a collective backward: rows
    must require a gradient on all ranks or on none.

    Args:
        expert_out: (R, H) float64, float32, bfloat16 or float16, rows as ``dispatch``
            gave them; those of padding are not read.
        plan: of that dispatch.
        weights: (R,) of each row, as ``dispatch`` gave them; None: all are 1.
        async_op: return a ``Pending`` at once; its backward blocks.

    Returns:
        (T, H) of the type of ``expert_out``; zeros for a token without experts.

    Raises:
        ValueError: an argument does not fit the plan, or to other ranks.
        torch.distributed.DistBackendError: the communication failed.
    """
    _check_device("expert_out", expert_out, plan)
    pending = start_combine(expert_out, plan, weights, blocking=not async_op)
    return pending if async_op else pending.wait()


def start_dispatch(
    xs: list[Tensor],
    topk_weights: Tensor | None,
    plan: Plan,
    *,
    packed: bool = False,
    blocking: bool = False,
) -> Pending[tuple[tuple[Tensor, ...], Tensor | None]]:
    """Post a dispatch; ``packed``: of send rows, as the operators have it."""
    if blocking or not has_values(plan):
        with _graph_for(plan, topk_weights, *xs):
            recv, recv_weights = _dispatch(
                xs,
                topk_weights,
                plan.route,
                plan.receive_index,
                plan.group_name,
                packed,
            )
        work = None
    else:
        works: list[dist.Work] = []
        recv_weights, *recv = async_ops.StartDispatch.apply(
            works,
            plan.group_name,
            packed,
            plan.route,
            plan.receive_index,
            topk_weights,
            *xs,
        )
        work = works[0]
    weights = None if topk_weights is None else recv_weights
    return Pending(work, (tuple(recv), weights))


def start_combine(
    rows: Tensor,
    plan: Plan,
    weights: Tensor | None,
    *,
    packed: bool = False,
    blocking: bool = False,
) -> Pending[Tensor]:
    """Post a combine; ``packed``: to send rows, as the operators have it."""
    if blocking or not has_values(plan):
        with _graph_for(plan, rows, weights):
            out, _ = _combine(
                rows,
                weights,
                None,
                plan.route,
                plan.receive_index,
                plan.group_name,
                plan.num_tokens,
                plan.topk,
                packed,
            )
        return Pending(None, out)
    works: list[dist.Work] = []
    out = async_ops.StartCombine.apply(
        works,
        plan.group_name,
        plan.num_tokens,
        plan.topk,
        packed,
        plan.route,
        plan.receive_index,
        weights,
        rows,
    )
    return Pending(works[0], out)


@dataclass(frozen=True)
class Permutation:
    """How ``permute`` has sorted rows.

    Attributes:
        index: (R,) int32, the pick token * K + k of each row, -1 for padding.
        num_tokens_per_expert: (E,) int32.
        offsets: (E,) int32, where each expert's rows end.
        num_tokens: T.
        topk: K.
    """

    index: Tensor
    num_tokens_per_expert: Tensor
    offsets: Tensor
    num_tokens: int
    topk: int


def permute(
    x: Tensor, topk_ids: Tensor, *, num_experts: int, align: int = 1
) -> tuple[Tensor, Permutation]:
    """Sort the rows of tokens by expert, on this rank alone; differentiable in ``x``.

    Args:
        x: (T, ...) of any type.
        topk_ids: (T, K) int32 or int64, -1 is none.
        num_experts: E.
        align: begin the rows of each expert at a multiple of this.

    Returns:
        rows (R, ...) sorted by (expert, token, k), padding is zero, and how.

    Raises:
        ValueError: an argument has another shape or type, or an id is not in [-1, E).
    """
    _check_differentiable("x[0]", x, None)
    rows, *how = _ops.permute(x, topk_ids, num_experts, align)
    return rows, Permutation(*how, *topk_ids.shape)


def unpermute(
    rows: Tensor, permutation: Permutation, weights: Tensor | None = None
) -> Tensor:
    """Sum the rows of every token, on this rank alone; differentiable.

    Args:
        rows: (R, H) float64, float32, bfloat16 or float16, sorted as ``permute`` did.
        weights: (R,) of each row; None: all are 1. Weights (T, K) of tokens become
            these by ``weights.flatten()[permutation.index]``.

    Returns:
        (T, H): weighted sums, taken in float32 (float64 for float64).

    Raises:
        ValueError: an argument has another shape or type, or, on the CPU, an index is
            out of range. That is not checked on CUDA, as it would wait for the GPU:
            there the row is left out, as padding is.
    """
    how = permutation
    return _ops.unpermute(rows, weights, how.index, how.num_tokens, how.topk)


def _check_differentiable(name: str, x: Tensor, plan: Plan | None) -> None:
    if x.requires_grad and x.dtype not in ops.DIFFERENTIABLE:
        _refuse(
            plan,
            f"{name} is {x.dtype} and requires a gradient, expected a type "
            "that rows can be summed in: float64, float32, bfloat16 or float16",
        )


def _check_device(name: str, tensor: Tensor, plan: Plan) -> None:
    device = plan.receive_index.device
    if tensor.device != device:
        _refuse(
            plan, f"{name} is on {tensor.device}, expected {device}, where the plan is"
        )


def _refuse(plan: Plan | None, text: str) -> NoReturn:
    """Raise ValueError, on every rank if there is a plan and others make the call."""
    if plan is not None and has_values(plan):
        extension.refuse(plan.group_name, text)
    raise ValueError(text)
