# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_gpu_operators.py run: the operators on a GPU and the CPU."""

from __future__ import annotations

import gpu_cases
import torch
import torch.distributed as dist
from gpu_cases import Case, assert_same, devices, on
from torch import Tensor

import torch_automoe as automoe
from torch_automoe import ops  # noqa: F401  (loads the operators)

_ops = torch.ops.automoe


def group_name() -> str:
    return dist.group.WORLD.group_name


def experts(rows: Tensor, offsets: Tensor) -> Tensor:
    """Each step rounds alike on CPU and GPU, so bits can be compared."""
    return rows * rows + rows


def compare_exchange(case: Case, name: str | None = None) -> None:
    """plan, dispatch and combine by the bare operators, with weights and scalars.

    ``name`` is that of a group; default: the default group.
    """
    inputs, name = gpu_cases.draw(case, dist.get_rank()), name or group_name()
    marks = torch.arange(3 * inputs.x.shape[0]).view(-1, 3)
    found = []
    for device in devices():
        ids, x, weights, others = on(
            device, inputs.ids, inputs.x, inputs.weights, marks
        )
        route, *lists = _ops.plan(ids, case.num_experts, name, case.align)
        assert route.device.type == "cpu"
        recv, recv_weights = _ops.dispatch([x, others], weights, route, lists[0], name)
        out, scalars = _ops.combine(
            recv[0], recv_weights, recv_weights, route, lists[0], name, -1, -1
        )
        bare, _ = _ops.dispatch([x], None, route, lists[0], name)
        plain, _ = _ops.combine(bare[0], None, None, route, lists[0], name, -1, -1)
        found.append([lists, recv, recv_weights, out, scalars, bare, plain])
    assert_same(found[1], found[0])


def compare_type(dtype: str, hidden: int) -> None:
    """dispatch of rows of any type, sent as they are."""
    case = Case(hidden=hidden, dtype="float32")
    inputs, name = gpu_cases.draw(case, dist.get_rank()), group_name()
    rows = (inputs.x * 50).to(getattr(torch, dtype))
    found = []
    for device in devices():
        ids, x = on(device, inputs.ids, rows)
        route, *lists = _ops.plan(ids, case.num_experts, name)
        found.append(_ops.dispatch([x], None, route, lists[0], name)[0])
    assert_same(found[1], found[0])


def compare_capacity() -> None:
    """A fixed number of rows: some dropped, some left over."""
    case = Case(tokens=(31, 5), topk=3, holes=True)
    inputs, name = gpu_cases.draw(case, dist.get_rank()), group_name()
    for capacity in (8, 400):
        found = []
        for device in devices():
            ids, x = on(device, inputs.ids, inputs.x)
            route, *lists = _ops.plan(ids, case.num_experts, name, 1, capacity)
            recv, _ = _ops.dispatch([x], None, route, lists[0], name)
            out, _ = _ops.combine(recv[0], None, None, route, lists[0], name, -1, -1)
            assert recv[0].shape[0] == capacity
            found.append([lists, recv, out])
        assert_same(found[1], found[0])


def compare_parts() -> None:
    """Parts of a plan, packed, sent, summed and put together."""
    case = Case(tokens=(29, 31), topk=4, hidden=257)
    inputs, name = gpu_cases.draw(case, dist.get_rank()), group_name()
    found = []
    for device in devices():
        ids, x = on(device, inputs.ids, inputs.x)
        route, _, _, offsets = _ops.plan(ids, case.num_experts, name)
        parts = [_ops.plan_part(route, offsets, part, 3) for part in range(3)]
        routes = [part[0] for part in parts]
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


def compare_gradients(case: Case, num_chunks: int, async_op: bool) -> None:
    """A layer and its backward: in chunks, or by hand where ``num_chunks`` is 0."""
    inputs = gpu_cases.draw(case, dist.get_rank())
    inputs.x.requires_grad_()
    inputs.weights.requires_grad_()
    found = []
    for device in devices():
        ids, x, weights, grad_out = on(
            device, inputs.ids, inputs.x, inputs.weights, inputs.grad_out
        )
        if num_chunks:
            out = automoe.moe(
                x,
                ids,
                weights,
                experts,
                num_experts=case.num_experts,
                num_chunks=num_chunks,
                align=case.align,
            )
        else:
            out = _by_hand(case, ids, x, weights, async_op)
        (out * grad_out).sum().backward()
        found.append([out.detach(), x.grad, weights.grad])
    assert_same(found[1], found[0])


