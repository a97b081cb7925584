# SPDX-License-Identifier: Apache-2.0
"""all_to_all_single and all_to_all: the right bytes, in every shape of nodes."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path

import exchange_cases
import numpy
import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from exchange_cases import draw_case, group_pairs, same_bits, start
from own_process import kilobytes_in_use, num_threads

_SHAPES = {
    "1x2": [2],
    "1x8": [8],
    "2x4": [4, 4],
    "4x2": [2, 2, 2, 2],
    "8x1": [1] * 8,
    "3+3+2": [3, 3, 2],
}
_CASES = 168  # 1008 over all shapes


def _on(*fast: str) -> pytest.MarkDecorator:
    """Pools of every shape; those not named are slow."""
    shapes = [
        pytest.param(nodes, id=name, marks=() if name in fast else pytest.mark.slow)
        for name, nodes in _SHAPES.items()
    ]
    return pytest.mark.parametrize("rank_pool", shapes, indirect=True)


# ---- what runs on the ranks ----


def keep_in_flight(count: int) -> int:
    """Post many small exchanges before the first wait; returns how many were right."""
    rank, size = dist.get_rank(), dist.get_world_size()
    column = torch.arange(size, dtype=torch.int64)[:, None]
    posted = []
    for number in range(count):
        sent = (number * size + rank) * size + column.repeat(1, 1 + number % 16)
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, async_op=True)
        posted.append((number, work, received))
    right = 0
    for number, work, received in reversed(posted):
        work.wait()
        expected = (number * size + column) * size + rank
        right += torch.equal(received, expected.expand_as(received))
    return right


def _exchange(group: dist.ProcessGroup, value: int, numel: int, **options: bool):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sent = torch.full((size * numel,), value + rank, dtype=torch.int32)
    received = torch.empty_like(sent)
    work = dist.all_to_all_single(received, sent, group=group, **options)

    def check() -> None:
        if work is not None:
            work.wait()
        expected = (value + torch.arange(size, dtype=torch.int32))[:, None]
        blocks = received.view(size, numel)
        assert torch.equal(blocks, expected.expand_as(blocks))

    return check


def use_groups_from_threads(rounds: int, numel: int) -> int:
    """A thread for each of two groups; which one comes first differs by rank."""
    groups = [pair.automoe for pair in group_pairs()[:2]]
    done = []

    def use(index: int) -> None:
        for turn in range(rounds):
            _exchange(groups[index], 1000 * index + turn, numel)()
        done.append(index)

    threads = [threading.Thread(target=use, args=(index,)) for index in (0, 1)]
    if dist.get_rank() % 2:
        threads.reverse()
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    return len(done)


def post_in_opposite_order(rounds: int, numel: int) -> None:
    """One thread, two groups: ranks post and wait in opposite order."""
    groups = [(index, pair.automoe) for index, pair in enumerate(group_pairs()[:2])]
    if dist.get_rank() % 2:
        groups.reverse()
    for turn in range(rounds):
        checks = [
            _exchange(group, 1000 * index + turn, numel, async_op=True)
            for index, group in groups
        ]
        for check in checks:
            check()


def drop_works(late: int) -> dict[str, bool]:
    """Drop Works and tensors while a rank has not come; others must not notice.

    Returns:
        whether the tensors lived while they were needed, and no longer.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    alive = []

    def post(bytes_per_rank: int) -> None:
        arrays = [numpy.ones(size * bytes_per_rank, dtype=numpy.uint8) for _ in "io"]
        alive.extend(weakref.ref(array) for array in arrays)
        sent, received = map(torch.from_numpy, arrays)
        dist.all_to_all_single(received, sent, async_op=True)  # dropped

    side = dist.new_group(backend="gloo")  # not in the order of the world's calls
    if rank == late:
        # Runs once every other rank has posted and dropped its works.
        dist.barrier(side)
    for bytes_per_rank in (100, 20_000, 300_000):
        post(bytes_per_rank)
    gc.collect()
    lived = rank == late or all(ref() is not None for ref in alive)
    if rank != late:
        dist.barrier(side)
    _exchange(dist.group.WORLD, 5, 1000)()
    deadline = time.monotonic() + 30
    while any(ref() is not None for ref in alive) and time.monotonic() < deadline:
        time.sleep(0.01)
    return {"lived": lived, "gone": all(ref() is None for ref in alive)}


def come_late(late: int, seconds: float) -> None:
    """One rank comes late to exchanges of several sizes that others have posted."""
    if dist.get_rank() == late:
        time.sleep(seconds)
    checks = [
        _exchange(dist.group.WORLD, 100 * number, numel, async_op=True)
        for number, numel in enumerate([1, 1000, 10_000, 300_000, 3])
    ]
    for check in checks:
        check()


