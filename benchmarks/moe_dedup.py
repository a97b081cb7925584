# SPDX-License-Identifier: Apache-2.0
"""Peers that send a row once per place that needs it, and partial sums back.

``RankDedup``: places are ranks. ``TwoLevel``: places are nodes, whose ranks share the
rows out among themselves. The interface is that of moe_peers.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from moe_channels import Rails, Transfer, World
from moe_peers import Picks, block_keys, sort_picks, sum_rows


@dataclass
class Hop:
    """One exchange of rows that go once to each place, and of who needs them there.

    A pick, at the place, is (row, key, weight): the row it needs, the expert it is of.
    """

    send_row: torch.Tensor  # the rows to send, sorted by (place, row)
    num_rows: int  # of the tensor they are taken from
    send_splits: list[int]
    receive_splits: list[int]
    position: torch.Tensor  # of each own pick: its row among those for its place
    pick_send_splits: list[int]
    key_counts: torch.Tensor  # (sources, keys): picks that arrive, sorted by key


def make_hop(
    channel: World | Rails,
    row: torch.Tensor,
    place: torch.Tensor,
    num_rows: int,
    key_counts: list[torch.Tensor],
    num_keys: int,
) -> Hop:
    """Find the distinct (place, row) of the picks, and exchange all sizes.

    Args:
        row, place: of each pick, int64 (n,); picks are sorted by (place, key).
        key_counts: for each place its picks of each key.
        num_keys: keys of this rank's own place.
    """
    needed = torch.zeros(len(key_counts), num_rows, dtype=torch.bool)
    needed[place, row] = True
    counts = needed.sum(dim=1)
    message = [
        part for pair in zip(counts.split(1), key_counts, strict=True) for part in pair
    ]
    received = channel.there(
        torch.cat(message),
        [1 + len(keys) for keys in key_counts],
        [1 + num_keys] * channel.num_sources,
    )
    position = needed.cumsum(dim=1)[place, row] - 1
    pick_counts = torch.stack([keys.sum() for keys in key_counts])
    sizes = received.result().view(channel.num_sources, 1 + num_keys)
    return Hop(
        send_row=needed.nonzero()[:, 1],
        num_rows=num_rows,
        send_splits=counts.tolist(),
        receive_splits=sizes[:, 0].tolist(),
        position=position,
        pick_send_splits=pick_counts.tolist(),
        key_counts=sizes[:, 1:],
    )


def send_picks(channel: World | Rails, hop: Hop, weights: torch.Tensor) -> Transfer:
    """Send position and weight (n,) of every pick, side by side as integers."""
    bits = weights.view(torch.int64 if weights.itemsize == 8 else torch.int32)
    return channel.there(
        torch.stack([hop.position.to(bits.dtype), bits], dim=1),
        hop.pick_send_splits,
        hop.key_counts.sum(dim=1).tolist(),
    )


def arrived_picks(
    transfer: Transfer, hop: Hop, weight_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Wait for ``send_picks``: row (among all that arrive) and weight of each pick."""
    packed = transfer.result()
    counts = torch.tensor(hop.receive_splits)
    starts = (counts.cumsum(0) - counts).repeat_interleave(hop.key_counts.sum(dim=1))
    return starts + packed[:, 0], packed[:, 1].contiguous().view(weight_dtype)


def send_back(channel: World | Rails, hop: Hop, rows: torch.Tensor) -> torch.Tensor:
    """Return a row for each row that came, and sum what comes per row of the hop."""
    back = channel.back(rows, hop.receive_splits, hop.send_splits).result()
    return sum_rows(back, hop.send_row, hop.num_rows)


