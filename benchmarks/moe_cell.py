# SPDX-License-Identifier: Apache-2.0
"""What is dispatched and combined: the routing of all ranks, and what it costs.

And the values: inputs of one rank, what has to come out, and the count of wrong ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from routing import draw_topk_ids

_EXPERT_BYTES = 64  # of each row: what the stand-in for an expert changes
_EXPERT_SCALES = 128  # 1 + i / 128 has an exact bfloat16
_CHUNK = 256  # rows whose float64 copies are alive at once


@dataclass(frozen=True)
class MoeCell:
    """One dispatch and one combine: T tokens per rank, each to K of E experts.

    Expert e is on rank e // ceil(E / P), as DTensor's ``Shard(0)`` places it. Equal
    cells have equal routings, on every rank of every run.
    """

    tokens_of_rank: tuple[int, ...]
    hidden: int
    topk: int
    experts: int
    routing: str
    zipf_alpha: float
    dtype: torch.dtype
    seed: int

    @property
    def world_size(self) -> int:
        """Number of ranks P."""
        return len(self.tokens_of_rank)

    @property
    def experts_per_rank(self) -> int:
        """Experts of every rank but the last ones, which may have fewer."""
        return -(-self.experts // self.world_size)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden * self.dtype.itemsize

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of the weights and of the sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @cached_property
    def ids(self) -> list[torch.Tensor]:
        """Experts of every token of every rank: int64 (T, K) per rank."""
        return [
            draw_topk_ids(
                tokens=tokens,
                topk=self.topk,
                experts=self.experts,
                routing=self.routing,
                zipf_alpha=self.zipf_alpha,
                seed=self.seed,
                rank=rank,
            )
            for rank, tokens in enumerate(self.tokens_of_rank)
        ]

    @cached_property
    def received(self) -> list[int]:
        """Rows that the experts of each rank get, one per pick."""
        picks = torch.cat([ids.flatten() for ids in self.ids])
        ranks = picks.div(self.experts_per_rank, rounding_mode="floor")
        return torch.bincount(ranks, minlength=self.world_size).tolist()

    def crossing_rows(self, node_of_rank: list[int]) -> torch.Tensor:
        """Rows between nodes when each token crosses to a node once: int64 (N, N)."""
        num_nodes = max(node_of_rank) + 1
        node = torch.tensor(node_of_rank)
        matrix = torch.zeros(num_nodes, num_nodes, dtype=torch.int64)
        for rank, ids in enumerate(self.ids):
            reached = torch.zeros(len(ids), num_nodes, dtype=torch.int64)
            reached.scatter_(1, node[ids // self.experts_per_rank], 1)
            matrix[node_of_rank[rank]] += reached.sum(dim=0)
        return matrix.fill_diagonal_(0)

    def bound_bytes(self, node_of_rank: list[int]) -> int:
        """Bytes that must leave all nodes together, there and back."""
        return 2 * int(self.crossing_rows(node_of_rank).sum()) * self.row_bytes

    def busiest_bytes(self, node_of_rank: list[int]) -> int:
        """Bytes that the busiest direction of the busiest link carries, there and back.

        Combine is dispatch with the directions changed, so the larger one of a node
        counts twice.
        """
        rows = self.crossing_rows(node_of_rank)
        return (
            2
            * int(max(rows.sum(dim=0).max(), rows.sum(dim=1).max()))
            * (self.row_bytes)
        )

    def describe(self) -> str:
        """One line that tells this cell from others."""
        alpha = "" if self.routing == "uniform" else f" {self.zipf_alpha:g}"
        tokens = sorted(set(self.tokens_of_rank))
        count = "..".join(map(str, dict.fromkeys((tokens[0], tokens[-1]))))
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"T={count} H={self.hidden} K={self.topk} E={self.experts} {dtype} "
            f"{self.routing}{alpha}"
        )


def _rows_of(cell: MoeCell, rank: int) -> torch.Tensor:
    """Tokens of a rank, (T, H): values of 1/64 to 1, of both signs."""
    generator = torch.Generator().manual_seed(cell.seed * 2_000_003 + rank)
    rows = torch.empty(cell.tokens_of_rank[rank], cell.hidden)
    rows.uniform_(-63 / 64, 63 / 64, generator=generator)
    return rows.add_(rows.sign(), alpha=1 / 64).to(cell.dtype)


def _weights_of(cell: MoeCell, rank: int) -> torch.Tensor:
    """Weights of a rank's picks, (T, K): 0.5 / K to 1.5 / K."""
    generator = torch.Generator().manual_seed(cell.seed * 3_000_017 + rank)
    shape = cell.ids[rank].shape
    weights = torch.rand(shape, generator=generator, dtype=cell.weight_dtype)
    return weights.add_(0.5).div_(cell.topk)


