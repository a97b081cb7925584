# SPDX-License-Identifier: Apache-2.0
"""What is exchanged: even cells by size, and MoE cells from a seeded routing."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Cell:
    """One all_to_all_single: who sends how many rows to whom.

    ``rows[s, d]`` (int64) rows of ``row_elements`` elements go from rank s to rank d.
    """

    rows: torch.Tensor
    row_elements: int
    dtype: torch.dtype
    even: bool
    one_copy_bytes: int | None = None  # MoE: one copy per (token, other node) instead

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.row_elements * self.dtype.itemsize

    @property
    def size_bytes(self) -> int:
        """Largest send or receive total of a rank, as nccl-tests' alltoallv counts."""
        return self.row_bytes * max(
            int(self.rows.sum(dim=1).max()), int(self.rows.sum(dim=0).max())
        )

    def leaving_bytes(self, node_of_rank: list[int]) -> tuple[list[int], list[int]]:
        """Bytes that must leave and enter each node: (egress, ingress) per node."""
        num_nodes = max(node_of_rank) + 1
        node = torch.tensor(node_of_rank)
        between = torch.zeros(num_nodes, self.rows.shape[1], dtype=torch.int64)
        between.index_add_(0, node, self.rows)
        matrix = torch.zeros(num_nodes, num_nodes, dtype=torch.int64)
        matrix.index_add_(1, node, between)
        matrix.fill_diagonal_(0)
        matrix *= self.row_bytes
        return matrix.sum(dim=1).tolist(), matrix.sum(dim=0).tolist()


def even_cell(size_bytes: int, dtype: torch.dtype, world_size: int) -> Cell:
    """Cell of about ``size_bytes`` per rank: rounded down to equal parts, at least one
    element each."""
    elements = max(1, size_bytes // (dtype.itemsize * world_size))
    rows = torch.full((world_size, world_size), elements, dtype=torch.int64)
    return Cell(rows=rows, row_elements=1, dtype=dtype, even=True)


def draw_topk_ids(
    *,
    tokens: int,
    topk: int,
    experts: int,
    routing: str,
    zipf_alpha: float,
    seed: int,
    rank: int,
) -> torch.Tensor:
    """Draw distinct experts for each token of a rank: int64 (tokens, topk).

    Popularity is equal (``uniform``) or i ** -alpha in an order of the experts that
    depends on the seed alone (``zipf``), so that all ranks crowd the same experts, or
    in their own order (``zipf_sorted``), so that these are the first ranks' experts.
    """
    log_popularity = torch.zeros(experts)
    if routing != "uniform":
        order = torch.arange(experts)
        if routing == "zipf":
            shared = torch.Generator().manual_seed(seed)
            order = torch.randperm(experts, generator=shared)
        log_popularity[order] = -zipf_alpha * torch.arange(1, experts + 1).log()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + rank + 1)
    # The k largest of log(popularity) + Gumbel noise are a draw without replacement.
    uniform = torch.rand(tokens, experts, generator=generator).clamp_min(1e-30)
    gumbel = -(-uniform.log()).clamp_min(1e-30).log()
    return (log_popularity + gumbel).topk(topk).indices


def moe_cell(
    options: argparse.Namespace, dtype: torch.dtype, node_of_rank: list[int]
) -> Cell:
    """Cell in which every rank sends topk rows per token to the ranks of its experts.

    Expert e is on rank e // ceil(experts / world size), as DTensor's ``Shard(0)``.
    Collective over the default group: each rank draws only its own routing.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ids = draw_topk_ids(
        tokens=options.tokens,
        topk=options.topk,
        experts=options.experts,
        routing=options.routing,
        zipf_alpha=options.zipf_alpha,
        seed=options.seed,
        rank=rank,
    )
    dest = ids // -(-options.experts // world_size)
    node = torch.tensor(node_of_rank)[dest]
    reached = torch.zeros(options.tokens, max(node_of_rank) + 1, dtype=torch.int64)
    reached.scatter_(1, node, 1)
    reached[:, node_of_rank[rank]] = 0
    own = torch.cat(
        [torch.bincount(dest.flatten(), minlength=world_size), reached.sum().reshape(1)]
    )
    gathered = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(gathered, own)
    table = torch.stack(gathered)
    return Cell(
        rows=table[:, :-1].contiguous(),
        row_elements=options.hidden,
        dtype=dtype,
        even=False,
        one_copy_bytes=int(table[:, -1].sum()) * options.hidden * dtype.itemsize,
    )
