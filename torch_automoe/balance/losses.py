# SPDX-License-Identifier: Apache-2.0
"""Losses that keep experts evenly used, as pure functions, and how they are added.

Letters: T tokens of this rank, K experts per token, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from torch_automoe.balance.counts import count_tokens


def load_balancing_loss(
    probabilities: Tensor, topk_ids: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return E * sum_i f_i P_i, which is 1 where experts are used evenly.

    f_i is the share of all picks that went to expert i, P_i the mean probability of
    expert i ("Switch Transformers", 2021, equations 4 to 6, over K picks a token). The
    gradient is that of P.

    Args:
        probabilities: (T, E) float, rows sum to 1; T may be 0: the loss is then 0.
        topk_ids: (T, K) int, -1 is none and counts for nothing.
        group: take f over the tokens of all ranks of this group, by an all-reduce of E
            numbers: balance within the global batch, which lets experts specialise
            ("Demons in the Detail", 2025). With equally many tokens on each rank, the
            mean of the ranks' losses is the loss of the global batch. None: this
            rank's tokens.

    Returns:
        a scalar of the type of ``probabilities``.

    Raises:
        ValueError: a shape is not as above.
    """
    num_tokens, num_experts = _checked(probabilities, topk_ids)
    counts = count_tokens(topk_ids, num_experts)
    if group is not None:
        counts = funcol.all_reduce(counts, "sum", group)
    share = counts.to(probabilities.dtype) / counts.sum().clamp(min=1)
    mean = probabilities.sum(0) / max(num_tokens, 1)
    return num_experts * (share * mean).sum()


def sequence_balance_loss(
    probabilities: Tensor, topk_ids: Tensor, num_sequences: int
) -> Tensor:
    """Return the mean over sequences of the loss above, taken within each sequence.

    "DeepSeek-V3 Technical Report" (2024), section 2.1.2, equations 17 to 20, without
    its factor alpha. It is 1 where each sequence uses the experts evenly, and needs no
    communication.

    Args:
        probabilities: (T, E) float, rows sum to 1 (scores of a sigmoid divided by the
            sum of their row); the tokens of one sequence are adjacent.
        topk_ids: (T, K) int, -1 is none and counts for nothing.
        num_sequences: B, all of T / B tokens; may be 0: the loss is then 0.

    Returns:
        a scalar of the type of ``probabilities``.

    Raises:
        ValueError: a shape is not as above, or B does not divide T.
    """
    num_tokens, num_experts = _checked(probabilities, topk_ids)
    if num_tokens == 0:
        return probabilities.sum()
    if num_sequences < 1 or num_tokens % num_sequences:
        raise ValueError(
            f"num_sequences is {num_sequences}, expected a divisor of the "
            f"{num_tokens} tokens: sequences of one length"
        )
    length = num_tokens // num_sequences
    ids = topk_ids.to(torch.int64).reshape(num_sequences, length * topk_ids.shape[1])
    counts = ids.new_zeros(num_sequences, num_experts + 1)
    counts = counts.scatter_add(1, ids + 1, torch.ones_like(ids))[:, 1:]
    picks = counts.sum(1, keepdim=True).clamp(min=1)
    share = counts.to(probabilities.dtype) / picks
    mean = probabilities.view(num_sequences, length, num_experts).mean(1)
    return num_experts * (share * mean).sum() / num_sequences


def router_z_loss(logits: Tensor) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)^2: keeps logits small.

    "ST-MoE: Designing Stable and Transferable Sparse Expert Models" (2022), equation 5.

    Args:
        logits: (T, E) float; T may be 0: the loss is then 0.

    Returns:
        a scalar of the type of ``logits``.
    """
    return logits.logsumexp(-1).square().sum() / max(logits.shape[0], 1)


def attach_loss(x: Tensor, loss: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``x``; its backward adds the gradient of ``scale * loss``.

    So a layer brings its own loss, and the code that calls ``backward`` need not know
    of it: it works inside pipeline stages and activation checkpointing, which counts
    it once. The loss has weight ``scale`` whatever the main loss is multiplied by.

    Args:
        x: float tensor on the way to the main loss; without a gradient the loss has
            none either.
        loss: a scalar.
        scale: of the loss.
    """
    return _AttachLoss.apply(x, loss, scale) if loss.requires_grad else x


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.options = {"dtype": loss.dtype, "device": loss.device}
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full((), ctx.scale, **ctx.options), None


def _checked(probabilities: Tensor, topk_ids: Tensor) -> tuple[int, int]:
    if probabilities.dim() != 2:
        raise ValueError(
            f"probabilities has shape {tuple(probabilities.shape)}, expected (T, E): "
            "flatten the tokens"
        )
    if topk_ids.dim() != 2 or topk_ids.shape[0] != probabilities.shape[0]:
        raise ValueError(
            f"topk_ids has shape {tuple(topk_ids.shape)}, expected (T, K) with the "
            f"{probabilities.shape[0]} tokens of probabilities"
        )
    return probabilities.shape[0], probabilities.shape[1]