def _by_hand(
    case: Case, ids: Tensor, x: Tensor, weights: Tensor, async_op: bool
) -> Tensor:
    plan = automoe.plan(ids, num_experts=case.num_experts, align=case.align)
    return _exchange(plan, x, weights, async_op)


def _exchange(plan: automoe.Plan, x: Tensor, weights: Tensor, async_op: bool) -> Tensor:
    recv = automoe.dispatch(x, weights, plan, async_op=async_op)
    recv_x, recv_weights = recv.wait() if async_op else recv
    rows = experts(recv_x, plan.offsets)
    out = automoe.combine(rows, plan, recv_weights, async_op=async_op)
    return out.wait() if async_op else out


def compare_calls_in_flight() -> None:
    """Several calls posted before any is waited for, and one that never is."""
    cases = [Case(hidden=hidden, seed=hidden) for hidden in (64, 300, 7)]
    found = []
    for device in devices():
        plans, xs = [], []
        for case in cases:
            inputs = gpu_cases.draw(case, dist.get_rank())
            ids, x = on(device, inputs.ids, inputs.x)
            plans.append(automoe.plan(ids, num_experts=case.num_experts))
            xs.append(x)
        automoe.dispatch(xs[0], None, plans[0], async_op=True)
        pending = [
            automoe.dispatch(x, None, plan, async_op=True)
            for x, plan in zip(xs, plans, strict=True)
        ]
        rows = [it.wait()[0] for it in reversed(pending)][::-1]
        sums = [
            automoe.combine(recv, plan, async_op=True)
            for recv, plan in zip(rows, plans, strict=True)
        ]
        found.append([rows, [it.wait() for it in sums]])
    assert_same(found[1], found[0])


def compare_side_stream() -> None:
    """Inputs made on, and results read from, a stream that is not the default."""
    case = Case(tokens=(300,), hidden=1024)
    inputs, (cpu, gpu) = gpu_cases.draw(case, dist.get_rank()), devices()
    expected = _by_hand(case, *on(cpu, inputs.ids, inputs.x, inputs.weights), False)
    ids, weights = on(gpu, inputs.ids, inputs.weights)
    # Before: while it plans, the host waits for what the stream does.
    plan = automoe.plan(ids, num_experts=case.num_experts, align=case.align)
    stream = torch.cuda.Stream(gpu)
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        with torch.cuda.stream(stream):
            # Late, so that a missing event shows as rows of NaN.
            x = torch.full_like(inputs.x, float("nan"), device=gpu)
            torch.cuda._sleep(2_000_000)
            x.copy_(inputs.x.pin_memory(), non_blocking=True)
            out = _exchange(plan, x, weights, True)
            copy = out.clone()
        stream.synchronize()
        assert_same(copy, expected)


def compare_local(case: Case) -> None:
    """The operators of one rank, with gradients."""
    inputs = gpu_cases.draw(case, 0)
    inputs.x.requires_grad_()
    inputs.weights.requires_grad_()
    found = []
    for device in devices():
        ids, x, weights, grad_out = on(
            device, inputs.ids, inputs.x, inputs.weights, inputs.grad_out
        )
        rows, how = automoe.permute(
            x, ids, num_experts=case.num_experts, align=case.align
        )
        of_rows = weights.flatten()[how.index.clamp(min=0)]
        scaled = _ops.scale_and_dot(rows, rows * 2, of_rows, how.index)
        bare = _ops.scale_and_dot(rows, rows * 2, None, how.index)
        out = automoe.unpermute(rows, how, of_rows)
        plain = automoe.unpermute(rows, how)
        (out * grad_out).sum().backward()
        lists = [how.index, how.num_tokens_per_expert, how.offsets]
        found.append([rows, lists, scaled, bare, out, plain, x.grad, weights.grad])
    assert_same(found[1], found[0])
