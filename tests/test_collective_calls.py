# SPDX-License-Identifier: Apache-2.0
"""Collectives under way together, from threads, of objects and sparse tensors."""

from __future__ import annotations

import gc
import random
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from collective_cases import Group, groups
from distributed import RankPool
from exchange_cases import group_pairs, same_bits

_CPU = torch.device("cpu")
_LIMIT = 60.0  # seconds; only a hang takes so long
Posted = tuple[dist.Work, torch.Tensor, torch.Tensor]


# ---- what runs on the ranks: several calls at a time ----


def _post(group: Group, number: int, length: int) -> Posted:
    """Post one of five collectives; its work, its result and what must come."""
    rank, size = group.rank(), group.size()
    ranks = torch.arange(float(size))
    mine = torch.full((length,), float(rank + number))
    kind = number % 5
    if kind == 0:
        work = dist.all_reduce(mine, group=group, async_op=True)
        expected = torch.full((length,), float(ranks.sum()) + size * number)
        return work, mine, expected
    if kind == 1:
        root = number % size
        work = dist.broadcast(mine, group=group, group_src=root, async_op=True)
        return work, mine, torch.full((length,), float(root + number))
    if kind == 2:
        result = torch.zeros(size * length)
        work = dist.all_gather_into_tensor(result, mine, group=group, async_op=True)
        return work, result, (ranks + number).repeat_interleave(length)
    if kind == 3:
        result = torch.zeros(length)
        sent = mine.repeat(size)
        work = dist.reduce_scatter_tensor(result, sent, group=group, async_op=True)
        expected = torch.full((length,), float(ranks.sum()) + size * number)
        return work, result, expected
    result = torch.zeros(size * length)
    sent = mine.repeat(size)
    work = dist.all_to_all_single(result, sent, group=group, async_op=True)
    return work, result, (ranks + number).repeat_interleave(length)


def keep_in_flight(count: int, length: int) -> int:
    """Post many before the first wait, which is the last one's; how many were right."""
    posted = [_post(dist.group.WORLD, number, length) for number in range(count)]
    right = 0
    for work, result, expected in reversed(posted):
        assert work.wait()
        right += torch.equal(result, expected)
    return right


def drop_works(count: int) -> None:
    """Results come without a wait, and memory stays where only the call knows it."""
    kept = []
    for number in range(count):
        length = 10 if number % 2 else 50_000
        _, result, expected = _post(dist.group.WORLD, number, length)
        if number % 3:
            kept.append((result, expected))
    del result, expected
    gc.collect()
    deadline = time.monotonic() + _LIMIT
    for result, expected in kept:
        while not torch.equal(result, expected):
            assert time.monotonic() < deadline, "a dropped work has not ended"
            time.sleep(0.005)
    dist.barrier()


def _in_threads(*calls: Callable[[], object]) -> None:
    errors = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_LIMIT)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def wait_in_threads(count: int) -> None:
    """Works are waited for by other threads than posted them, twice at a time."""
    posted = [_post(dist.group.WORLD, number, 1000) for number in range(count)]

    def wait(works: list[Posted]) -> None:
        for work, result, expected in works:
            assert work.wait()
            assert torch.equal(result, expected)

    _in_threads(lambda: wait(posted), lambda: wait(posted[::-1]))


def use_groups_in_threads(rounds: int) -> None:
    """Each thread has a group of its own; their order differs from rank to rank."""
    pairs = [it for it in group_pairs()[:3] if dist.get_rank() in it.ranks]

    def use(group: Group) -> None:
        pause = random.Random(f"{group.group_name}/{dist.get_rank()}")
        for number in range(rounds):
            if pause.random() < 0.1:
                time.sleep(0.002)
            length = 20_000 if number % 4 == 0 else 30
            work, result, expected = _post(group, number, length)
            work.wait()
            assert torch.equal(result, expected), (group.group_name, number)

    _in_threads(*[lambda group=pair.automoe: use(group) for pair in pairs])


def coalesce_nothing_and_much() -> None:
    """A coalescing manager around no call, and around many."""
    with dist._coalescing_manager(dist.group.WORLD):
        pass
    size = dist.get_world_size()
    tensors = [torch.full((n,), float(n)) for n in range(200)]
    with dist._coalescing_manager(dist.group.WORLD, async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor)
    manager.wait()
    for n, tensor in enumerate(tensors):
        assert torch.equal(tensor, torch.full((n,), float(size * n)))


# ---- barriers ----


def pass_barriers(path: str) -> None:
    """A barrier holds everybody back until the last rank has come."""
    rounds = 0
    for pair in group_pairs():
        if dist.get_rank() not in pair.ranks:
            continue
        for late in pair.ranks:
            if dist.get_rank() == late:
                time.sleep(0.05)
                with open(path, "a") as file:
                    file.write(f"{pair.ranks} {late}\n")
            dist.barrier(pair.automoe)
            with open(path) as file:
                assert f"{pair.ranks} {late}\n" in file.readlines(), "passed too early"
            assert dist.barrier(pair.automoe, async_op=True).wait()
            rounds += 1
    assert rounds >= 4


def miss_monitored_barrier(missing: list[int], wait_all: bool) -> str:
    """Some ranks do not come to a monitored barrier; what the others are told."""
    group = dist.new_group(backend="automoe", timeout=timedelta(seconds=20))
    backend = group._get_backend(_CPU)
    backend.monitored_barrier(timedelta(seconds=20), wait_all)
    text = "did not come"
    if dist.get_rank() not in missing:
        text = "no error"
        try:
            backend.monitored_barrier(timedelta(seconds=1), wait_all)
        except RuntimeError as error:
            text = str(error)
    dist.barrier()
    dist.destroy_process_group(group)
    return text


