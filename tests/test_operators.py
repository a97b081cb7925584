# SPDX-License-Identifier: Apache-2.0
"""plan, dispatch and combine against the reference, in every shape of nodes."""

from __future__ import annotations

import os

import moe_cases
import moe_reference as reference
import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import data
from moe_cases import Case

import torch_automoe as automoe

_SHAPES = {
    "1x1": [1],
    "1x2": [2],
    "1x3": [3],
    "1x4": [4],
    "2x2": [2, 2],
    "1x8": [8],
    "4x2": [2, 2, 2, 2],
    "3+3+2": [3, 3, 2],
    "gloo": {"nodes": [3], "backend": "gloo"},
}
_PAYLOADS = ("int8", "uint8", "bool", "int16", "int64", "float8_e4m3fn", "complex64")
_MIXED = Case((3, 0, 5, 2, 4, 1, 3, 2), topk=3, num_experts=11, dtype="bfloat16")


def _on(*names: str) -> pytest.MarkDecorator:
    shapes = [pytest.param(_SHAPES[name], id=name) for name in names]
    return pytest.mark.parametrize("rank_pool", shapes, indirect=True)


def _case_for(pool_size: int, **changes: object) -> Case:
    return Case(**{**vars(_MIXED), "tokens": _MIXED.tokens[:pool_size], **changes})


# ---- what runs on the ranks ----


def check_cases(cases: list[Case]) -> int:
    """Check many cases; returns how many."""
    for case in cases:
        try:
            moe_cases.check_pair(case)
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    return len(cases)


def check_payloads() -> int:
    """Every type travels, alone and beside others; returns how many types."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = Case((4,) * size, topk=3, num_experts=5, pattern="holes")
    inputs = moe_cases.draw_inputs(case)
    plan = automoe.plan(inputs.ids[rank], num_experts=5, align=2)
    picks = reference.receive(inputs.ids, 5, rank, align=2).picks
    raw = [torch.arange(4 * 24, dtype=torch.uint8).view(4, 24) + r for r in range(size)]
    for name in (*_PAYLOADS, *moe_cases.FLOATS):
        dtype = getattr(torch, name)
        x = [(it % 2).bool() if name == "bool" else it.view(dtype) for it in raw]
        recv, none = automoe.dispatch(x[rank], None, plan)
        assert none is None and recv.dtype == dtype
        expected = reference.gather([it.view(torch.uint8) for it in x], picks)
        assert torch.equal(recv.view(torch.uint8), expected), name
    rows = [it.view(torch.float8_e4m3fn) for it in raw]
    scales = [it[:, :3].float().unsqueeze(1)[..., ::2] for it in raw]  # strided
    one = [it[:, 0] for it in raw]  # a dimension of rows alone
    weights = inputs.weights[rank]
    recv, recv_weights = automoe.dispatch(
        (rows[rank], scales[rank], one[rank]), weights, plan
    )
    assert isinstance(recv, tuple) and len(recv) == 3
    assert torch.equal(recv[0].view(torch.uint8), reference.gather(raw, picks))
    assert torch.equal(recv[1], reference.gather(scales, picks))
    assert torch.equal(recv[2], reference.gather(one, picks))
    assert torch.equal(recv_weights, reference.gather_weights(inputs.weights, picks))
    return len(_PAYLOADS)


def differentiate_a_tuple() -> None:
    """Gradients of several rows, one of them whole numbers, and of weights alone."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = Case((3,) * size, topk=2, num_experts=4, hidden=6)
    inputs = moe_cases.draw_inputs(case)
    plan = automoe.plan(inputs.ids[rank], num_experts=4)
    x = inputs.x[rank].clone().requires_grad_()
    narrow = inputs.x[rank].float().view(3, 2, 3).requires_grad_()
    whole = torch.arange(3)
    weights = inputs.weights[rank].clone().requires_grad_()
    (a, b, c), w = automoe.dispatch((x, narrow, whole), weights, plan)
    (a.sum() + 2 * b.sum() + 3 * w.sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))  # K times
    assert torch.equal(narrow.grad, torch.full_like(narrow, 4.0))
    assert torch.equal(weights.grad, torch.full_like(weights, 3.0))
    assert not c.requires_grad

    weights.grad = None
    recv, w = automoe.dispatch(x.detach().float(), weights, plan)
    (w * w).sum().backward()
    # Not rounded to the type that float32 rows are summed in.
    assert torch.equal(weights.grad, 2 * weights.detach())
    assert not recv.requires_grad


