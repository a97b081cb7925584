# SPDX-License-Identifier: Apache-2.0
"""Every collective of c10d but all-to-all: the same bits as gloo's, in many groups."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from exchange_cases import group_pairs, same_bits

_CPU = torch.device("cpu")
_FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
_INTEGERS = [torch.int8, torch.uint8, torch.int32, torch.int64]
_DTYPES = [*_FLOATS, *_INTEGERS, torch.bool]
_OPS = {  # op -> what gloo reduces with it
    **dict.fromkeys(["SUM", "PRODUCT", "MIN", "MAX"], _DTYPES),
    **dict.fromkeys(["BAND", "BOR", "BXOR"], [*_INTEGERS, torch.bool]),
    "AVG": _FLOATS,
}
_SIZES = [0, 1, 7, 20_001]

Group = dist.ProcessGroup
Tensors = list[torch.Tensor]


def _data(group: Group, dtype: torch.dtype, size: int, salt: int = 0) -> torch.Tensor:
    """Numbers that differ by rank; small, so that no reduction overflows."""
    start = 3 * dist.get_rank(group) + salt
    return ((torch.arange(size) + start) % 5 + (0 if dtype is torch.bool else 1)).to(
        dtype
    )


def _like(tensor: torch.Tensor, count: int) -> Tensors:
    return [torch.zeros_like(tensor) for _ in range(count)]


# ---- collectives: (group, dtype, size, op) -> what this rank received ----


def broadcast(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    results = []
    for source in range(dist.get_world_size(group)):
        tensor = _data(group, dtype, size)
        dist.broadcast(tensor, group=group, group_src=source)
        results.append(tensor)
    return results


def all_reduce(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    tensor = _data(group, dtype, size)
    work = dist.all_reduce(tensor, op, group=group, async_op=True)
    assert work.wait()
    assert work.is_completed()
    return [tensor, *work.get_future().value()]


def reduce(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    results = []
    for root in range(dist.get_world_size(group)):
        tensor = _data(group, dtype, size)
        dist.reduce(tensor, op=op, group=group, group_dst=root)
        if dist.get_rank(group) == root:  # elsewhere it is undefined
            results.append(tensor)
    return results


def all_gather(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    tensor = _data(group, dtype, size)
    outputs = _like(tensor, dist.get_world_size(group))
    dist.all_gather(outputs, tensor, group=group)
    return outputs


def all_gather_into_tensor(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    tensor = _data(group, dtype, size)
    output = torch.zeros(dist.get_world_size(group) * size, dtype=dtype)
    dist.all_gather_into_tensor(output, tensor, group=group)
    return [output]


def all_gather_coalesced(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    tensors = [_data(group, dtype, size + i, salt=i) for i in range(3)]
    ranks = range(dist.get_world_size(group))
    outputs = [[torch.zeros_like(it) for it in tensors] for _ in ranks]
    dist.all_gather_coalesced(outputs, tensors, group=group)
    return [tensor for output in outputs for tensor in output]


def gather(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    results = []
    for root in range(dist.get_world_size(group)):
        tensor = _data(group, dtype, size)
        outputs = None
        if dist.get_rank(group) == root:
            outputs = _like(tensor, dist.get_world_size(group))
        dist.gather(tensor, outputs, group=group, group_dst=root)
        results += outputs or []
    return results


def scatter(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    results = []
    ranks = range(dist.get_world_size(group))
    for root in ranks:
        tensor = torch.zeros(size, dtype=dtype)
        inputs = None
        if dist.get_rank(group) == root:
            inputs = [_data(group, dtype, size, salt=rank) for rank in ranks]
        dist.scatter(tensor, inputs, group=group, group_src=root)
        results.append(tensor)
    return results


def reduce_scatter(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    ranks = range(dist.get_world_size(group))
    output = torch.zeros(size, dtype=dtype)
    inputs = [_data(group, dtype, size, salt=rank) for rank in ranks]
    dist.reduce_scatter(output, inputs, op, group=group)
    return [output]


def reduce_scatter_tensor(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    output = torch.zeros(size, dtype=dtype)
    tensor = _data(group, dtype, size * dist.get_world_size(group))
    dist.reduce_scatter_tensor(output, tensor, op, group=group)
    return [output]


def all_reduce_coalesced(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    tensors = [_data(group, dtype, size + i, salt=i) for i in range(3)]
    dist.all_reduce_coalesced(tensors, op, group=group)
    return tensors


def coalescing_manager(group: Group, dtype: torch.dtype, size: int, op) -> Tensors:
    """The three collectives that it joins into one call."""
    ranks = dist.get_world_size(group)
    reduced = [_data(group, dtype, size + i, salt=i) for i in range(3)]
    with dist._coalescing_manager(group):
        for tensor in reduced:
            dist.all_reduce(tensor, op, group=group)
    gathered = [torch.zeros(ranks * (size + i), dtype=dtype) for i in range(3)]
    with dist._coalescing_manager(group, async_ops=True) as manager:
        for i, output in enumerate(gathered):
            tensor = _data(group, dtype, size + i)
            dist.all_gather_into_tensor(output, tensor, group=group)
    manager.wait()
    scattered = [torch.zeros(size + i, dtype=dtype) for i in range(3)]
    with dist._coalescing_manager(group):
        for i, output in enumerate(scattered):
            tensor = _data(group, dtype, ranks * (size + i))
            dist.reduce_scatter_tensor(output, tensor, op, group=group)
    return reduced + gathered + scattered


_MOVING = [
    broadcast,
    all_gather,
    all_gather_into_tensor,
    all_gather_coalesced,
    gather,
    scatter,
]
_REDUCING = [
    all_reduce,
    reduce,
    reduce_scatter,
    reduce_scatter_tensor,
    all_reduce_coalesced,
    coalescing_manager,
]


def compare(collective: Callable[..., Tensors], ops: Iterable[str]) -> int:
    """A collective in every dtype and size, by us and by gloo; SUM in every group.

    Returns:
        how many results were compared.
    """
    compared = 0
    for index, pair in enumerate(group_pairs()):
        if dist.get_rank() not in pair.ranks:
            continue
        for op in ops if index == 1 else ["SUM"]:  # 1: all ranks in reverse order
            for dtype in _OPS[op]:
                for size in _SIZES:
                    ours, reference = (
                        collective(group, dtype, size, getattr(dist.ReduceOp, op))
                        for group in (pair.automoe, pair.gloo)
                    )
                    where = (pair.ranks, op, dtype, size, ours, reference)
                    assert same_bits(ours, reference), where
                    compared += len(ours)
    return compared


def refuse_as_gloo() -> list[str]:
    """What gloo refuses raises; the group goes on, as gloo does."""
    size = dist.get_world_size()
    texts = []
    for backend in ("automoe", "gloo"):
        group = dist.new_group(backend=backend)
        try:
            dist.all_reduce(torch.ones(3), dist.ReduceOp.BAND, group=group)
        except RuntimeError as error:
            texts.append(str(error).splitlines()[0])
        received = torch.empty(size)
        dist.all_to_all_single(received, torch.ones(size), group=group)
        total = torch.ones(3)
        dist.all_reduce(total, group=group)
        assert total.tolist() == [size] * 3
        dist.destroy_process_group(group)
    return texts


# ---- point to point ----


def send_and_receive() -> int:
    """Rings, tags out of order, any source, batches: the same in both groups."""
    compared = 0
    for pair in group_pairs():
        if dist.get_rank() not in pair.ranks or len(pair.ranks) < 2:
            continue
        for talk in (_ring, _tags, _any_source, _batch):
            ours, reference = talk(pair.automoe), talk(pair.gloo)
            assert same_bits(ours, reference), (talk.__name__, ours, reference)
            compared += len(ours)
    return compared


def _neighbours(group: Group) -> tuple[int, int]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return (rank - 1) % size, (rank + 1) % size


def _ring(group: Group) -> Tensors:
    before, after = _neighbours(group)
    results = []
    for dtype in _DTYPES:
        for size in _SIZES:
            received = torch.zeros(size, dtype=dtype)
            sending = dist.isend(
                _data(group, dtype, size), group=group, group_dst=after
            )
            dist.recv(received, group=group, group_src=before)
            sending.wait()
            results.append(received)
    return results


def _tags(group: Group) -> Tensors:
    before, after = _neighbours(group)
    tags = [5, 1, 9]
    received = [torch.zeros(tag) for tag in tags]
    works = [
        dist.irecv(it, group=group, group_src=before, tag=tag)
        for tag, it in zip(tags, received, strict=True)
    ]
    for tag in sorted(tags):
        tensor = _data(group, torch.float32, tag, salt=tag)
        works.append(dist.isend(tensor, group=group, group_dst=after, tag=tag))
    for work in works:
        work.wait()
    return received


def _any_source(group: Group) -> Tensors:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank > 0:
        dist.send(torch.tensor([float(rank)]), group=group, group_dst=0, tag=3)
        return []
    received = {}
    for _ in range(size - 1):
        tensor = torch.zeros(1)
        source = dist.recv(tensor, None, group=group, tag=3)
        received[source] = tensor
        assert dist.get_group_rank(group, source) == int(tensor)
    return [received[source] for source in sorted(received)]


def _batch(group: Group) -> Tensors:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    received = [torch.zeros(100 + rank) for _ in range(size)]
    sends, receives = [], []
    for peer in range(size):
        if peer != rank:
            tensor = _data(group, torch.float32, 100 + peer, salt=peer)
            sends.append(dist.P2POp(dist.isend, tensor, group=group, group_peer=peer))
            receives.append(
                dist.P2POp(dist.irecv, received[peer], group=group, group_peer=peer)
            )
    # Both orders occur: some ranks list their sends first.
    operations = sends + receives if rank % 2 else receives + sends
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


# ---- objects, barriers, sparse tensors ----


def move_objects() -> None:
    """Collectives of Python objects, and point to point ones."""
    for pair in group_pairs():
        if dist.get_rank() not in pair.ranks:
            continue
        group, size = pair.automoe, len(pair.ranks)
        rank = dist.get_rank(group)
        mine = {"rank": rank, "text": "x" * (10 * rank)}
        everyone = [{"rank": r, "text": "x" * (10 * r)} for r in range(size)]
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


def pass_barriers(path: str) -> list[str]:
    """Barriers hold everybody back; a monitored one names who is missing."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for group in [pair.automoe for pair in group_pairs()[:2]]:
        if rank == 1:
            time.sleep(0.3)
            with open(path, "a") as file:
                file.write("here\n")
        dist.barrier(group)
        with open(path) as file:
            assert file.read(), "a barrier was passed before rank 1 had come"
        work = dist.barrier(group, async_op=True)
        assert work.wait()
    texts = []
    for wait_all in (False, True):
        group = dist.new_group(backend="automoe", timeout=timedelta(seconds=10))
        backend = group._get_backend(_CPU)
        backend.monitored_barrier(timedelta(seconds=10), wait_all)
        text = "no error"
        if rank != size - 1:
            try:
                backend.monitored_barrier(timedelta(seconds=1), wait_all)
            except RuntimeError as error:
                text = str(error)
        texts.append(text)
        dist.barrier()
        dist.destroy_process_group(group)
    return texts


