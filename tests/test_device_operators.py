# SPDX-License-Identifier: Apache-2.0
"""The operators on tensors that are not on the CPU: staged, and traced for CUDA."""

from __future__ import annotations

import device_stand_in as stand_in
import moe_cases
import pytest
import torch
import torch.distributed as dist
from device_stand_in import to_device
from distributed import RankPool
from moe_cases import Case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import torch_automoe as automoe
from torch_automoe import ops  # noqa: F401  (loads the operators)

_ops = torch.ops.automoe
_POOLS = [
    pytest.param([2, 1], id="2+1"),
    pytest.param({"nodes": [2], "backend": "gloo"}, id="gloo"),
]
on_pools = pytest.mark.parametrize("rank_pool", _POOLS, indirect=True)


def assert_same(on_device: object, on_host: object) -> None:
    """The same bits, dtypes and shapes; the first are on the device."""
    if isinstance(on_host, Tensor):
        assert on_device.device == torch.device(stand_in.DEVICE)
        found = on_device.detach().cpu()
        assert found.dtype == on_host.dtype and torch.equal(found, on_host)
        return
    assert len(on_device) == len(on_host)
    for mine, expected in zip(on_device, on_host, strict=True):
        assert_same(mine, expected)


def devices() -> tuple[bool, bool]:
    """False, then True; torch counts the devices at the first backward of all."""
    stand_in.set_up()
    return False, True


def _on(device: bool, *tensors: Tensor) -> list[Tensor]:
    return [to_device(it) if device else it for it in tensors]


# ---- what runs on the ranks ----


def compare_collectives() -> None:
    """plan, dispatch and combine of both kinds against those on the CPU."""
    case = moe_cases.small_case(dtype="bfloat16", align=2)
    inputs, rank = moe_cases.draw_inputs(case), dist.get_rank()
    name = dist.group.WORLD.group_name
    found = []
    for device in devices():
        ids, x, weights, marks = _on(
            device,
            inputs.ids[rank],
            inputs.x[rank],
            inputs.weights[rank],
            torch.arange(3 * case.tokens[rank]).view(-1, 3),
        )
        route, *lists = _ops.plan(ids, case.num_experts, name, case.align)
        assert route.device.type == "cpu"
        recv, recv_weights = _ops.dispatch([x, marks], weights, route, lists[0], name)
        out, scalars = _ops.combine(
            recv[0], recv_weights, recv_weights, route, lists[0], name, -1, -1
        )
        bare, nothing = _ops.dispatch([x], None, route, lists[0], name)
        found.append([lists, recv, recv_weights, out, scalars, bare, nothing])
    assert_same(found[1], found[0])


def compare_parts() -> None:
    """Parts of a plan, packed and summed, against those on the CPU."""
    case = moe_cases.small_case(tokens=(9,) * dist.get_world_size())
    inputs, rank = moe_cases.draw_inputs(case), dist.get_rank()
    name = dist.group.WORLD.group_name
    found = []
    for device in devices():
        ids, x = _on(device, inputs.ids[rank], inputs.x[rank])
        route, _, _, offsets = _ops.plan(ids, case.num_experts, name)
        parts = [_ops.plan_part(route, offsets, part, 3) for part in range(3)]
        routes = [part[0] for part in parts]
        assert {it.device.type for it in routes} == {"cpu"}
        packed = _ops.pack_rows(x, routes)
        partials = []
        for rows, part in zip(packed, parts, strict=True):
            recv, _ = _ops.dispatch([rows], None, part[0], part[1], name, True)
            out, _ = _ops.combine(
                recv[0], None, None, part[0], part[1], name, -1, -1, True
            )
            partials.append(out)
        summed = _ops.reduce_partials(partials, routes, x.shape[0])
        found.append([[part[1:] for part in parts], packed, partials, summed])
    assert_same(found[1], found[0])


