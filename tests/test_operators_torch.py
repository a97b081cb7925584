# SPDX-License-Identifier: Apache-2.0
"""The operators inside torch: gradcheck, opcheck, autocast and debug mode."""

from __future__ import annotations

from functools import partial

import moe_cases
import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from torch import Tensor

import torch_automoe as automoe

_GLOO = {"nodes": [2], "backend": "gloo"}
_POOLS = [
    pytest.param([2, 1], id="2+1"),
    pytest.param(_GLOO, id="gloo"),
]


# ---- gradients ----


def check_gradients() -> None:
    """gradcheck of the pair and of the layer; all ranks perturb in step."""
    case, rank = (
        moe_cases.small_case(tokens=(3,) * dist.get_world_size(), hidden=3),
        dist.get_rank(),
    )
    inputs = moe_cases.draw_inputs(case)
    ids = inputs.ids[rank]
    x, weights = moe_cases.leaves(case, inputs, rank)
    experts = moe_cases.LocalExperts(case)
    # The experts' own gradients need the tokens of all ranks: not one by one.
    experts.parameters.requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda x, weights: moe_cases.pair(x, weights, ids, experts), (x, weights)
    )
    for num_chunks in (1, 3):
        assert torch.autograd.gradcheck(
            lambda x, weights, num_chunks=num_chunks: automoe.moe(
                x, ids, weights, experts, num_chunks=num_chunks
            ),
            (x, weights),
        )
    assert torch.autograd.gradgradcheck(
        lambda x, weights: moe_cases.pair(x, weights, ids, experts), (x, weights)
    )


def check_gradients_alone() -> None:
    """gradcheck of every differentiable operator, on one rank."""
    case = moe_cases.small_case(tokens=(3,), hidden=2, topk=3)
    inputs = moe_cases.draw_inputs(case)
    ids, grad = inputs.ids[0], partial(torch.randn, dtype=torch.float64)
    plan = automoe.plan(ids, num_experts=5, align=2)
    rows = grad(plan.num_recv_tokens, 2).requires_grad_()
    each = grad(plan.num_recv_tokens).requires_grad_()
    x, weights = moe_cases.leaves(case, inputs, 0)
    ops, route = torch.ops.automoe, (plan.route, plan.receive_index, plan.group_name)
    check = torch.autograd.gradcheck

    def sent(x: Tensor, weights: Tensor | None) -> list[Tensor]:
        recv, recv_weights = ops.dispatch([x, 2 * x], weights, *route)
        return recv if weights is None else [*recv, recv_weights]

    assert check(sent, (x, weights))
    assert check(lambda x: sent(x, None), (x,))
    assert check(lambda r, w: automoe.combine(r, plan, w), (rows, each))
    assert check(lambda r: automoe.combine(r, plan), (rows,))
    assert check(lambda r, s: ops.combine(r, None, s, *route, 3, 3), (rows, each))

    parts = [plan.part(index, 2).route for index in range(2)]
    assert check(lambda x: tuple(ops.pack_rows(x, parts)), (x,))
    assert check(lambda x: ops.reduce_partials(ops.pack_rows(x, parts), parts, 3), (x,))

    def permuted(x: Tensor, weights: Tensor) -> Tensor:
        rows, how = automoe.permute(x, ids, num_experts=5, align=2)
        return automoe.unpermute(rows, how, weights.flatten()[how.index])

    assert check(permuted, (x, weights))
    _, how = automoe.permute(x, ids, num_experts=5, align=2)
    assert check(lambda r, w: automoe.unpermute(r, how, w), (rows, each))
    assert check(lambda r: automoe.unpermute(r, how), (rows,))
    scale = partial(ops.scale_and_dot, index=plan.receive_index)
    values = grad(plan.num_recv_tokens, 2).requires_grad_()
    assert check(scale, (rows, values, each))
    assert check(lambda a, b: scale(a, b, None), (rows, values))


