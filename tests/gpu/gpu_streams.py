# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_gpu_streams.py run: order, waiting, graphs and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import gpu_cases
import torch
import torch.distributed as dist
from gpu_cases import Case, assert_same, on, own_device
from torch import Tensor

import torch_automoe as automoe

_CASE = Case(tokens=(128,), topk=4, num_experts=16, hidden=1024, dtype="bfloat16")
# Cycles: some hundred milliseconds of a GPU that does nothing else.
_LONG_SLEEP = 600_000_000


def meet() -> None:
    """Wait for all ranks, on the CPU, once this rank's GPU work is done."""
    torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1))


def exchange(x: Tensor, weights: Tensor, plan: automoe.Plan) -> Tensor:
    recv, recv_weights = automoe.dispatch(x, weights, plan)
    return automoe.combine(recv * 2, plan, recv_weights)


def prepare(case: Case) -> tuple[Tensor, Tensor, automoe.Plan, Tensor]:
    """Inputs on the GPU, a plan, and what the CPU ranks make of the same inputs."""
    inputs = gpu_cases.draw(case, dist.get_rank())
    plan = automoe.plan(inputs.ids, num_experts=case.num_experts)
    expected = exchange(inputs.x, inputs.weights, plan)
    ids, x, weights = on(own_device(), inputs.ids, inputs.x, inputs.weights)
    plan = automoe.plan(ids, num_experts=case.num_experts)
    for _ in range(3):  # arenas and kernels are made at first use
        exchange(x, weights, plan)
    meet()
    return x, weights, plan, expected


def _behind_a_sleep(post: Callable[[], object]) -> tuple[object, float, bool]:
    """Post work behind a sleeping GPU: what it gives, the seconds of the host, and if
    the GPU slept on when it returned.

    Torch's own check sees only what torch waits for; the sleep shows any wait. Twice,
    as the first time makes the memory that nothing gives back until the GPU wakes.
    """
    for _ in range(2):
        meet()
        torch.cuda._sleep(_LONG_SLEEP)
        begin = time.monotonic()
        result = post()
        seconds = time.monotonic() - begin
        slept_on = not torch.cuda.current_stream().query()
    meet()
    return result, seconds, slept_on


def find_host_waits() -> tuple[float, bool]:
    """See if the host waits in dispatch and combine, blocking ones and others."""
    x, weights, plan, expected = prepare(_CASE)

    def post() -> list[Tensor]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = [exchange(x, weights, plan) for _ in range(3)]
            pending = automoe.dispatch(x, weights, plan, async_op=True)
            recv, recv_weights = pending.wait()
            late = automoe.combine(recv * 2, plan, recv_weights, async_op=True)
            return [*out, late.wait()]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    out, seconds, slept_on = _behind_a_sleep(post)
    assert_same(out, [expected] * 4)
    return seconds, slept_on


def find_backward_waits() -> tuple[float, bool]:
    """The same of a backward through both."""
    x, weights, plan, _ = prepare(_CASE)
    x.requires_grad_()
    weights.requires_grad_()
    exchange(x, weights, plan).float().sum().backward()
    _, seconds, slept_on = _behind_a_sleep(
        lambda: exchange(x, weights, plan).float().sum().backward()
    )
    return seconds, slept_on


def replay_graph(num_replays: int) -> None:
    """Capture dispatch and combine of one plan; replay them on changing inputs."""
    x, weights, plan, expected = prepare(_CASE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            exchange(x, weights, plan)
    torch.cuda.current_stream().wait_stream(side)
    meet()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = exchange(x, weights, plan)
    meet()
    first = x.clone()
    for step in range(num_replays):
        scale = 2.0 ** (step % 3)
        x.copy_(first * scale)
        out.fill_(float("nan"))
        graph.replay()
        # Powers of two change no rounding.
        assert_same(out, expected * scale, where=f"replay {step}")
    # Calls outside the graph go on beside it.
    x.copy_(first)
    assert_same(exchange(x, weights, plan), expected)
    graph.replay()
    assert_same(out, expected)
    meet()


def replay_all_to_all(num_replays: int) -> None:
    """Capture all_to_all_single of CUDA tensors."""
    size, device = dist.get_world_size(), own_device()
    sent = torch.zeros(4 * size, device=device)
    received = torch.zeros_like(sent)
    for _ in range(3):
        dist.all_to_all_single(received, sent)
    meet()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dist.all_to_all_single(received, sent)
    for step in range(num_replays):
        sent.fill_(10.0 * step + dist.get_rank())
        graph.replay()
        expected = 10.0 * step + torch.arange(size).repeat_interleave(4)
        assert torch.equal(received.cpu(), expected)
    meet()


def measure_growth(iterations: int, new_plans: bool) -> dict[str, int]:
    """Bytes by which memory has grown over many calls, after the first fifty."""
    case = Case(tokens=(64, 48), hidden=256, topk=4)
    inputs = gpu_cases.draw(case, dist.get_rank())
    ids, x, weights = on(own_device(), inputs.ids, inputs.x, inputs.weights)
    plan = automoe.plan(ids, num_experts=case.num_experts)

    def run(count: int) -> None:
        nonlocal plan
        for step in range(count):
            if new_plans:
                turned = ids.roll(step % ids.shape[0], dims=0)
                plan = automoe.plan(turned, num_experts=case.num_experts)
            exchange(x, weights, plan)
        meet()

    def used() -> dict[str, int]:
        free, total = torch.cuda.mem_get_info()
        return {"allocated": torch.cuda.memory_allocated(), "device": total - free}

    # More plans than are kept on the device, so that old ones are dropped too.
    run(200)
    before = used()
    meet()
    run(iterations)
    after = used()
    meet()
    return {name: after[name] - before[name] for name in before}


def lose_rank(losing: int) -> tuple[float, str, float]:
    """One rank exits; others say after how long, with which words, and end."""
    x, weights, plan, _ = prepare(_CASE)
    if dist.get_rank() == losing:
        os._exit(3)
    begin = time.monotonic()
    text = ""
    try:
        while time.monotonic() - begin < 60:
            exchange(x, weights, plan)
            torch.cuda.synchronize()
    except dist.DistBackendError as error:
        text = str(error)
    heard = time.monotonic() - begin
    # What was waiting for the lost rank on the GPU must have been let go.
    torch.cuda.synchronize()
    return heard, text, time.monotonic() - begin - heard