def count_copies() -> None:
    """Only plan copies from the device, and once; a part of an unknown one does too."""
    stand_in.set_up()
    ids = to_device(torch.tensor([[0, 1], [1, 2]]))
    name = dist.group.WORLD.group_name
    before = stand_in.copies_to_host
    route, _, _, offsets = _ops.plan(ids, 3, name)
    assert stand_in.copies_to_host - before == 1
    parts = [_ops.plan_part(route, offsets, part, 2) for part in range(2)]
    assert stand_in.copies_to_host - before == 1
    # A copy of a route is known by its words as long as the route lives.
    kept = [route.clone() for _ in range(3)]
    for known in (route.detach(), kept[0]):
        again = _ops.plan_part(known, offsets, 1, 2)
        assert torch.equal(again[0], parts[1][0])
    assert stand_in.copies_to_host - before == 1
    forged = kept[1].clone()
    _ops.plan_part(forged, offsets, 1, 2)
    forged[0] += 1
    with pytest.raises(ValueError, match="route: the first word is"):
        _ops.plan_part(forged, offsets, 1, 2)
    del route, known, kept[0]
    del forged
    again = _ops.plan_part(kept[1], offsets, 1, 2)
    assert stand_in.copies_to_host - before == 2
    assert torch.equal(again[0], parts[1][0])


def compare_local() -> None:
    """The operators of one rank against those on the CPU, with gradients."""
    case = Case((6,), topk=3, num_experts=4, hidden=7, dtype="float16", align=4)
    inputs = moe_cases.draw_inputs(case)
    found = []
    for device in devices():
        x = inputs.x[0].clone().requires_grad_()
        weights = inputs.weights[0].clone().requires_grad_()
        ids, x, weights = _on(device, inputs.ids[0], x, weights)
        rows, how = automoe.permute(x, ids, num_experts=4, align=4)
        of_rows = weights.flatten()[how.index.clamp(min=0)]
        scaled = _ops.scale_and_dot(rows, rows * 2, of_rows, how.index)
        out = automoe.unpermute(rows, how, of_rows)
        out.float().sum().backward()
        lists = [how.index, how.num_tokens_per_expert, how.offsets]
        everything = [rows, lists, scaled, out, x.grad, weights.grad]
        found.append(everything)
    assert_same(found[1], _detached(found[0]))


def _detached(tree: object) -> object:
    if isinstance(tree, Tensor):
        return tree.detach()
    return [_detached(item) for item in tree]


def compare_moe(num_chunks: int, weighted: bool) -> None:
    """automoe.moe and its backward against those on the CPU."""
    case = moe_cases.small_case(weighted=weighted, dtype="float32", align=4)
    inputs, rank = moe_cases.draw_inputs(case), dist.get_rank()
    found = []
    for device in devices():
        x, weights = moe_cases.leaves(case, inputs, rank)
        (ids, grad_out, x) = _on(device, inputs.ids[rank], inputs.grad_out[rank], x)
        weights = to_device(weights) if weighted and device else weights
        out = automoe.moe(
            x,
            ids,
            weights,
            lambda rows, offsets: rows * rows + rows,
            num_experts=case.num_experts,
            num_chunks=num_chunks,
            align=case.align,
        )
        (out * grad_out).sum().backward()
        found.append([out.detach(), x.grad, *([weights.grad] if weighted else [])])
    assert_same(found[1], found[0])


def drop_without_wait() -> None:
    """A call that nobody waits for ends, and the next one works."""
    case = moe_cases.small_case()
    inputs, rank = moe_cases.draw_inputs(case), dist.get_rank()
    ids, x = _on(True, inputs.ids[rank], inputs.x[rank])
    plan = automoe.plan(ids, num_experts=case.num_experts)
    automoe.dispatch(x, None, plan, async_op=True)
    pending = automoe.dispatch(x, None, plan, async_op=True)
    first, second = pending.wait()[0], pending.wait()[0]
    assert first is second
    expected, _ = automoe.dispatch(x, None, plan)
    assert_same(first, expected.cpu())