# ---- objects and sparse tensors ----


def move_objects() -> None:
    """Collectives of Python objects, and messages of them."""
    for pair in groups():
        if dist.get_rank() not in pair.ranks:
            continue
        group, size = pair.automoe, len(pair.ranks)
        rank = dist.get_rank(group)
        mine = {"rank": rank, "text": "x" * (10_000 * rank)}
        everyone = [{"rank": r, "text": "x" * (10_000 * r)} for r in range(size)]
        gathered = [None] * size
        dist.all_gather_object(gathered, mine, group=group)
        assert gathered == everyone
        root = size - 1
        gathered = [None] * size if rank == root else None
        dist.gather_object(mine, gathered, group=group, group_dst=root)
        assert rank != root or gathered == everyone
        objects = [mine, rank] if rank == root else [None, None]
        dist.broadcast_object_list(objects, group=group, group_src=root)
        assert objects == [everyone[root], root]
        scattered = [None]
        inputs = everyone if rank == root else None
        dist.scatter_object_list(scattered, inputs, group=group, group_src=root)
        assert scattered == [mine]
        if size > 1 and rank == 0:
            dist.send_object_list([mine, 5], group=group, group_dst=1)
        elif rank == 1:
            objects = [None, None]
            dist.recv_object_list(objects, group=group, group_src=0)
            assert objects == [everyone[0], 5]


def _sparse_tensors(rank: int) -> dict[str, torch.Tensor]:
    def entries(indices: list[int], dtype: torch.dtype = torch.float32, *dense: int):
        values = torch.ones(len(indices), *dense, dtype=dtype)
        shape = (40, *dense)
        index = torch.tensor([indices], dtype=torch.int64)
        return torch.sparse_coo_tensor(index, values, shape)

    return {
        "all empty": entries([]),
        "one empty": entries([1, 2] if rank else []),
        "more on later ranks": entries(list(range(3 * rank))),
        "all there": entries(list(range(40))),
        "same index twice": entries([5, 5, rank]),
        "rows": entries([rank, 7], torch.float64, 3),
        "integers": entries([rank, 7], torch.int64),
        "matrix": torch.eye(6 + 0 * rank).mul(rank).to_sparse(),
    }


def reduce_sparse() -> None:
    """all_reduce of sparse tensors, by us and by gloo."""
    for pair in groups():
        if dist.get_rank() not in pair.ranks:
            continue
        for name in _sparse_tensors(0):
            results = []
            for group in (pair.automoe, pair.gloo):
                tensor = _sparse_tensors(group.rank())[name]
                dist.all_reduce(tensor, group=group)
                assert tensor.is_coalesced(), name
                results.append([tensor.indices(), tensor.values()])
            assert same_bits(*results), (name, pair.ranks, results)


def reduce_sparse_wrongly() -> list[str]:
    """Shapes that differ, and an operation that is not defined."""
    texts = []
    for rows, op in ((8 + (dist.get_rank() == 1), "SUM"), (8, "MAX")):
        tensor = torch.sparse_coo_tensor([[1]], [1.0], (rows,))
        try:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
            texts.append("no error")
        except ValueError as error:
            texts.append(str(error))
    dist.barrier()
    return texts


# ---- tests ----


@pytest.mark.parametrize("rank_pool", [[2, 1, 1]], indirect=True)
class TestCalls:
    @pytest.mark.parametrize(("count", "length"), [(1000, 3), (40, 30_000)])
    def test_many_in_flight(self, rank_pool: RankPool, count: int, length: int) -> None:
        assert rank_pool.run(keep_in_flight, count, length) == [count] * 4

    def test_dropped_works(self, rank_pool: RankPool) -> None:
        rank_pool.run(drop_works, 100)

    def test_waits_of_other_threads(self, rank_pool: RankPool) -> None:
        rank_pool.run(wait_in_threads, 100)

    def test_groups_in_threads(self, rank_pool: RankPool) -> None:
        rank_pool.run(use_groups_in_threads, 60)

    def test_coalescing(self, rank_pool: RankPool) -> None:
        rank_pool.run(coalesce_nothing_and_much)

    def test_barriers(self, rank_pool: RankPool, tmp_path) -> None:
        path = tmp_path / "arrivals"
        path.touch()
        rank_pool.run(pass_barriers, str(path))

    @pytest.mark.parametrize(
        ("missing", "wait_all", "named"),
        [
            ([3], False, "Rank 3"),
            ([3], True, "Rank 3"),
            ([1, 3], False, "Rank 1"),
            ([1, 3], True, "Ranks 1, 3"),
        ],
    )
    def test_monitored_barriers_name_who_is_missing(
        self, rank_pool: RankPool, missing: list[int], wait_all: bool, named: str
    ) -> None:
        texts = rank_pool.run(miss_monitored_barrier, missing, wait_all)
        for rank, text in enumerate(texts):
            if rank in missing:
                assert text == "did not come"
            else:
                assert f"{named} failed to pass monitoredBarrier" in text

    def test_objects(self, rank_pool: RankPool) -> None:
        rank_pool.run(move_objects)

    def test_sparse_tensors(self, rank_pool: RankPool) -> None:
        rank_pool.run(reduce_sparse)

    def test_sparse_tensors_that_cannot_be_added(self, rank_pool: RankPool) -> None:
        for shapes, operation in rank_pool.run(reduce_sparse_wrongly):
            assert re.search(r"rank \d has another shape than that of rank \d", shapes)
            assert "only SUM is defined for sparse tensors" in operation
