# SPDX-License-Identifier: Apache-2.0
"""Ways for the rows of the deduplicating peers: to all ranks, or along rails.

Both have ``num_sources``, ``there`` (to places) and ``back`` (to the sources of rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass
class Transfer:
    """An exchange on its way; its input has to stay as it is."""

    rows: torch.Tensor
    works: list[dist.Work]

    def result(self) -> torch.Tensor:
        """Wait for it; returns the rows that arrived."""
        for work in self.works:
            work.wait()
        return self.rows


class World:
    """Exchanges between all ranks of one group; every rank is source and place."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_sources = dist.get_world_size(group)

    def there(
        self, rows: torch.Tensor, send_splits: list[int], receive_splits: list[int]
    ) -> Transfer:
        """Send rows (n, ...) to the places; splits per place, and per source."""
        received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
        work = dist.all_to_all_single(
            received, rows, receive_splits, send_splits, self.group, async_op=True
        )
        return Transfer(received, [work])

    def back(
        self, rows: torch.Tensor, send_splits: list[int], receive_splits: list[int]
    ) -> Transfer:
        """Send rows to the sources; splits per source, and per place."""
        return self.there(rows, send_splits, receive_splits)


@dataclass
class Rail:
    """One of a rank's rails: a rank of each node, by global rank."""

    group: dist.ProcessGroup
    sends: list[bool]  # of each member: whether the rail is the one it sends on


class Rails:
    """Exchanges between nodes: places are nodes, a rank sends on one rail.

    Rail r has the rank r mod G of each node of G ranks. The ranks with local rank r
    send on it; where nodes are of different size, a rank of a smaller one receives on
    several rails.
    """

    def __init__(self, node_of_rank: list[int], backend: str, **options) -> None:
        """Collective over the default group."""
        ranks_of_node: dict[int, list[int]] = {}
        for rank, node in enumerate(node_of_rank):
            ranks_of_node.setdefault(node, []).append(rank)
        local_rank = {
            r: i for ranks in ranks_of_node.values() for i, r in enumerate(ranks)
        }
        self.rails: list[Rail] = []
        self.source_ranks: list[int] = []
        for number in range(max(map(len, ranks_of_node.values()))):
            members = sorted(
                ranks[number % len(ranks)] for ranks in ranks_of_node.values()
            )
            group = dist.new_group(members, backend=backend, **options)
            if dist.get_rank() not in members:
                continue
            sends = [local_rank[member] == number for member in members]
            if not self.rails:  # the first rail of a rank is the one it sends on
                self.node_order = [node_of_rank[member] for member in members]
            self.rails.append(Rail(group, sends))
            self.source_ranks += [m for m, s in zip(members, sends, strict=True) if s]
        self.num_sources = len(self.source_ranks)

    def there(
        self, rows: torch.Tensor, send_splits: list[int], receive_splits: list[int]
    ) -> Transfer:
        """Send rows (n, ...) to the nodes; splits per node, and per source."""
        received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
        works = []
        for part, splits, rail, mine in self._parts(received, receive_splits):
            own = (rows, send_splits) if mine else (rows[:0], [0] * len(splits))
            works.append(
                dist.all_to_all_single(
                    part, own[0], splits, own[1], rail.group, async_op=True
                )
            )
        return Transfer(received, works)

    def back(
        self, rows: torch.Tensor, send_splits: list[int], receive_splits: list[int]
    ) -> Transfer:
        """Send rows to the sources; splits per source, and per node."""
        received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
        works = []
        for part, splits, rail, mine in self._parts(rows, send_splits):
            own = (received, receive_splits) if mine else (rows[:0], [0] * len(splits))
            works.append(
                dist.all_to_all_single(
                    own[0], part, own[1], splits, rail.group, async_op=True
                )
            )
        return Transfer(received, works)

    def _parts(
        self, rows: torch.Tensor, source_splits: list[int]
    ) -> Iterator[tuple[torch.Tensor, list[int], Rail, bool]]:
        """Yield each rail's rows, their splits over its members, and whether it is the
        one that this rank sends on."""
        start, sizes = 0, iter(source_splits)
        for index, rail in enumerate(self.rails):
            splits = [next(sizes) if sends else 0 for sends in rail.sends]
            end = start + sum(splits)
            yield rows[start:end], splits, rail, index == 0
            start = end
