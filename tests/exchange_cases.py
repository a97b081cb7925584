# SPDX-License-Identifier: Apache-2.0
"""Random all-to-alls, checked on the ranks against known bytes and against gloo.

Every rank draws the same cases from the same seed, so nothing about them travels.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Those that gloo's all-to-all takes, complex as pairs of reals.
GLOO_DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
]
OTHER_DTYPES = [
    torch.bool,
    torch.int16,
    torch.uint16,
    torch.uint32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex32,
]
# Where a block begins to travel another way, in bytes.
_EDGES = [1, 2 * 1024, 8 * 1024, 60 * 1024, 1 << 20]
_NOISE_BYTES = 1_000_003  # prime: no chunk size divides it


@functools.cache
def _noise() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        0, 256, (_NOISE_BYTES,), dtype=torch.uint8, generator=generator
    )


def block_bytes(seed: int, source: int, destination: int, size: int) -> torch.Tensor:
    """The bytes (uint8) that a rank sends to another, from anywhere in the noise."""
    start = random.Random(f"{seed}/{source}/{destination}").randrange(_NOISE_BYTES)
    copies = -(-(start + size) // _NOISE_BYTES)
    noise = _noise() if copies == 1 else _noise().repeat(copies)
    return noise[start : start + size]


@dataclass
class Case:
    """One all-to-all of a group.

    Attributes:
        seed: of its bytes.
        dtype: of its tensors.
        columns: elements of a row; 0: tensors have one dimension.
        rows: rows from group rank a to group rank b.
        equal: all splits are equal and not passed.
        form: "single" or "list".
    """

    seed: int
    dtype: torch.dtype
    columns: int
    rows: list[list[int]]
    equal: bool
    form: str

    def blocks(self, rank: int, *, sent: bool) -> list[torch.Tensor]:
        """What a rank sends to, or receives from, each rank; one tensor each."""
        row_bytes = max(self.columns, 1) * self.dtype.itemsize
        blocks = []
        for peer in range(len(self.rows)):
            source, destination = (rank, peer) if sent else (peer, rank)
            rows = self.rows[source][destination]
            block = block_bytes(self.seed, source, destination, rows * row_bytes)
            if self.dtype is torch.bool:
                block = block & 1
            shape = (rows, self.columns) if self.columns else (rows,)
            # A copy: not every offset is aligned for every dtype.
            blocks.append(block.clone().view(self.dtype).view(shape))
        return blocks


def draw_case(
    rng: random.Random, size: int, max_bytes: int, min_bytes: int = 1
) -> Case:
    """A case for a group of ``size`` ranks that moves some of so many bytes in all."""
    dtype = rng.choice(rng.choice([GLOO_DTYPES, OTHER_DTYPES]))
    columns = rng.choice([0, 0, 1, 3, 64])
    row_bytes = max(columns, 1) * dtype.itemsize
    pattern = rng.choice(
        ["any", "any", "zeros", "hot", "funnel", "silent", "equal", "edges", "nothing"]
    )
    largest = int(math.exp(rng.uniform(math.log(min_bytes), math.log(max_bytes))))
    per_pair = max(1, largest // (size * size * row_bytes))
    per_rank = max(1, largest // (size * row_bytes))

    def count(source: int, destination: int) -> int:
        if pattern == "zeros":
            return rng.choice([0, 0, 0, rng.randint(1, per_rank)])
        if pattern == "hot":
            return rng.randint(0, per_rank if destination == special else per_pair)
        if pattern == "funnel":
            return rng.randint(1, per_rank) if destination == special else 0
        if pattern == "silent":
            return 0 if source == special else rng.randint(0, 2 * per_pair)
        if pattern == "edges":
            edge = rng.choice([it for it in _EDGES if it <= max_bytes // size**2])
            return max(0, edge // row_bytes + rng.randint(-1, 1))
        if pattern == "nothing":
            return 0
        return rng.randint(0, 2 * per_pair)

    special = rng.randrange(size)
    if pattern == "equal":
        rows = [[rng.randint(0, per_pair)] * size] * size
    else:
        rows = [[count(a, b) for b in range(size)] for a in range(size)]
    form = rng.choice(["single", "single", "list"])
    return Case(rng.getrandbits(32), dtype, columns, rows, pattern == "equal", form)


@dataclass
class Pair:
    """The same ranks as an automoe group and as a gloo group."""

    ranks: list[int]
    automoe: dist.ProcessGroup
    gloo: dist.ProcessGroup


@functools.cache
def group_pairs() -> list[Pair]:
    """Groups of the pool, made at the first call, the same on every rank.

    All ranks, all in reverse order, every second one, and all but the first.
    """
    world = list(range(dist.get_world_size()))
    members = [world, world[::-1], world[::2], world[1:]]
    pairs = []
    for ranks in members:
        ours, gloo = (
            dist.new_group(ranks, backend=backend, sort_ranks=False)
            for backend in ("automoe", "gloo")
        )
        pairs.append(Pair(ranks, ours, gloo))
    return pairs


def start(
    case: Case, rank: int, group: dist.ProcessGroup
) -> Callable[[], list[torch.Tensor]]:
    """Begin a case; the returned call waits and gives the received blocks."""
    sent = case.blocks(rank, sent=True)
    counts = [row[rank] for row in case.rows]
    if case.form == "list":
        received = [
            torch.empty(n, *sent[0].shape[1:], dtype=case.dtype) for n in counts
        ]
        work = dist.all_to_all(received, sent, group=group, async_op=True)
        return lambda: work.wait() and received
    joined = torch.cat([block.view(-1) for block in sent]).view(-1, *sent[0].shape[1:])
    splits = [None, None] if case.equal else [counts, case.rows[rank]]
    out = torch.empty(sum(counts), *sent[0].shape[1:], dtype=case.dtype)
    work = dist.all_to_all_single(out, joined, *splits, group=group, async_op=True)
    return lambda: work.wait() and list(out.split(counts))


def same_bits(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors hold the same bytes, NaNs included."""
    return all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(_bytes_of(a), _bytes_of(b))
        for a, b in zip(tensors, others, strict=True)
    )


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def by_gloo(case: Case, rank: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The blocks that gloo delivers."""
    plain = Case(case.seed, case.dtype, case.columns, case.rows, False, "single")
    return start(plain, rank, group)()


def run_cases(
    seed: int, count: int, max_bytes: int, min_bytes: int = 1
) -> dict[str, int]:
    """Run random cases, up to four at a time in several groups.

    Args:
        max_bytes: of all ranks, of the cases that are under way together.
        min_bytes: of the largest sizes that a case draws.

    Returns:
        how many cases this rank took part in, and how many gloo confirmed.
    """
    shared = random.Random(seed)
    own = random.Random(f"{seed}/{dist.get_rank()}")
    pairs = group_pairs()
    done = {"ran": 0, "by_gloo": 0}
    while count > 0:
        window = min(count, shared.randint(1, 4))
        count -= window
        begun = []
        for _ in range(window):
            pair = shared.choice([pairs[0], *pairs])
            case = draw_case(shared, len(pair.ranks), max_bytes // window, min_bytes)
            if dist.get_rank() not in pair.ranks:
                continue
            if own.random() < 0.05:
                time.sleep(own.uniform(0, 0.02))  # a late rank
            rank = dist.get_rank(pair.automoe)
            begun.append((case, rank, pair, start(case, rank, pair.automoe)))
        for index in own.sample(range(len(begun)), len(begun)):
            case, rank, pair, finish = begun[index]
            received = finish()
            assert same_bits(received, case.blocks(rank, sent=False)), case
            done["ran"] += 1
        for case, rank, pair, _ in begun:
            if case.dtype in GLOO_DTYPES:
                reference = by_gloo(case, rank, pair.gloo)
                assert same_bits(reference, case.blocks(rank, sent=False)), case
                done["by_gloo"] += 1
    return done