def reduce_sparse() -> None:
    """all_reduce of sparse tensors."""
    pair = group_pairs()[0]
    indices = torch.tensor([[0, 1 + dist.get_rank()]])
    results = []
    for group in (pair.automoe, pair.gloo):
        tensor = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0]), (16,))
        dist.all_reduce(tensor, group=group)
        results.append(tensor.coalesce().to_dense())
    assert same_bits([results[0]], [results[1]])
    assert results[0][0] == dist.get_world_size()


def mix_with_exchanges(rounds: int) -> None:
    """Collectives and all-to-alls of one group under way together."""
    rank, size = dist.get_rank(), dist.get_world_size()
    works, outputs = [], []
    for number in range(rounds):
        total = torch.full((1000,), float(rank + number))
        works.append(dist.all_reduce(total, async_op=True))
        received = torch.empty(size * 500)
        sent = torch.full((size * 500,), float(rank + number))
        works.append(dist.all_to_all_single(received, sent, async_op=True))
        outputs.append((number, total, received))
    for work in reversed(works):
        work.wait()
    for number, total, received in outputs:
        assert (total == sum(range(size)) + size * number).all()
        expected = (torch.arange(float(size)) + number)[:, None].expand(size, 500)
        assert torch.equal(received.view(size, 500), expected)