def mix_devices(failing: int) -> str:
    """One rank gives weights on another device; returns what this rank hears."""
    ids = to_device(torch.zeros(2, 1, dtype=torch.int64))
    name = dist.group.WORLD.group_name
    route, index, _, _ = _ops.plan(ids, 3, name)
    x, weights = _on(True, torch.ones(2, 4), torch.ones(2, 1))
    if dist.get_rank() == failing:
        weights = weights.cpu()
    with pytest.raises(ValueError) as caught:
        _ops.dispatch([x], weights, route, index, name)
    return str(caught.value)


def trace_cuda() -> None:
    """Devices and shapes of all operators, without a GPU."""
    name = dist.group.WORLD.group_name
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        options = {"device": "cuda:0"}
        ids = torch.zeros(5, 2, dtype=torch.int64, **options)
        x = torch.zeros(5, 7, dtype=torch.bfloat16, **options)
        weights = torch.zeros(5, 2, **options)
        route, *lists = _ops.plan(ids, 6, name, 1, 12)
        _expect([route, *lists], [None, (12,), (6,), (6,)], torch.int32)
        part_route, *part = _ops.plan_part(route, lists[2], 0, 2)
        _expect([part_route, *part], [None, None, (6,), (6,)], torch.int32)
        assert route.device.type == part_route.device.type == "cpu"
        recv, recv_weights = _ops.dispatch([x, x], weights, route, lists[0], name)
        _expect([*recv, recv_weights], [(12, 7), (12, 7), (12,)], None)
        nothing = _ops.dispatch([x], None, route, lists[0], name)[1]
        combined = _ops.combine(
            recv[0], None, recv_weights, route, lists[0], name, 5, 2
        )
        _expect([nothing, *combined], [(0,), (5, 7), (5, 2)], None)
        packed = _ops.pack_rows(x, [route, part_route])
        summed = _ops.reduce_partials(packed, [route, part_route], 5)
        _expect([*packed, summed], [None, None, (5, 7)], torch.bfloat16)
        rows, index, counts, ends = _ops.permute(x, ids, 6)
        for tensor in (part[0], *packed, rows, index):
            assert tensor.device.type == "cuda"
        _expect([index, counts, ends], [None, (6,), (6,)], torch.int32)
        scaled = _ops.scale_and_dot(recv[0], recv[1], None, lists[0])
        _expect(scaled, [(12, 7), (12,)], None)
        _expect([_ops.unpermute(rows, None, index, 5, 2)], [(5, 7)], torch.bfloat16)
        assert _ops.route_facts(route).device.type == "cpu"


def _expect(tensors, shapes, dtype: torch.dtype | None) -> None:
    """What has a shape here is on the GPU; None depends on routing."""
    for tensor, shape in zip(tensors, shapes, strict=True):
        assert dtype is None or tensor.dtype == dtype
        if shape is not None:
            assert tensor.shape == shape and tensor.device.type == "cuda"


# ---- tests ----


@on_pools
def test_collectives(rank_pool: RankPool) -> None:
    rank_pool.run(compare_collectives)


@on_pools
def test_parts(rank_pool: RankPool) -> None:
    rank_pool.run(compare_parts)


@on_pools
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_moe(rank_pool: RankPool, num_chunks: int, weighted: bool) -> None:
    rank_pool.run(compare_moe, num_chunks, weighted)


@on_pools
def test_dropped_work(rank_pool: RankPool) -> None:
    rank_pool.run(drop_without_wait)


@on_pools
def test_copies(rank_pool: RankPool) -> None:
    rank_pool.run(count_copies)


@pytest.mark.parametrize("rank_pool", [[1]], indirect=True)
def test_local(rank_pool: RankPool) -> None:
    rank_pool.run(compare_local)


@pytest.mark.parametrize("rank_pool", [[1]], indirect=True)
def test_traced(rank_pool: RankPool) -> None:
    rank_pool.run(trace_cuda)


def test_other_device(make_rank_pool) -> None:
    texts = make_rank_pool([2, 1]).run(mix_devices, 1)
    for text in texts:
        assert "topk_weights is on cpu, expected standin:0" in text