def permute_equals_one_rank() -> None:
    """permute and unpermute are dispatch and combine on one rank."""
    case = moe_cases.small_case(tokens=(7,), topk=3, dtype="bfloat16")
    inputs = moe_cases.draw_inputs(case)
    ids, weights = inputs.ids[0], inputs.weights[0]
    for align in (1, 4):
        plan = automoe.plan(ids, num_experts=5, align=align)
        recv, recv_weights = automoe.dispatch(inputs.x[0], weights, plan)
        rows, how = automoe.permute(inputs.x[0], ids, num_experts=5, align=align)
        assert torch.equal(rows, recv)
        assert torch.equal(how.offsets, plan.offsets)
        assert torch.equal(how.num_tokens_per_expert, plan.num_tokens_per_expert)
        assert torch.equal(how.index >= 0, plan.receive_index >= 0)
        by_row = weights.flatten()[how.index]
        out = automoe.combine(rows, plan, recv_weights)
        assert torch.equal(automoe.unpermute(rows, how, by_row), out)


# ---- opcheck ----


def run_opcheck() -> int:
    """torch's own checks of every operator; returns how many calls."""
    case, rank = moe_cases.small_case(), dist.get_rank()
    inputs = moe_cases.draw_inputs(case)
    x, weights = moe_cases.leaves(case, inputs, rank)
    ids = inputs.ids[rank]
    plan = automoe.plan(ids, num_experts=5)
    name, ops = plan.group_name, torch.ops.automoe
    route = (plan.route, plan.receive_index, name)
    parts = [plan.part(index, 2) for index in range(2)]
    routes = [part.route for part in parts]
    packed = [it.detach().requires_grad_() for it in ops.pack_rows(x, routes)]
    recv, recv_weights = automoe.dispatch(x.detach(), weights.detach(), plan)
    recv.requires_grad_()
    recv_weights.requires_grad_()
    rows, how = automoe.permute(x.detach(), ids, num_experts=5)
    rows.requires_grad_()
    part = (routes[1], parts[1].receive_index, name)
    part_rows = torch.randn(parts[1].num_recv_tokens, 6).requires_grad_()
    calls = [
        (ops.plan, (ids, 5, name)),
        (ops.plan, (ids, 5, name, 4, 20, [0] * dist.get_world_size())),
        (ops.plan_part, (plan.route, plan.offsets, 1, 2)),
        (ops.route_facts, (plan.route,)),
        (ops.route_reduction_map, (plan.route,)),
        (ops.dispatch, ([x], weights, *route)),
        (ops.dispatch, ([x, x.float().detach()], None, *route)),
        (ops.dispatch, ([packed[1]], weights, *part, True)),
        (ops.combine, (recv, recv_weights, None, *route, 4, 2)),
        (ops.combine, (recv, None, recv_weights, *route, 4, 2)),
        (ops.combine, (part_rows, None, None, *part, 4, 2, True)),
        (ops.pack_rows, (x, routes)),
        (ops.reduce_partials, (packed, routes, 4)),
        (ops.scale_and_dot, (recv, recv, recv_weights, plan.receive_index)),
        (ops.permute, (x, ids, 5)),
        (ops.unpermute, (rows, None, how.index, 4, 2)),
        (ops.unpermute, (rows, rows.detach().sum(1), how.index, 4, 2)),
    ]
    for op, args in calls:
        try:
            torch.library.opcheck(op.default, args)
        except Exception as error:
            raise AssertionError(f"{op} {args}") from error
    return len(calls)


# ---- autocast, accumulation, no_grad, debug mode ----


