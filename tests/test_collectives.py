# SPDX-License-Identifier: Apache-2.0
"""Every collective of c10d: the same bits as gloo's, in every dtype, op and group."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.distributed as dist
from collective_cases import (
    COLLECTIVES,
    Group,
    cover_pairs,
    gloo_lacks,
    groups,
    plan,
    rows,
)
from collective_values import FLOATS, LARGE, Case, Tensors, combine, make_op
from distributed import RankPool
from exchange_cases import same_bits

_IN_PLACE = ["broadcast", "all_reduce", "reduce"]
# Tensors that are not contiguous: all-to-alls refuse them, see test_exchange_errors.py;
# gloo refuses to send them, and elsewhere writes over what lies between the elements.
_REFUSE_STRIDES = {"all_to_all", "all_to_all_single"}
_NOT_IN_GLOO = {"send_and_recv", "scatter", "reduce_scatter", *_IN_PLACE}


# ---- what runs on the ranks ----


def _as_numbers(tensors: Tensors) -> Tensors:
    """Gloo adds the bytes of bools: what is not 0 counts as true."""
    return [
        tensor.contiguous().view(torch.uint8) != 0
        if tensor.dtype is torch.bool
        else tensor
        for tensor in tensors
    ]


def _compare(name: str, case: Case, index: int, by_gloo: bool) -> str:
    """One case by us, computed here, and where that is asked for by gloo."""
    pair = groups()[index]
    if dist.get_rank() not in pair.ranks:
        return "elsewhere"
    collective, group = COLLECTIVES[name], pair.automoe
    expected = collective.expect(case, group.rank(), group.size())
    ours = collective.run(case, group)
    where = (name, case, pair.ranks, ours, expected)
    assert same_bits(ours, expected), where
    if not by_gloo:
        return "computed"
    reference = _as_numbers(collective.run(case, pair.gloo))
    assert same_bits(ours, reference), (where, reference)
    return "gloo"


def compare(name: str, every: bool) -> dict[str, int]:
    """A collective in every case of ``plan``.

    Returns:
        how many cases of this rank were compared with what.
    """
    counts = dict.fromkeys(["gloo", "computed", "elsewhere"], 0)
    for case, index in plan(name, len(groups()), every=every):
        by_gloo = not gloo_lacks(name, case.dtype, case.op)
        counts[_compare(name, case, index, by_gloo)] += 1
    return counts


def compare_strided(name: str) -> int:
    """A collective of tensors that are not contiguous; returns the number of cases."""
    layouts = ["both"]
    if not any(name.startswith(it) for it in _IN_PLACE):
        layouts += ["inputs", "outputs"]
    op = "SUM" if COLLECTIVES[name].reduces else None
    count = 0
    for layout in layouts:
        for dtype in (torch.float32, torch.int64, torch.bool):
            for size in (7, LARGE):
                _compare(
                    name, Case(dtype, op, size, layout), 1, name not in _NOT_IN_GLOO
                )
                count += 1
    return count


def lacking_rows(name: str) -> tuple[list, list]:
    """The rows of a collective that gloo refuses, and those that it should."""
    found, told = [], []
    for dtype, op in rows(name):
        row = (str(dtype), op)
        if gloo_lacks(name, dtype, op):
            told.append(row)
        try:
            COLLECTIVES[name].run(Case(dtype, op, 8), groups()[0].gloo)
        except (RuntimeError, ValueError):  # on all ranks, before or after the sum
            found.append(row)
    return found, told


def _all_reduce(group: Group, tensor: torch.Tensor, op: str) -> torch.Tensor:
    result = tensor.clone()
    dist.all_reduce(result, make_op(op), group=group)
    return result


def reduce_extremes() -> int:
    """Overflows wrap around; infinities and NaNs stay; every rank has the same bits."""
    group, size = dist.group.WORLD, dist.get_world_size()
    checked = 0
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int64, torch.uint64):
        limits = torch.iinfo(dtype)
        numbers = [limits.max, limits.min, limits.max // 3, 1]
        inputs = [
            torch.tensor(numbers[rank % 4 :] + numbers[: rank % 4], dtype=dtype)
            for rank in range(size)
        ]
        for op in ("SUM", "PRODUCT", "MIN", "MAX", "AVG", "BXOR"):
            result = _all_reduce(group, inputs[dist.get_rank()], op)
            assert same_bits([result], [combine(op, inputs)]), (dtype, op, result)
            checked += 1
    nan, infinity = math.nan, math.inf
    numbers = [nan, infinity, -infinity, 1.0, -2.0, -0.0]
    for dtype in FLOATS:
        for length in (6, 4099):
            inputs = [
                torch.tensor(numbers, dtype=dtype).roll(2 * rank).repeat(length)
                for rank in range(size)
            ]
            for op in ("SUM", "PRODUCT", "MIN", "MAX", "AVG"):
                result = _all_reduce(group, inputs[dist.get_rank()], op)
                expected = combine(op, inputs)
                same = torch.equal(result.nan_to_num(9.5), expected.nan_to_num(9.5))
                assert same, (dtype, op, result, expected)
                checked += 1
    return checked


def sum_anything() -> int:
    """Random numbers: right within their rounding, equal bits everywhere, always."""
    group, size = dist.group.WORLD, dist.get_world_size()
    checked = 0
    for dtype in FLOATS:
        # Sums inside a node and then over nodes are rounded once each.
        tolerance = 4 * size * torch.finfo(dtype).eps
        for length in (1, 100, 4096, 4097, LARGE, 300_000):
            inputs = [
                torch.randn(
                    length,
                    dtype=torch.float64,
                    generator=torch.Generator().manual_seed(rank),
                ).to(dtype)
                for rank in range(size)
            ]
            exact = sum(it.double() for it in inputs)
            result = _all_reduce(group, inputs[dist.get_rank()], "SUM")
            torch.testing.assert_close(
                result.double(), exact, rtol=tolerance, atol=tolerance
            )
            again = _all_reduce(group, inputs[dist.get_rank()], "SUM")
            everywhere = [torch.empty_like(result) for _ in range(size)]
            dist.all_gather(everywhere, result, group=group)
            assert same_bits([result] * size, everywhere)
            assert same_bits([result], [again])
            checked += 1
    return checked


def _transposed(rank: int) -> torch.Tensor:
    """Dense, but in another order than its elements'."""
    return (torch.arange(15.0).reshape(3, 5) + 100 * rank).t()