class MoePayload:
    """Inputs of one rank for one cell, and what has to come out.

    The stand-in for the experts changes the first 64 bytes of each row, by a factor of
    the expert: rows of one token differ between its experts, as they do behind real
    ones, and a row or weight that comes back from the wrong expert shows.
    """

    def __init__(self, cell: MoeCell, rank: int) -> None:
        self.cell = cell
        self.ids = cell.ids[rank]
        self.x = _rows_of(cell, rank)
        self.weights = _weights_of(cell, rank)
        self._changed = min(cell.hidden, _EXPERT_BYTES // cell.dtype.itemsize)
        self._factor = self._weight_factor = 1.0
        self._expect(rank)

    def _expect(self, rank: int) -> None:
        """Rows and weights of this rank: by (local expert, source rank, token, k)."""
        cell = self.cell
        # Picks, as flat indices token * K + k, of each source that come here.
        picks = [
            (ids.flatten() // cell.experts_per_rank == rank).nonzero().flatten()
            for ids in cell.ids
        ]
        expert = torch.cat(
            [i.flatten()[p] for i, p in zip(cell.ids, picks, strict=True)]
        )
        order = expert.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        self._expected_rows = torch.empty(len(order), cell.hidden, dtype=cell.dtype)
        self._expected_weights = torch.empty(len(order), dtype=cell.weight_dtype)
        places = place.split([len(p) for p in picks])
        for source, (pick, to) in enumerate(zip(picks, places, strict=True)):
            self._expected_rows[to] = _rows_of(cell, source)[pick // cell.topk]
            self._expected_weights[to] = _weights_of(cell, source).flatten()[pick]
        self._scale = self._scale_of(expert[order])
        self.apply_experts(self._expected_rows)

    def _scale_of(self, expert: torch.Tensor) -> torch.Tensor:
        local = expert % self.cell.experts_per_rank % _EXPERT_SCALES
        return (1 + local / _EXPERT_SCALES).to(self.cell.dtype)

    def apply_experts(self, rows: torch.Tensor) -> torch.Tensor:
        """Stand in for the experts of this rank, on its rows (R, H), in place."""
        if len(rows) == len(self._scale):  # else they are wrong, which the check counts
            rows[:, : self._changed].mul_(self._scale[:, None])
        return rows

    def renew(self, call: int) -> None:
        """Take the values of checked call number ``call``.

        By powers of two, which change no rounding: results of an earlier call that lie
        about in memory do not pass for those of this one.
        """
        factor, weight_factor = (-2.0) ** (call % 3), 2.0 ** (call % 2)
        self.x.mul_(factor / self._factor)
        self._expected_rows.mul_(factor / self._factor)
        self.weights.mul_(weight_factor / self._weight_factor)
        self._expected_weights.mul_(weight_factor / self._weight_factor)
        self._factor, self._weight_factor = factor, weight_factor

    def count_wrong(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> int:
        """Number of wrong elements among what a call gave.

        Args:
            rows: received rows (R, H) after ``apply_experts``; compared bit by bit.
            weights: received weights (R,); None where weights do not travel.
            out: combined rows (T, H), within rounding of a float64 sum; None if there
                are none to check.
        """
        wrong = _count_unequal(rows, self._expected_rows)
        if weights is not None:
            wrong += _count_unequal(weights, self._expected_weights)
        if out is not None:
            wrong += self._count_wrong_sums(out)
        return wrong

    def _count_wrong_sums(self, out: torch.Tensor) -> int:
        if out.shape != self.x.shape or out.dtype != self.x.dtype:
            return self.x.numel()
        # A sum of sums is rounded to the rows' type up to three times (two levels and
        # the result), and each addition to that of the sum.
        row_eps = torch.finfo(out.dtype).eps
        sum_eps = torch.finfo(self.weights.dtype).eps
        tolerance = 2 * row_eps + 2 * self.cell.topk * sum_eps
        wrong = 0
        for start in range(0, len(out), _CHUNK):
            part = slice(start, start + _CHUNK)
            expected = self._sums(part)
            error = (out[part].double() - expected).abs_()
            # Not "error > ...": NaN has to count. All terms of a sum have one sign.
            right = error <= expected.abs_().mul_(tolerance)
            wrong += right.numel() - int(right.sum())
        return wrong

    def _sums(self, part: slice) -> torch.Tensor:
        """What combine has to give for some tokens, in float64."""
        x, weights, changed = self.x[part], self.weights[part].double(), self._changed
        sums = x.double() * weights.sum(dim=1, keepdim=True)
        scale = self._scale_of(self.ids[part])
        terms = (x[:, None, :changed] * scale[:, :, None]).double()
        sums[:, :changed] = (terms * weights[:, :, None]).sum(dim=1)
        return sums


def _count_unequal(got: torch.Tensor, expected: torch.Tensor) -> int:
    """Elements whose bits differ; all of them where shape or type do."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return max(got.numel(), expected.numel())
    if torch.equal(got, expected):  # equal values without zeros are equal bits
        return 0
    wrong = 0
    for g, e in zip(got.split(_CHUNK), expected.split(_CHUNK), strict=True):
        wrong += int((g != e).sum())
    return wrong