def use_autocast() -> None:
    """Types stay; the result is that without autocast."""
    case, rank = moe_cases.small_case(dtype="float32"), dist.get_rank()
    inputs = moe_cases.draw_inputs(case)
    _, expected = moe_cases.run_pair(case, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan, result = moe_cases.run_pair(case, inputs)
        expected.assert_same_bits(result)
        expected.assert_same_bits(moe_cases.run_moe(case, 2, inputs))
        x = (inputs.x[rank] @ torch.eye(6)).requires_grad_()
        assert x.dtype == torch.bfloat16
        recv, weights = automoe.dispatch(x, inputs.weights[rank], plan)
        assert recv.dtype == torch.bfloat16 and weights.dtype == torch.float32
        out = automoe.combine(recv @ torch.eye(6), plan, weights)
        assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def accumulate_gradients() -> None:
    """Two micro-batches in flight at once, backward in either order."""
    case, rank = moe_cases.small_case(), dist.get_rank()
    other = moe_cases.small_case(seed=9, num_experts=5)
    batches = [(it, moe_cases.draw_inputs(it)) for it in (case, other)]
    expected = sum(moe_cases.run_pair(*it)[1].grad_parameters for it in batches)
    experts = moe_cases.LocalExperts(case)
    losses = []
    for _, inputs in batches:
        x, weights = inputs.x[rank], inputs.weights[rank]
        out = moe_cases.pair(x, weights, inputs.ids[rank], experts)
        losses.append((out * inputs.grad_out[rank]).sum())
    for loss in reversed(losses):
        loss.backward()
    found = experts.parameters.grad
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def run_without_gradients() -> None:
    """no_grad and inference_mode give the same, and no graph."""
    case, rank = moe_cases.small_case(), dist.get_rank()
    inputs = moe_cases.draw_inputs(case)
    _, expected = moe_cases.run_pair(case, inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x, weights = moe_cases.leaves(case, inputs, rank)
            experts = moe_cases.LocalExperts(case)
            out = moe_cases.pair(x, weights, inputs.ids[rank], experts)
            assert not out.requires_grad
            assert torch.equal(out, expected.out)
            chunked = automoe.moe(x, inputs.ids[rank], weights, experts, num_chunks=3)
            assert torch.equal(chunked, expected.out)


def use_debug_group(backend: str) -> None:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL wraps the group; nothing else changes."""
    case = moe_cases.small_case(dtype="bfloat16")
    _, expected = moe_cases.run_pair(case, reduction_map=range(dist.get_world_size()))
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        group = dist.new_group(backend=backend)
        inner = group._get_backend(torch.device("cpu"))
        assert hasattr(inner, "wrapped_pg")
        moe_cases.check_pair(case, group)
        _, result = moe_cases.run_pair(
            case, group=group, reduction_map=range(dist.get_world_size())
        )
        expected.assert_same_bits(result)
        dist.barrier()
        dist.destroy_process_group(group)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


# ---- tests ----


@pytest.mark.parametrize("rank_pool", [[1]], indirect=True)
class TestOneRank:
    def test_gradients_of_every_operator(self, rank_pool: RankPool) -> None:
        rank_pool.run(check_gradients_alone)

    def test_permute_is_dispatch_on_one_rank(self, rank_pool: RankPool) -> None:
        rank_pool.run(permute_equals_one_rank)


@pytest.mark.parametrize("rank_pool", _POOLS, indirect=True)
class TestRanks:
    def test_gradcheck(self, rank_pool: RankPool) -> None:
        rank_pool.run(check_gradients)

    def test_autocast(self, rank_pool: RankPool) -> None:
        rank_pool.run(use_autocast)

    def test_gradient_accumulation(self, rank_pool: RankPool) -> None:
        rank_pool.run(accumulate_gradients)

    def test_no_grad(self, rank_pool: RankPool) -> None:
        rank_pool.run(run_without_gradients)

    def test_debug_group(self, rank_pool: RankPool) -> None:
        rank_pool.run(use_debug_group, rank_pool.backend)


@pytest.mark.parametrize("rank_pool", _POOLS[:1], indirect=True)
def test_opcheck(rank_pool: RankPool) -> None:
    assert min(rank_pool.run(run_opcheck)) >= 17
