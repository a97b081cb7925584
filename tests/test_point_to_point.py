# SPDX-License-Identifier: Apache-2.0
"""send and recv: which message a receive gets, in which order, and what fails.

Bytes of every dtype and size go round a ring in test_collectives.py.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from collective_cases import Group
from collective_values import LARGE, Tensors
from distributed import RankPool
from exchange_cases import group_pairs, same_bits

_LENGTHS = [0, 1, 7, 3_000, LARGE, 400_000]


# ---- what runs on the ranks ----


def _numbers(group: Group, length: int, salt: int = 0) -> torch.Tensor:
    return torch.arange(length) + 1_000_000 * group.rank() + 1000 * salt


def _neighbours(group: Group) -> tuple[int, int]:
    rank, size = group.rank(), group.size()
    return (rank - 1) % size, (rank + 1) % size


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        assert work.wait()


def _tags(group: Group) -> Tensors:
    """Receives in another order than their messages are sent."""
    before, after = _neighbours(group)
    received = {}
    works = []
    for tag in (5, 1, 2**31 - 1, 0):
        received[tag] = torch.zeros(tag % 97, dtype=torch.int64)
        works.append(dist.irecv(received[tag], group=group, group_src=before, tag=tag))
    for tag in sorted(received):
        tensor = _numbers(group, tag % 97, tag % 97)
        works.append(dist.isend(tensor, group=group, group_dst=after, tag=tag))
    _wait(works)
    return list(received.values())


def _order(group: Group) -> Tensors:
    """Messages of one tag keep their order, whatever their sizes; none is expected."""
    before, after = _neighbours(group)
    lengths = [*_LENGTHS, *reversed(_LENGTHS)]
    works = [
        dist.isend(_numbers(group, length, salt), group=group, group_dst=after)
        for salt, length in enumerate(lengths)
    ]
    dist.barrier(group)
    received = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    for tensor in received:
        dist.recv(tensor, group=group, group_src=before)
    _wait(works)
    return received


def _any_source(group: Group) -> Tensors:
    """To the first rank; large and small ones, on two tags."""
    rank, size = group.rank(), group.size()
    if rank > 0:
        works = []
        for tag, length in ((3, 2), (4, LARGE)):
            tensor = _numbers(group, length, tag)
            works.append(dist.isend(tensor, group=group, group_dst=0, tag=tag))
        _wait(works)
        return []
    received = {}
    for tag, length in ((4, LARGE), (3, 2)):
        for _ in range(size - 1):
            tensor = torch.zeros(length, dtype=torch.int64)
            source = dist.recv(tensor, None, group=group, tag=tag)
            assert dist.get_group_rank(group, source) == int(tensor[0]) // 1_000_000
            received[tag, source] = tensor
    assert len(received) == 2 * (size - 1)
    return [received[key] for key in sorted(received)]


def _any_source_works(group: Group) -> Tensors:
    """Receives from anybody that are posted before anybody sends."""
    rank, size = group.rank(), group.size()
    if rank == 0:
        received = [torch.zeros(9, dtype=torch.int64) for _ in range(size - 1)]
        works = [dist.irecv(it, None, group=group) for it in received]
        dist.barrier(group)
        _wait(works)
        sources = [work._source_rank() for work in works]
        assert sources == [int(it[0]) // 1_000_000 for it in received]
        return sorted(received, key=lambda it: int(it[0]))
    dist.barrier(group)
    dist.send(_numbers(group, 9), group=group, group_dst=0)
    return []


def _batch(group: Group) -> Tensors:
    """From all to all; both orders occur: some ranks list their sends first."""
    rank, size = group.rank(), group.size()
    received = [torch.zeros(100 + rank, dtype=torch.int64) for _ in range(size)]
    sends, receives = [], []
    for peer in range(size):
        if peer != rank:
            tensor = _numbers(group, 100 + peer, peer)
            sends.append(
                dist.P2POp(dist.isend, tensor, group=group, group_peer=peer, tag=peer)
            )
            receives.append(
                dist.P2POp(
                    dist.irecv, received[peer], group=group, group_peer=peer, tag=rank
                )
            )
    _wait(dist.batch_isend_irecv(sends + receives if rank % 2 else receives + sends))
    return received


def _many(group: Group) -> Tensors:
    """A thousand messages are under way."""
    before, after = _neighbours(group)
    received = [torch.zeros(3, dtype=torch.int64) for _ in range(500)]
    works = []
    for number, tensor in enumerate(received):
        tag = number % 7
        works.append(dist.irecv(tensor, group=group, group_src=before, tag=tag))
        sent = _numbers(group, 3, number)
        works.append(dist.isend(sent, group=group, group_dst=after, tag=tag))
    _wait(works[::-1])
    return received


def _beside_collectives(group: Group) -> Tensors:
    """Messages between collectives, which do not wait for one another."""
    before, after = _neighbours(group)
    received = [torch.zeros(LARGE, dtype=torch.int64) for _ in range(5)]
    works = []
    for number, tensor in enumerate(received):
        works.append(dist.irecv(tensor, group=group, group_src=before))
        total = torch.ones(LARGE)
        works.append(dist.all_reduce(total, group=group, async_op=True))
        sent = _numbers(group, LARGE, number)
        works.append(dist.isend(sent, group=group, group_dst=after))
    _wait(works)
    assert (total == group.size()).all()
    return received


_TALKS: dict[str, Callable[[Group], Tensors]] = {
    "tags": _tags,
    "order": _order,
    "any source": _any_source,
    "any source, posted": _any_source_works,
    "batch": _batch,
    "many": _many,
    "beside collectives": _beside_collectives,
}


def talk(name: str) -> int:
    """One of the above in every group, by us and by gloo; how many were compared."""
    compared = 0
    for pair in group_pairs():
        if dist.get_rank() in pair.ranks and len(pair.ranks) > 1:
            ours, reference = (
                _TALKS[name](group) for group in (pair.automoe, pair.gloo)
            )
            assert same_bits(ours, reference), (name, pair.ranks, ours, reference)
            compared += 1
    return compared


def drop_sends() -> None:
    """Sends whose works and tensors nobody keeps arrive."""
    group = dist.group.WORLD
    before, after = _neighbours(group)
    for number in range(20):
        dist.isend(_numbers(group, LARGE, number), after)
    for number in range(20):
        received = torch.zeros(LARGE, dtype=torch.int64)
        dist.recv(received, before)
        expected = torch.arange(LARGE) + 1_000_000 * before + 1000 * number
        assert torch.equal(received, expected)


def _error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def call_wrongly() -> list[str]:
    """Calls that raise at once, and change nothing."""
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    rank, size = dist.get_rank(), dist.get_world_size()
    one = torch.ones(1)
    calls = [
        lambda: backend.send([one], rank, 0),
        lambda: backend.send([one], size, 0),
        lambda: backend.recv([one], -1, 0),
        lambda: backend.send([one], (rank + 1) % size, -3),
        lambda: backend.send([one, one], (rank + 1) % size, 0),
        lambda: backend.recv([one.to_sparse()], (rank + 1) % size, 0),
    ]
    texts = [_error_of(call) for call in calls]
    drop_sends()
    return texts


def expect_another_size(sent: int, expected: int, dtype: torch.dtype) -> str:
    """Rank 1 receives from rank 0 what was not sent; what each rank is told."""
    group = dist.new_group(backend="automoe", timeout=timedelta(seconds=30))

    def use() -> None:
        if dist.get_rank() == 0:
            dist.send(torch.ones(sent), 1, group=group)
        elif dist.get_rank() == 1:
            dist.recv(torch.ones(expected, dtype=dtype), 0, group=group)
        else:
            time.sleep(0.01)
        dist.all_reduce(torch.ones(2), group=group)

    text = _error_of(use)
    dist.barrier()
    dist.destroy_process_group(group)
    return text


# ---- tests ----


@pytest.mark.parametrize("rank_pool", [[2, 1, 1]], indirect=True)
class TestMessages:
    @pytest.mark.parametrize("name", _TALKS)
    def test_as_gloo(self, rank_pool: RankPool, name: str) -> None:
        assert min(rank_pool.run(talk, name)) >= 2

    def test_dropped_sends(self, rank_pool: RankPool) -> None:
        rank_pool.run(drop_sends)

    def test_bad_arguments_are_named_and_change_nothing(
        self, rank_pool: RankPool
    ) -> None:
        first, *_ = rank_pool.run(call_wrongly)
        words = [
            "ValueError: send: dst is 0, expected another rank",
            "ValueError: send: dst is 4, expected another rank",
            "ValueError: recv: src is -1, expected a rank",
            "ValueError: send: tag is -3, expected a number >= 0",
            "ValueError: send: got 2 tensors, expected one",
            "ValueError: recv: a tensor has the layout Sparse",
        ]
        for text, word in zip(first, words, strict=True):
            assert word in text

    @pytest.mark.parametrize(
        ("sent", "expected", "dtype", "words"),
        [
            (5, 3, torch.float32, ["20", "12"]),
            (0, 3, torch.float32, ["0", "12"]),
            (LARGE, 3, torch.float32, [str(4 * LARGE), "12"]),
            (3, LARGE, torch.float32, [str(4 * LARGE), "12"]),
            (4, 4, torch.int32, ["Float", "Int"]),
        ],
        ids=str,
    )
    def test_another_message_than_expected(
        self,
        rank_pool: RankPool,
        sent: int,
        expected: int,
        dtype: torch.dtype,
        words: list[str],
    ) -> None:
        results = rank_pool.run(expect_another_size, sent, expected, dtype)
        for text in results:
            assert text.startswith("ValueError"), results
            for word in ["rank 0", "rank 1", *words]:
                assert re.search(rf"\b{word}\b", text), results