# ---- tests ----


@pytest.mark.parametrize("rank_pool", [[2, 1, 1]], indirect=True)
class TestCollectives:
    @pytest.mark.parametrize("collective", _MOVING, ids=lambda it: it.__name__)
    def test_moves_what_gloo_moves(self, rank_pool: RankPool, collective) -> None:
        assert min(rank_pool.run(compare, collective, ["SUM"])) > 0

    @pytest.mark.parametrize("collective", _REDUCING, ids=lambda it: it.__name__)
    def test_reduces_as_gloo_does(self, rank_pool: RankPool, collective) -> None:
        assert min(rank_pool.run(compare, collective, list(_OPS))) > 0

    def test_refuses_what_gloo_refuses(self, rank_pool: RankPool) -> None:
        for ours, reference in rank_pool.run(refuse_as_gloo):
            assert reference in ours

    def test_point_to_point(self, rank_pool: RankPool) -> None:
        assert min(rank_pool.run(send_and_receive)) > 50

    def test_objects(self, rank_pool: RankPool) -> None:
        rank_pool.run(move_objects)

    def test_barriers(self, rank_pool: RankPool, tmp_path) -> None:
        path = tmp_path / "arrivals"
        path.touch()
        first, *_ = rank_pool.run(pass_barriers, str(path))
        for text in first:
            assert re.search(r"Ranks? 3 failed to pass monitoredBarrier", text)

    def test_sparse_all_reduce(self, rank_pool: RankPool) -> None:
        rank_pool.run(reduce_sparse)

    def test_beside_exchanges(self, rank_pool: RankPool) -> None:
        rank_pool.run(mix_with_exchanges, 50)
