# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine over all_to_all_single of expanded rows, and what peers share.

Here and in moe_dedup.py is what a careful user writes without this library. Each peer
has ``plan``, ``dispatch`` and ``combine``, takes any number of tokens per rank, of
experts (the last ranks may have fewer, or none) and of ranks per node, and gives rows
sorted by (local expert, source rank, source token). Nothing loops over tokens. Every
id has to name an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

_CHUNK = 256  # rows of 32 bits that stay in the cache while they are summed


@dataclass
class Picks:
    """The T * K picks of a rank, sorted by (expert, token): three int64 (T * K,)."""

    slot: torch.Tensor  # token * K + k
    token: torch.Tensor
    expert: torch.Tensor


def sort_picks(topk_ids: torch.Tensor) -> Picks:
    """Sort the picks ``topk_ids`` (T, K) by expert."""
    flat = topk_ids.flatten()
    slot = flat.argsort(stable=True)
    token = slot.div(max(topk_ids.shape[1], 1), rounding_mode="floor")
    return Picks(slot, token, flat[slot])


def block_keys(counts: torch.Tensor) -> torch.Tensor:
    """Keys of elements that arrived in blocks: ``counts`` (S, N) of source and key."""
    keys = torch.arange(counts.shape[1]).repeat(counts.shape[0])
    return keys.repeat_interleave(counts.flatten())


def inverse(order: torch.Tensor) -> torch.Tensor:
    """Inverse of a permutation (n,)."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places


def sum_rows(
    rows: torch.Tensor,
    target: torch.Tensor,
    num_targets: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum ``weights * rows`` (n, H) by target (n,) in float32 (float64 for float64).

    In the order of the rows, with one rounding. A chunk at a time: an eighth of the
    time of one large ``index_add_``. Returns (num_targets, H) of the rows' type.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    sums = torch.zeros(num_targets, rows.shape[1], dtype=wide)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        terms = rows[part].to(wide)
        if weights is not None:
            terms = terms * weights[part, None]
        sums.index_add_(0, target[part], terms)
    return sums.to(rows.dtype)


def exchange_rows(
    rows: torch.Tensor,
    send_splits: list[int],
    receive_splits: list[int],
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """``all_to_all_single`` of (n, ...), split by rows, into a new tensor."""
    received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
    dist.all_to_all_single(received, rows, receive_splits, send_splits, group=group)
    return received


@dataclass
class ExpandedPlan:
    """Sizes of both directions, and the orders of rows on both sides."""

    picks: Picks
    send_splits: list[int]
    receive_splits: list[int]
    to_experts: torch.Tensor  # (R,): where each expert-major row has arrived
    num_tokens: int


class Expanded:
    """One row per pick, sorted by expert: what stock code sends; weights stay home."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.experts_per_rank = -(-num_experts // self.size)

    def plan(self, topk_ids: torch.Tensor) -> ExpandedPlan:
        """Sort the picks by expert and exchange how many there are of each."""
        picks = sort_picks(topk_ids)
        shape = (self.size, self.experts_per_rank)
        sent = torch.bincount(picks.expert, minlength=shape[0] * shape[1]).view(shape)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return ExpandedPlan(
            picks=picks,
            send_splits=sent.sum(dim=1).tolist(),
            receive_splits=received.sum(dim=1).tolist(),
            to_experts=block_keys(received).argsort(stable=True),
            num_tokens=len(topk_ids),
        )

    def dispatch(
        self, x: torch.Tensor, weights: torch.Tensor, plan: ExpandedPlan
    ) -> tuple[torch.Tensor, None]:
        """Send the rows of ``x`` (T, H); returns (R, H), expert-major."""
        received = exchange_rows(
            x.index_select(0, plan.picks.token),
            plan.send_splits,
            plan.receive_splits,
            self.group,
        )
        return received.index_select(0, plan.to_experts), None

    def combine(
        self,
        rows: torch.Tensor,
        plan: ExpandedPlan,
        weights: torch.Tensor,
        received_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """Send rows (R, H) back; returns their sums (T, H) by ``weights`` (T, K)."""
        as_arrived = rows.index_select(0, inverse(plan.to_experts))
        back = exchange_rows(
            as_arrived, plan.receive_splits, plan.send_splits, self.group
        )
        return self.reduce(back, plan, weights)

    def reduce(
        self, back: torch.Tensor, plan: ExpandedPlan, weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum the rows (T * K, H) that came back, in the order of the picks."""
        picks = plan.picks
        own_weights = weights.flatten()[picks.slot]
        return sum_rows(back, picks.token, plan.num_tokens, own_weights)


class Stock(Expanded):
    """``Expanded`` with the weighted sum in one batched product, as torchtitan has it.

    Shorter, and slower on a CPU: a copy of all rows in 32 bits goes through memory.
    """

    def reduce(
        self, back: torch.Tensor, plan: ExpandedPlan, weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum the rows (T * K, H) that came back, in the order of the picks."""
        by_token = back.index_select(0, inverse(plan.picks.slot))
        by_token = by_token.view(*weights.shape, back.shape[1]).to(weights.dtype)
        return torch.bmm(weights[:, None, :], by_token)[:, 0].to(back.dtype)
