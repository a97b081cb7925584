# SPDX-License-Identifier: Apache-2.0
"""Plans kept and dropped, static shapes, async forms, bytes and memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import moe_cases
import moe_reference as reference
import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from moe_cases import Case
from own_process import kilobytes_in_use

import torch_automoe as automoe

_SHAPES = {
    "1x3": [3],
    "2x2": [2, 2],
    "3+3+2": [3, 3, 2],
    "gloo": {"nodes": [3], "backend": "gloo"},
}


def _on(*names: str) -> pytest.MarkDecorator:
    shapes = [pytest.param(_SHAPES[name], id=name) for name in names]
    return pytest.mark.parametrize("rank_pool", shapes, indirect=True)


# ---- what runs on the ranks ----


def keep_plans(turns: int) -> None:
    """Several plans alive, used out of order, some dropped unused."""
    rank, size = dist.get_rank(), dist.get_world_size()
    cases = [
        Case((2 + n % 3,) * size, num_experts=3 + n, seed=n, dtype="float32")
        for n in range(turns)
    ]
    inputs = [moe_cases.draw_inputs(case) for case in cases]
    plans = [
        automoe.plan(it.ids[rank], num_experts=case.num_experts)
        for case, it in zip(cases, inputs, strict=True)
    ]
    del plans[3]
    cases.pop(3)
    inputs.pop(3)
    state = []
    for case, it, plan in reversed(list(zip(cases, inputs, plans, strict=True))):
        x, weights = moe_cases.leaves(case, it, rank)
        experts = moe_cases.LocalExperts(case)
        recv, recv_weights = automoe.dispatch(x, weights, plan)
        state.append((case, it, plan, x, weights, experts, recv, recv_weights))
    outs = []
    for case, it, plan, x, weights, experts, recv, recv_weights in (
        state[::2] + state[1::2]
    ):
        out = automoe.combine(experts(recv, plan.offsets), plan, recv_weights)
        outs.append((case, it, plan.reduction_map, out, x, weights, experts))
    del plans, state
    gc.collect()
    for case, it, labels, out, x, weights, experts in outs[1::2] + outs[::2]:
        result = moe_cases.backward(out, x, weights, experts, it.grad_out[rank])
        moe_cases.check_result(case, it, labels, result, rank)


def bound_rows(max_rows: int) -> tuple[int, int]:
    """A plan with static shapes; returns dropped picks and warnings of this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = Case((4,) * size, topk=3, num_experts=2 * size, pattern="holes")
    inputs = moe_cases.draw_inputs(case)
    expected = [
        reference.receive(inputs.ids, case.num_experts, r, max_rows=max_rows)
        for r in range(size)
    ]
    full = [reference.receive(inputs.ids, case.num_experts, r) for r in range(size)]
    kept = {pick for it in expected for pick in it.picks if pick}
    dropped = {pick for it in full for pick in it.picks if pick} - kept
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan, result = moe_cases.run_pair(case, inputs, max_recv_tokens=max_rows)
        moe_cases.run_pair(case, inputs, max_recv_tokens=max_rows)
    assert plan.num_recv_tokens == max_rows
    assert plan.num_dropped == expected[rank].num_dropped
    assert plan.num_tokens_per_expert.tolist() == expected[rank].counts
    assert plan.offsets.tolist() == expected[rank].offsets
    recv, _ = automoe.dispatch(inputs.x[rank], None, plan)
    assert torch.equal(recv, reference.gather(inputs.x, expected[rank].picks))
    routing = reference.Routing(
        inputs.ids[rank],
        case.num_experts,
        plan.reduction_map,
        frozenset(pick[1:] for pick in dropped if pick[0] == rank),
    )
    wanted = reference.run_layer(
        inputs.x[rank],
        inputs.weights[rank],
        inputs.grad_out[rank],
        reference.make_experts(case.num_experts, case.hidden, torch.float64),
        routing,
    )
    assert torch.equal(result.out, wanted.out)
    assert torch.equal(result.grad_x, wanted.grad_x)
    torch.testing.assert_close(
        result.grad_weights, wanted.grad_weights, rtol=1e-12, atol=1e-12
    )
    texts = [str(it.message) for it in caught if "max_recv_tokens" in str(it.message)]
    return plan.num_dropped, len(texts)