def repeat(case: Case, times: int) -> None:
    """The same bits each time, with what travels in another order."""
    _, first = moe_cases.run_pair(case)
    for turn in range(times):
        if (turn + dist.get_rank()) % 3 == 0:
            os.sched_yield()
        _, result = moe_cases.run_pair(case, async_op=turn % 2 == 1)
        first.assert_same_bits(result, turn)


def use_subgroup() -> None:
    """A group whose ranks are not those of the default group."""
    members = [*range(1, dist.get_world_size())]
    group = dist.new_group(members)
    case = Case((3,) * len(members), topk=3, num_experts=5)
    if dist.get_rank() in members:
        pair = moe_cases.check_pair(case, group)
        pair.assert_same_bits(moe_cases.run_moe(case, 3, group=group))
        dist.destroy_process_group(group)


def compare_with_gloo(cases: list[Case]) -> None:
    """The fallback gives the same bits where the order of sums is pinned."""
    gloo = dist.new_group(backend="gloo")
    for case in cases:
        plan, ours = moe_cases.run_pair(case)
        other, theirs = moe_cases.run_pair(
            case, group=gloo, reduction_map=plan.reduction_map
        )
        ours.assert_same_bits(theirs, case)
        assert other.reduction_map == plan.reduction_map
        assert torch.equal(plan.receive_index >= 0, other.receive_index >= 0)
    dist.destroy_process_group(gloo)


def pin_maps(cases: list[Case], maps: list[list[int]]) -> None:
    """Other orders of sums, also such that nodes cannot sum."""
    rank = dist.get_rank()
    for case in cases:
        inputs = moe_cases.draw_inputs(case)
        for labels in maps:
            plan, result = moe_cases.run_pair(case, inputs, reduction_map=labels)
            order = sorted(set(labels))
            assert plan.reduction_map == [order.index(label) for label in labels]
            moe_cases.check_result(case, inputs, labels, result, rank)


# ---- tests ----


@_on(*_SHAPES)
class TestEveryShape:
    def test_edge_cases(self, rank_pool: RankPool) -> None:
        cases = moe_cases.edge_cases(rank_pool.world_size)
        assert set(rank_pool.run(check_cases, cases)) == {len(cases)}

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=data())
    def test_drawn_cases(self, rank_pool: RankPool, data) -> None:
        case = data.draw(moe_cases.cases(rank_pool.world_size))
        rank_pool.run(check_cases, [case])


@_on("1x3", "3+3+2", "gloo")
class TestSomeShapes:
    def test_every_type_travels(self, rank_pool: RankPool) -> None:
        assert set(rank_pool.run(check_payloads)) == {len(_PAYLOADS)}

    def test_subgroup(self, rank_pool: RankPool) -> None:
        rank_pool.run(use_subgroup)

    def test_gradients_of_a_tuple(self, rank_pool: RankPool) -> None:
        rank_pool.run(differentiate_a_tuple)

    def test_twenty_repeats_have_the_same_bits(self, rank_pool: RankPool) -> None:
        size = rank_pool.world_size
        rank_pool.run(repeat, _case_for(size), 20)
        large = {"hidden": 3000, "tokens": (48,) * size, "dtype": "float32"}
        rank_pool.run(repeat, _case_for(size, **large), 4)


@_on("2x2", "3+3+2")
def test_fallback_has_the_same_bits(rank_pool: RankPool) -> None:
    size = rank_pool.world_size
    cases = [
        *moe_cases.edge_cases(size),
        *(_case_for(size, dtype=name, seed=1) for name in moe_cases.FLOATS),
    ]
    rank_pool.run(compare_with_gloo, cases)


_MAPS = {
    "2x2": [[0, 1, 2, 3], [0, 0, 0, 0], [0, 1, 0, 1], [9, 9, 2, 2]],
    "3+3+2": [list(range(8)), [0, 1] * 4, [1, 1, 1, 0, 0, 0, 5, 5]],
    "gloo": [[0, 0, 0], [1, 0, 1]],
}


@pytest.mark.parametrize(
    ("rank_pool", "maps"),
    [pytest.param(_SHAPES[name], maps, id=name) for name, maps in _MAPS.items()],
    indirect=["rank_pool"],
)
def test_pinned_order_of_sums(rank_pool: RankPool, maps: list[list[int]]) -> None:
    cases = [
        _case_for(rank_pool.world_size, dtype=name, hidden=9, topk=5)
        for name in ("bfloat16", "float64")
    ]
    rank_pool.run(pin_maps, cases, maps)
