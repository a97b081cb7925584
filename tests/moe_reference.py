# SPDX-License-Identifier: Apache-2.0
"""What plan, dispatch, combine and their gradients give: one process, plain Python.

Nothing here knows how rows travel. Each rank knows the inputs of all ranks, so it can
say what has to come out on its own. The experts of all tests are a polynomial of each
element, whose bits do not depend on how many rows are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pick = tuple[int, int, int]  # source rank, token, k


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def local_experts(num_experts: int, rank: int, size: int) -> range:
    """The experts of a rank, as DTensor's Shard(0) places them."""
    chunk = -(-num_experts // size)
    begin = min(rank * chunk, num_experts)
    return range(begin, min(begin + chunk, num_experts))


@dataclass
class Received:
    """Receive rows of a rank.

    Attributes:
        picks: of each row; None: padding.
        counts: rows of each local expert.
        offsets: where the rows of each local expert end.
        num_dropped: picks that found no room.
    """

    picks: list[Pick | None]
    counts: list[int]
    offsets: list[int]
    num_dropped: int = 0


def receive(
    ids: Sequence[Tensor],
    num_experts: int,
    rank: int,
    align: int = 1,
    max_rows: int | None = None,
) -> Received:
    """Lay out the receive rows of a rank from the ids (T, K) of all ranks."""
    found = Received([], [], [])
    for expert in local_experts(num_experts, rank, len(ids)):
        picks = [
            (source, token, k)
            for source, table in enumerate(ids)
            for token, row in enumerate(table.tolist())
            for k, picked in enumerate(row)
            if picked == expert
        ]
        padding = -len(picks) % align
        found.picks += [*picks, *[None] * padding]
        found.counts.append(len(picks))
        found.offsets.append(len(found.picks))
    if max_rows is not None:
        _cut(found, max_rows)
    return found


def _cut(found: Received, max_rows: int) -> None:
    """Drop the picks beyond a number of rows; fill up to it with padding."""
    found.num_dropped = sum(pick is not None for pick in found.picks[max_rows:])
    begins = [0, *found.offsets[:-1]]
    found.counts = [
        max(0, min(count, max_rows - begin))
        for begin, count in zip(begins, found.counts, strict=True)
    ]
    found.offsets = [min(offset, max_rows) for offset in found.offsets]
    missing = max_rows - len(found.picks)
    found.picks = found.picks[:max_rows] + [None] * missing


def gather(tensors: Sequence[Tensor], picks: Sequence[Pick | None]) -> Tensor:
    """The row of every pick; zeros for padding."""
    zeros = torch.zeros_like(tensors[0].new_empty(tensors[0].shape[1:]))
    rows = [zeros if p is None else tensors[p[0]][p[1]] for p in picks]
    return torch.stack(rows) if rows else zeros.new_empty((0, *zeros.shape))


def gather_weights(weights: Sequence[Tensor], picks: Sequence[Pick | None]) -> Tensor:
    """The weight of every pick; zero for padding."""
    values = [0.0 if p is None else weights[p[0]][p[1], p[2]].item() for p in picks]
    return torch.tensor(values, dtype=weights[0].dtype)


# ---- experts ----


def make_experts(num_experts: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Parameters of all experts, (2, E, H)."""
    generator = torch.Generator().manual_seed(7)
    shape = (2, num_experts, hidden)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def apply_experts(rows: Tensor, experts: Tensor, parameters: Tensor) -> Tensor:
    """A polynomial of each row (..., H) with the parameters of its expert (...)."""
    scale, slope = parameters[:, experts]
    return rows * rows * scale + rows * slope


def expert_of_row(offsets: Tensor, num_rows: int) -> Tensor:
    """The local expert of every row; that of padding behind all is the last."""
    rows = torch.arange(num_rows, dtype=offsets.dtype)
    found = torch.searchsorted(offsets, rows, right=True)
    return found.clamp(max=max(0, offsets.shape[0] - 1))


# ---- sums ----


def sum_tree(
    rows: Sequence[Tensor],
    weights: Sequence[float | Tensor | None],
    homes: Sequence[tuple[int, ...]],
) -> Tensor:
    """Sum weighted rows as the order of sums wants it, to the bit.

    Args:
        rows: of one token; at least one.
        weights: of each row; None: one.
        homes: (label, rank, expert, k) of each row.
    """
    dtype = rows[0].dtype
    wide = wide_type(dtype)
    total = None
    order = sorted(range(len(rows)), key=homes.__getitem__)
    for label in sorted({home[0] for home in homes}):
        partial = None
        for i in order:
            if homes[i][0] == label:
                term = rows[i].to(wide)
                if weights[i] is not None:
                    term = term * torch.as_tensor(weights[i], dtype=wide)
                partial = term if partial is None else partial + term
        rounded = partial.to(dtype).to(wide)
        total = rounded if total is None else total + rounded
    return total.to(dtype)


@dataclass
class Routing:
    """Where the picks of one rank go.

    Attributes:
        ids: (T, K) of this rank.
        num_experts: of all ranks.
        reduction_map: the label of each rank.
        dropped: picks (token, k) of this rank that found no room.
    """

    ids: Tensor
    num_experts: int
    reduction_map: Sequence[int]
    dropped: frozenset[tuple[int, int]] = frozenset()

    def homes(self, token: int) -> dict[int, tuple[int, ...]]:
        """(label, rank, expert, k) of each k of a token that an expert gets."""
        chunk = -(-self.num_experts // len(self.reduction_map))
        found = {}
        for k, expert in enumerate(self.ids[token].tolist()):
            if expert >= 0 and (token, k) not in self.dropped:
                rank = expert // chunk
                found[k] = (self.reduction_map[rank], rank, expert, k)
        return found

    def sum(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Sum rows (T, K, H), weighted by (T, K), per token: (T, H)."""
        out = torch.zeros_like(rows[:, 0])
        for token in range(rows.shape[0]):
            homes = self.homes(token)
            if homes:
                factors = None if weights is None else weights[token]
                out[token] = sum_tree(
                    [rows[token, k] for k in homes],
                    [None if factors is None else factors[k] for k in homes],
                    list(homes.values()),
                )
        return out

    def mask(self) -> Tensor:
        """(T, K): whether an expert gets the pick."""
        mask = torch.zeros_like(self.ids, dtype=torch.bool)
        for token in range(self.ids.shape[0]):
            mask[token, list(self.homes(token))] = True
        return mask


@dataclass
class LayerResult:
    """Output (T, H) of a layer of experts on one rank, and gradients.

    grad_weights is None without weights; its terms are added in no fixed order, so it
    is right to rounding only.
    """

    out: Tensor
    grad_x: Tensor
    grad_weights: Tensor | None


def run_layer(
    x: Tensor,
    weights: Tensor | None,
    grad_out: Tensor,
    parameters: Tensor,
    routing: Routing,
) -> LayerResult:
    """Dispatch, experts and combine of one rank's tokens, and their backward."""
    num_tokens, topk = routing.ids.shape
    mask = routing.mask()
    leaves = x.detach()[:, None].repeat(1, topk, 1).requires_grad_()
    picked = routing.ids.clamp(min=0).long()
    rows = apply_experts(leaves, picked, parameters.detach())
    out = routing.sum(rows.detach(), weights)
    wide = wide_type(x.dtype)
    sent = grad_out.detach()[:, None].expand_as(rows)
    grad_weights = None
    if weights is not None:
        products = sent.double() * rows.detach().double()
        grad_weights = (products.sum(-1) * mask).to(weights.dtype)
        sent = (sent.to(wide) * weights.detach().to(wide)[..., None]).to(x.dtype)
    # Not rows with grad_outputs: torch would import sympy, which takes seconds.
    (grad_rows,) = torch.autograd.grad((rows * sent).sum(), leaves)
    return LayerResult(out, routing.sum(grad_rows, None), grad_weights)


def run_dense(
    x: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    grad_out: Sequence[Tensor],
    parameters: Tensor,
) -> Tensor:
    """Gradient of the parameters of all experts by the tokens of all ranks."""
    leaf = parameters.detach().clone().requires_grad_()
    x, ids, grad_out = torch.cat(list(x)), torch.cat(list(ids)), torch.cat(grad_out)
    factors = (ids >= 0).to(x.dtype)
    if weights is not None:
        factors = factors * torch.cat(list(weights)).to(x.dtype)
    rows = apply_experts(x[:, None].detach(), ids.clamp(min=0).long(), leaf)
    out = (rows * factors[..., None]).sum(1)
    (grad,) = torch.autograd.grad((out * grad_out).sum(), leaf)
    return grad