def mix_forms(seed: int, count: int) -> int:
    """List and single form meet in one operation, by rank; returns cases run."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rng = random.Random(seed)
    for number in range(count):
        case = draw_case(rng, size, 1 << 20)
        case.equal = False
        case.form = "list" if (rank + number) % 2 else "single"
        received = start(case, rank, dist.group.WORLD)()
        assert same_bits(received, case.blocks(rank, sent=False)), case
    return count


def use_functional(count: int) -> int:
    """The functional form, its autograd, and a module that is differentiated."""
    import torch.distributed._functional_collectives as funcol

    rank, size = dist.get_rank(), dist.get_world_size()
    for number in range(count):
        rows = [[(a + 2 * b + number) % 5 for b in range(size)] for a in range(size)]
        sends, receives = rows[rank], [row[rank] for row in rows]
        sent = torch.randn(sum(sends), 3, dtype=torch.float64, requires_grad=True)
        out = funcol.all_to_all_single(sent, receives, sends, dist.group.WORLD)
        plain = torch.empty(sum(receives), 3, dtype=torch.float64)
        dist.all_to_all_single(plain, sent.detach(), receives, sends)
        assert torch.equal(funcol.wait_tensor(out), plain)

        out = funcol.all_to_all_single_autograd(sent, receives, sends, dist.group.WORLD)
        factor = torch.randn(sum(receives), 3, dtype=torch.float64)
        (out * factor).sum().backward()
        # The gradient of what a rank sent is its receiver's factor, sent back.
        expected = torch.empty_like(sent)
        dist.all_to_all_single(expected, factor, sends, receives)
        assert torch.equal(sent.grad, expected)

        equal = torch.arange(4.0 * size) + rank
        out = funcol.all_to_all_single(equal, None, None, dist.group.WORLD)
        assert torch.equal(
            funcol.wait_tensor(out).view(size, 4),
            torch.arange(4.0) + 4.0 * rank + torch.arange(float(size))[:, None],
        )
    return count


def _in_use() -> dict[str, int]:
    process = Path("/proc/self")
    return {
        "descriptors": len(os.listdir(process / "fd")),
        "threads": num_threads(),
        "mappings": len((process / "maps").read_text().splitlines()),
        "kilobytes": kilobytes_in_use(),
    }


def live_and_die(counts: list[int]) -> list[dict[str, int]]:
    """Make, use and destroy groups; returns what is in use after each number."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, is_master=rank == 0)
    used = []
    for count in counts:
        for turn in range(count):
            dist.init_process_group(
                "automoe",
                store=dist.PrefixStore(f"{len(used)}/{turn}", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=60),
            )
            sub = dist.new_group(list(range(1, size)))
            _exchange(dist.group.WORLD, turn, 20_000)()
            if rank > 0:
                _exchange(sub, turn, 10)()
            dist.destroy_process_group()
        gc.collect()
        used.append(_in_use())
    store.add("ended", 1)
    while rank == 0 and store.add("ended", 0) < size:
        time.sleep(0.01)
    return used


# ---- tests ----


@_on(*_SHAPES)
class TestEveryShape:
    def test_random_cases_equal_gloo(self, rank_pool: RankPool) -> None:
        done = rank_pool.run(exchange_cases.run_cases, 11, _CASES, 8 << 20)
        # Rank 1 is left out of one group of four.
        assert done[1]["ran"] > _CASES // 2
        assert max(it["by_gloo"] for it in done) > _CASES // 4

    def test_a_thousand_exchanges_in_flight(self, rank_pool: RankPool) -> None:
        assert set(rank_pool.run(keep_in_flight, 1000)) == {1000}

    @pytest.mark.parametrize("numel", [5, 30_000])
    def test_groups_used_in_opposite_order(
        self, rank_pool: RankPool, numel: int
    ) -> None:
        assert set(rank_pool.run(use_groups_from_threads, 50, numel)) == {2}
        rank_pool.run(post_in_opposite_order, 50, numel)

    def test_works_dropped_without_wait(self, rank_pool: RankPool) -> None:
        for late in (0, rank_pool.world_size - 1):
            found = rank_pool.run(drop_works, late)
            assert found == [{"lived": True, "gone": True}] * rank_pool.world_size


@_on("1x8", "3+3+2")
class TestSomeShapes:
    @pytest.mark.parametrize("late", [0, -1])
    def test_rank_that_comes_three_seconds_late(
        self, rank_pool: RankPool, late: int
    ) -> None:
        rank_pool.run(come_late, late % rank_pool.world_size, 3.0)

    def test_list_form_meets_single_form(self, rank_pool: RankPool) -> None:
        assert set(rank_pool.run(mix_forms, 3, 30)) == {30}


@pytest.mark.parametrize("rank_pool", [[2, 1]], indirect=True)
def test_functional_form_and_autograd(rank_pool: RankPool) -> None:
    assert set(rank_pool.run(use_functional, 5)) == {5}


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param(nodes, id=name, marks=() if name == "1x2" else pytest.mark.slow)
        for name, nodes in {**_SHAPES, "2+1": [2, 1]}.items()
    ],
)
def test_groups_made_and_destroyed_leave_nothing(nodes: list[int]) -> None:
    with RankPool(nodes, backend=None) as pool:
        for warm, after in pool.run(live_and_die, [10, 50], deadline=300):
            for key in ("descriptors", "threads"):
                assert after[key] <= warm[key], (warm, after)
            # One mapping or 100 kB per group would show.
            assert after["mappings"] <= warm["mappings"] + 20, (warm, after)
            assert after["kilobytes"] <= warm["kilobytes"] + 5_000, (warm, after)


@pytest.mark.slow
@_on(*_SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_random_cases_with_blocks_up_to_64_megabytes(
    rank_pool: RankPool, seed: int
) -> None:
    # With 8 ranks, the largest blocks are an eighth of all bytes.
    rank_pool.run(
        exchange_cases.run_cases, 100 + seed, 20, 512 << 20, 64 << 20, deadline=900
    )