def use_async_forms() -> None:
    """Handles that are waited for late, out of order, twice, or never."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = Case((6,) * size, topk=3, num_experts=5, hidden=3000, dtype="float32")
    inputs = moe_cases.draw_inputs(case)
    plan = automoe.plan(inputs.ids[rank], num_experts=5)
    expected, _ = automoe.dispatch(inputs.x[rank], None, plan)
    summed = automoe.combine(expected, plan)
    pending = [
        automoe.dispatch(inputs.x[rank] * n, inputs.weights[rank], plan, async_op=True)
        for n in range(5)
    ]
    sums = [automoe.combine(expected, plan, async_op=True) for _ in range(3)]
    del pending[1], sums[1]
    for n, handle in reversed(list(zip((0, 2, 3, 4), pending, strict=True))):
        recv, _ = handle.wait()
        assert torch.equal(recv, expected * n)
        assert handle.wait()[0] is recv
    for handle in sums:
        assert torch.equal(handle.wait(), summed)


def count_bytes(case: Case) -> dict[str, int]:
    """Payload bytes to other nodes: those of a dispatch and a combine, and expected."""
    inputs, rank = moe_cases.draw_inputs(case), dist.get_rank()
    nodes = automoe.topology().node_of_rank
    chunk = -(-case.num_experts // len(nodes))
    away = [
        [nodes[e // chunk] for e in row if e >= 0 and nodes[e // chunk] != nodes[rank]]
        for row in inputs.ids[rank].tolist()
    ]
    row_bytes = case.hidden * inputs.x[rank].element_size()
    found = {
        "rows": sum(len(set(row)) for row in away) * row_bytes,
        "weights": sum(map(len, away)) * inputs.weights[rank].element_size(),
    }

    def sent(name: str, call: Callable[[], object]) -> object:
        before = automoe.stats()["network_payload_bytes"]
        result = call()
        dist.barrier()  # what other ranks of the node sent for this one is sent too
        found[name] = automoe.stats()["network_payload_bytes"] - before
        return result

    plan = automoe.plan(inputs.ids[rank], num_experts=case.num_experts)
    x, weights = inputs.x[rank], inputs.weights[rank]
    recv, recv_weights = sent("dispatch", lambda: automoe.dispatch(x, weights, plan))
    sent("combine", lambda: automoe.combine(recv, plan, recv_weights))
    return found


def stay_level(turns: int) -> tuple[int, int, int]:
    """Kilobytes in use after some iterations and after many, and those of a payload."""
    size = dist.get_world_size()
    case = Case((64,) * size, topk=4, num_experts=8, hidden=512, dtype="float32")
    inputs = moe_cases.draw_inputs(case)

    def in_use(count: int) -> int:
        for _ in range(count):
            moe_cases.run_pair(case, inputs)
        return kilobytes_in_use()

    payload = 64 * 4 * 512 * 4 // 1024
    return in_use(turns // 5), in_use(turns), payload


# ---- tests ----


@_on("1x3", "3+3+2", "gloo")
class TestSomeShapes:
    def test_plans_alive_out_of_order_and_dropped(self, rank_pool: RankPool) -> None:
        rank_pool.run(keep_plans, 8)

    def test_async_forms(self, rank_pool: RankPool) -> None:
        rank_pool.run(use_async_forms)

    @pytest.mark.parametrize("max_rows", [0, 5, 40])
    def test_static_shapes_count_what_is_dropped(
        self, rank_pool: RankPool, max_rows: int
    ) -> None:
        found = rank_pool.run(bound_rows, max_rows)
        for num_dropped, num_warnings in found:
            # Once per process; another number of rows was first perhaps.
            assert num_warnings <= (num_dropped > 0)
        if max_rows == 0:
            assert any(num_dropped > 0 for num_dropped, _ in found)
            assert any(num_warnings == 1 for _, num_warnings in found)
        if max_rows == 40:
            assert {num_dropped for num_dropped, _ in found} == {0}


@_on("2x2", "3+3+2", "1x3")
@pytest.mark.parametrize("hidden", [16, 1000])
def test_each_row_crosses_once(rank_pool: RankPool, hidden: int) -> None:
    tokens = (50,) * rank_pool.world_size
    case = Case(tokens, hidden=hidden, topk=3, num_experts=11, dtype="bfloat16")
    results = rank_pool.run(count_bytes, case)
    for it in results:
        assert it["dispatch"] == it["rows"] + it["weights"], results
    assert sum(it["combine"] for it in results) == sum(it["rows"] for it in results)


@_on("1x3", "2x2", "gloo")
@pytest.mark.parametrize("turns", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_stays_level(rank_pool: RankPool, turns: int) -> None:
    for warm, after, payload in rank_pool.run(stay_level, turns, deadline=600):
        # What other threads hold just now; one payload in ten iterations would show.
        assert after <= warm + 8 * payload, (warm, after, payload)