def use_shapes() -> None:
    """Shapes and memory of tensors that callers pass, by us and by gloo."""
    for pair in groups():
        if dist.get_rank() not in pair.ranks:
            continue
        calls = [
            *[functools.partial(_shared_outputs, size) for size in (4, LARGE)],
            _transposed_results,
            _expanded_input,
            _no_dimension,
        ]
        for call in calls:
            ours, reference = call(pair.automoe), call(pair.gloo)
            assert same_bits(ours, reference), (call, ours, reference)
        _stacked(pair.automoe)
        _in_place(pair.automoe)
        _uneven_lists(pair.automoe)


def _shared_outputs(size: int, group: Group) -> Tensors:
    """One tensor as the output for every rank: the last one's stays."""
    output = torch.zeros(size)
    tensor = torch.full((size,), 1.0 + group.rank())
    dist.all_gather([output] * group.size(), tensor, group=group)
    return [output]


def _transposed_results(group: Group) -> Tensors:
    size, rank = group.size(), group.rank()
    results = [_transposed(rank), _transposed(rank)]
    dist.all_reduce(results[0], group=group)
    dist.broadcast(results[1], group=group, group_src=size - 1)
    gathered = [_transposed(-1) for _ in range(size)]
    dist.all_gather(gathered, _transposed(rank), group=group)
    joined = torch.zeros(3, 5 * size).t()
    dist.all_gather_into_tensor(joined, _transposed(rank), group=group)
    part = torch.zeros(3, 5).t()
    dist.reduce_scatter_tensor(part, joined.contiguous(), group=group)
    return [*results, *gathered, joined, part]


def _expanded_input(group: Group) -> Tensors:
    outputs = [torch.zeros(9) for _ in range(group.size())]
    dist.all_gather(outputs, torch.tensor([1.0 + group.rank()]).expand(9), group=group)
    return outputs


def _no_dimension(group: Group) -> Tensors:
    results = [torch.tensor(1.0 + group.rank()), torch.tensor(1.0 + group.rank())]
    dist.all_reduce(results[0], group=group)
    dist.broadcast(results[1], group=group, group_src=0)
    return results