@dataclass
class DedupPlan:
    """The hops of a call; those behind the first are found while it dispatches."""

    picks: Picks
    hops: list[Hop]
    row: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class RankDedup:
    """One row per (token, rank) there, one weighted partial sum for each back."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.world = World(group)
        self.experts_per_rank = -(-num_experts // self.world.num_sources)

    def plan(self, topk_ids: torch.Tensor) -> DedupPlan:
        """Sort the picks by expert and exchange how many rows and picks there are."""
        picks = sort_picks(topk_ids)
        size, each = self.world.num_sources, self.experts_per_rank
        counts = torch.bincount(picks.expert, minlength=size * each)
        hop = make_hop(
            self.world,
            picks.token,
            picks.expert.div(each, rounding_mode="floor"),
            len(topk_ids),
            list(counts.split(each)),
            each,
        )
        return DedupPlan(picks, [hop])

    def dispatch(
        self, x: torch.Tensor, weights: torch.Tensor, plan: DedupPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send rows of ``x`` (T, H) with ``weights`` (T, K).

        Returns (R, H) and (R,), expert-major.
        """
        hop = plan.hops[0]
        picks = send_picks(self.world, hop, weights.flatten()[plan.picks.slot])
        rows = self.world.there(
            x.index_select(0, hop.send_row), hop.send_splits, hop.receive_splits
        )
        row, received_weights = arrived_picks(picks, hop, weights.dtype)
        order = block_keys(hop.key_counts).argsort(stable=True)
        plan.row = row[order]
        return rows.result().index_select(0, plan.row), received_weights[order]

    def combine(
        self,
        rows: torch.Tensor,
        plan: DedupPlan,
        weights: torch.Tensor,
        received_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Sum rows (R, H) with ``received_weights`` (R,) here and at home: (T, H)."""
        hop = plan.hops[0]
        sums = sum_rows(rows, plan.row, sum(hop.receive_splits), received_weights)
        return send_back(self.world, hop, sums)


class TwoLevel:
    """One row per (token, node) to a rail peer, which shares it out in its node.

    Inside the node one row per (token, rank). Back: partial sums per (token, rank) to
    the rail peer, of those one per (token, node) home.
    """

    def __init__(
        self,
        node_of_rank: list[int],
        num_experts: int,
        backend: str = "gloo",
        **options,
    ) -> None:
        """Makes its groups, with ``options`` for new_group. Collective."""
        size, rank = len(node_of_rank), dist.get_rank()
        self.size, each = size, -(-num_experts // size)
        self.experts_per_rank = each
        self.rails = Rails(node_of_rank, backend, **options)
        for node in range(max(node_of_rank) + 1):
            members = [r for r in range(size) if node_of_rank[r] == node]
            group = dist.new_group(members, backend=backend, **options)
            if rank in members:
                self.node, self.node_size = World(group), len(members)
        # Experts in the order of (node on the rail, rank), and each node's number.
        order = self.rails.node_order
        by_node = sorted(range(size), key=lambda r: (order.index(node_of_rank[r]), r))
        first = torch.tensor([by_node.index(r) * each for r in range(size)])
        self.place_of_expert = (first[:, None] + torch.arange(each)).flatten()
        self.experts_of_node = [node_of_rank.count(node) * each for node in order]
        nodes = torch.arange(len(order))
        self.node_of_place = nodes.repeat_interleave(torch.tensor(self.experts_of_node))
        self.source_ranks = torch.tensor(self.rails.source_ranks)

    def plan(self, topk_ids: torch.Tensor) -> DedupPlan:
        """Sort the picks by node and expert, and exchange sizes with rail peers."""
        picks = sort_picks(self.place_of_expert[topk_ids])
        counts = torch.bincount(picks.expert, minlength=len(self.place_of_expert))
        hop = make_hop(
            self.rails,
            picks.token,
            self.node_of_place[picks.expert],
            len(topk_ids),
            list(counts.split(self.experts_of_node)),
            self.node_size * self.experts_per_rank,
        )
        return DedupPlan(picks, [hop])

    def dispatch(
        self, x: torch.Tensor, weights: torch.Tensor, plan: DedupPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send rows of ``x`` (T, H) with ``weights`` (T, K).

        Returns (R, H) and (R,), expert-major. What the node's ranks have to know of
        each other is found while the rows cross.
        """
        first = plan.hops[0]
        picks = send_picks(self.rails, first, weights.flatten()[plan.picks.slot])
        crossing = self.rails.there(
            x.index_select(0, first.send_row), first.send_splits, first.receive_splits
        )
        second, node_weights = self._second_hop(picks, first, weights.dtype)
        plan.hops[1:] = [second]
        picks = send_picks(self.node, second, node_weights)
        order = block_keys(second.key_counts).argsort(stable=True)
        row, received_weights = arrived_picks(picks, second, weights.dtype)
        plan.row = row[order]
        rows = self.node.there(
            crossing.result().index_select(0, second.send_row),
            second.send_splits,
            second.receive_splits,
        ).result()
        return rows.index_select(0, plan.row), received_weights[order]

    def _second_hop(
        self, picks: Transfer, first: Hop, weight_dtype: torch.dtype
    ) -> tuple[Hop, torch.Tensor]:
        """Sort what landed here by (rank, expert, source) for the ranks of the node."""
        row, weights = arrived_picks(picks, first, weight_dtype)
        lengths = first.key_counts.sum(dim=1)
        source = self.source_ranks.repeat_interleave(lengths)
        key = block_keys(first.key_counts) * self.size + source
        order = key.argsort(stable=True)
        keys_of_rank = self.experts_per_rank * self.size
        counts = torch.bincount(key, minlength=self.node_size * keys_of_rank)
        hop = make_hop(
            self.node,
            row[order],
            key[order].div(keys_of_rank, rounding_mode="floor"),
            sum(first.receive_splits),
            list(counts.split(keys_of_rank)),
            keys_of_rank,
        )
        return hop, weights[order]

    def combine(
        self,
        rows: torch.Tensor,
        plan: DedupPlan,
        weights: torch.Tensor,
        received_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Sum rows (R, H) with ``received_weights`` (R,) per rank, node and token."""
        first, second = plan.hops
        sums = sum_rows(rows, plan.row, sum(second.receive_splits), received_weights)
        return send_back(self.rails, first, send_back(self.node, second, sums))