def _stacked(group: Group) -> None:
    """Tensors with one row per rank, which gloo refuses."""
    size, rank = group.size(), group.rank()
    gathered = torch.zeros(size, 6)
    dist.all_gather_into_tensor(gathered, torch.full((6,), float(rank)), group=group)
    assert torch.equal(gathered[:, 0], torch.arange(float(size)))
    part = torch.zeros(6)
    dist.reduce_scatter_tensor(part, gathered, group=group)
    assert torch.equal(part, torch.full((6,), float(size * rank)))


def _in_place(group: Group) -> None:
    """Inputs that are a part of their outputs, and the other way round."""
    size, rank = group.size(), group.rank()
    for length in (3, 70_001):
        whole = torch.zeros(size, length)
        whole[rank] = rank + 1
        dist.all_gather_into_tensor(whole.view(-1), whole[rank], group=group)
        assert torch.equal(whole[:, -1], torch.arange(1.0, size + 1))
        dist.all_gather(list(whole.unbind()), whole[rank], group=group)
        assert torch.equal(whole[:, 0], torch.arange(1.0, size + 1))
        dist.reduce_scatter_tensor(whole[rank], whole.view(-1), group=group)
        assert torch.equal(whole[rank], torch.full((length,), float(size * (rank + 1))))


def _uneven_lists(group: Group) -> None:
    """Blocks whose sizes differ by rank, which gloo refuses."""
    size, rank = group.size(), group.rank()
    lengths = [3 * peer for peer in range(size)]
    outputs = [torch.zeros(length) for length in lengths]
    dist.all_gather(outputs, torch.full((lengths[rank],), 1.0 + rank), group=group)
    for peer, output in enumerate(outputs):
        assert (output == 1.0 + peer).all()
    part = torch.zeros(lengths[rank])
    dist.reduce_scatter(part, outputs, group=group)
    assert torch.equal(part, size * outputs[rank])


# ---- tests ----


def test_every_pair_is_covered() -> None:
    choices = [(a, b, c) for a in range(5) for b in "xyz" for c in (0, 1)]
    kept = cover_pairs(choices)
    assert len(kept) < len(choices)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        wanted = {(it[first], it[second]) for it in choices}
        assert {(it[first], it[second]) for it in kept} == wanted


@pytest.mark.parametrize("rank_pool", [[2, 1, 1]], indirect=True)
class TestEveryRow:
    @pytest.mark.parametrize("name", COLLECTIVES)
    def test_as_gloo(self, rank_pool: RankPool, name: str) -> None:
        # Joined calls are these calls; their rows are tried in pairs.
        every = "coalesced" not in name
        for counts in rank_pool.run(compare, name, every):
            assert counts["gloo"] > 50, counts
            assert counts["computed"] > 0 or name == "send_and_recv", counts

    @pytest.mark.parametrize("name", sorted(COLLECTIVES.keys() - _REFUSE_STRIDES))
    def test_not_contiguous(self, rank_pool: RankPool, name: str) -> None:
        assert min(rank_pool.run(compare_strided, name)) >= 6

    def test_extremes(self, rank_pool: RankPool) -> None:
        assert min(rank_pool.run(reduce_extremes)) == 70

    def test_sums_of_anything(self, rank_pool: RankPool) -> None:
        assert min(rank_pool.run(sum_anything)) == 24

    def test_shapes(self, rank_pool: RankPool) -> None:
        rank_pool.run(use_shapes)


@pytest.mark.parametrize("rank_pool", [[4], [2, 2]], ids=["4", "2+2"], indirect=True)
class TestPairsOfRows:
    @pytest.mark.parametrize("name", COLLECTIVES)
    def test_as_gloo(self, rank_pool: RankPool, name: str) -> None:
        for counts in rank_pool.run(compare, name, False):
            assert counts["gloo"] > 30, counts

    def test_sums_of_anything(self, rank_pool: RankPool) -> None:
        assert min(rank_pool.run(sum_anything)) == 24


@pytest.mark.parametrize("rank_pool", [[2]], indirect=True)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_rows_that_gloo_lacks(rank_pool: RankPool, name: str) -> None:
    """So that what is only computed here is not more than it must be."""
    for found, told in rank_pool.run(lacking_rows, name):
        assert found == told
