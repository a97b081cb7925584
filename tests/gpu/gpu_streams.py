# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_gpu_streams.py run: order, waiting, graphs and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import gpu_cases
import torch
import torch.distributed as dist
from gpu_cases import Case, assert_same, on, own_device
from torch import Tensor

import torch_automoe as automoe
from torch_automoe import _loader, layer

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


def find_plan_waits() -> tuple[float, bool]:
    """See if the host waits for a GPU that plans with ``max_recv_tokens``, and what
    follows on that plan."""
    capacity = 2000
    inputs = gpu_cases.draw(_CASE, dist.get_rank())
    ids, x, weights = on(own_device(), inputs.ids, inputs.x, inputs.weights)

    def post() -> Tensor:
        plan = automoe.plan(
            ids, num_experts=_CASE.num_experts, max_recv_tokens=capacity
        )
        return exchange(x, weights, plan)

    out, seconds, slept_on = _behind_a_sleep(post)
    plan = automoe.plan(
        inputs.ids, num_experts=_CASE.num_experts, max_recv_tokens=capacity
    )
    assert_same(out, exchange(inputs.x, inputs.weights, plan))
    return seconds, slept_on


def capture(
    post: Callable[[], Tensor], *, warm: bool = True
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture what ``post`` enqueues, after a warm-up; the graph and what it gives."""
    if warm:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                post()
        torch.cuda.current_stream().wait_stream(side)
    meet()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = post()
    meet()
    return graph, out


class Replays:
    """A graph of ``post``, whose input is ``x``, and what each replay must give."""

    def __init__(
        self, post: Callable[[], Tensor], x: Tensor, expected: Tensor, **options: bool
    ) -> None:
        self._x, self._first, self._expected = x, x.clone(), expected
        self._step = 0
        self._graph, self._out = capture(post, **options)

    def replay(self) -> None:
        self._step += 1
        scale = 2.0 ** (self._step % 3)
        self._x.copy_(self._first * scale)
        self._out.fill_(float("nan"))
        self._graph.replay()
        # Powers of two change no rounding.
        where = f"replay {self._step}"
        assert_same(self._out, self._expected * scale, where=where)
        self._x.copy_(self._first)


def replay_graph(num_replays: int) -> None:
    """Capture dispatch and combine of one plan; replay them on changing inputs."""
    x, weights, plan, expected = prepare(_CASE)
    replays = Replays(lambda: exchange(x, weights, plan), x, expected)
    for _ in range(num_replays):
        replays.replay()
    # Calls outside the graph go on beside it; an odd number of them too, as those of
    # an evaluation without combine.
    for step in "erdrdddrredrdr":
        if step == "r":
            replays.replay()
        elif step == "e":
            assert_same(exchange(x, weights, plan), expected)
        else:
            automoe.dispatch(x, weights, plan)
    meet()


def replay_after_other_plans(num_plans: int) -> None:
    """Replay a graph whose plan is one of many that came after it."""
    x, weights, plan, expected = prepare(_CASE)
    ids = gpu_cases.draw(_CASE, dist.get_rank()).ids.to(own_device())
    replays = Replays(lambda: exchange(x, weights, plan), x, expected)
    for turn in range(num_plans):
        other = automoe.plan(ids.roll(turn + 1, 0), num_experts=_CASE.num_experts)
        exchange(x, weights, other)
        if turn % 20 == 0:
            replays.replay()
    replays.replay()
    meet()


def replay_new_plan() -> None:
    """Capture the first use of a plan, behind the use of one that is known."""
    x, weights, plan, _ = prepare(_CASE)
    inputs = gpu_cases.draw(_CASE, dist.get_rank())
    turned = inputs.ids.roll(1, 0)
    expected = exchange(
        inputs.x, inputs.weights, automoe.plan(turned, num_experts=_CASE.num_experts)
    )
    new = automoe.plan(turned.to(own_device()), num_experts=_CASE.num_experts)

    def post() -> Tensor:
        exchange(x, weights, plan)
        return exchange(x, weights, new)

    replays = Replays(post, x, expected, warm=False)
    for _ in range(3):
        replays.replay()
    # Others can still be made and used.
    again = automoe.plan(turned.to(own_device()), num_experts=_CASE.num_experts)
    assert_same(exchange(x, weights, again), expected)
    replays.replay()
    meet()


def _exchange_async(x: Tensor, weights: Tensor, plan: automoe.Plan) -> Tensor:
    """Drop each input while its call is pending, and ask for memory of its size."""
    copied = x * 1
    pending = automoe.dispatch(copied, weights, plan, async_op=True)
    # Most times the engine is through with the call by then and holds nothing more:
    # what a call must keep alive is right at any speed, but shows wrong only so.
    time.sleep(0.05)
    del copied
    spoilt = [torch.full_like(x, float("nan"))]
    recv, recv_weights = pending.wait()
    rows = recv * 2
    late = automoe.combine(rows, plan, recv_weights, async_op=True)
    time.sleep(0.05)  # as above
    del rows, pending
    spoilt.append(torch.full_like(recv, float("nan")))
    return late.wait()


def _exchange_in_chunks(x: Tensor, weights: Tensor, plan: automoe.Plan) -> Tensor:
    """As ``moe`` does once it has its plan."""

    def experts(rows: Tensor, _: Tensor) -> Tensor:
        time.sleep(0.05)  # as in _exchange_async
        return rows * 2

    return layer._run_chunks([x], weights, experts, plan, 3, True, None, False)


def replay_pending_calls(num_replays: int, in_chunks: bool) -> None:
    """Capture calls that are pending while their inputs go, and make them before."""
    x, weights, plan, expected = prepare(_CASE)
    post = _exchange_in_chunks if in_chunks else _exchange_async
    for _ in range(3):
        assert_same(post(x, weights, plan), expected)
    replays = Replays(lambda: post(x, weights, plan), x, expected)
    for _ in range(num_replays):
        replays.replay()
    meet()


def replay_plan(num_replays: int) -> None:
    """A graph that plans anew: every replay routes by the ids that it finds."""
    capacity = 2000
    first = gpu_cases.draw(_CASE, dist.get_rank())
    ids, x, weights = on(own_device(), first.ids, first.x, first.weights)

    def post() -> Tensor:
        plan = automoe.plan(
            ids, num_experts=_CASE.num_experts, max_recv_tokens=capacity
        )
        return exchange(x, weights, plan)

    graph, out = capture(post)
    for step in range(num_replays):
        new = gpu_cases.draw(replace(_CASE, seed=step + 2), dist.get_rank())
        plan = automoe.plan(
            new.ids, num_experts=_CASE.num_experts, max_recv_tokens=capacity
        )
        expected = exchange(new.x, new.weights, plan)
        for to, values in ((ids, new.ids), (x, new.x), (weights, new.weights)):
            to.copy_(values)
        graph.replay()
        assert_same(out, expected, where=f"replay {step}")


def replay_all_to_all(num_replays: int, peer_limit: int | None = None) -> str:
    """Capture all_to_all_single of CUDA tensors; up to ``peer_limit`` bytes, they go
    through memory of the node. None: where that is faster, but in graphs. What was
    used."""
    size, device = dist.get_world_size(), own_device()
    group = dist.new_group(pg_options=automoe.Options(peer_all_to_all=peer_limit))
    sent = torch.zeros(4 * size, device=device)
    received = torch.zeros_like(sent)
    for _ in range(3):
        dist.all_to_all_single(received, sent, group=group)

    def post() -> Tensor:
        dist.all_to_all_single(received, sent, group=group)
        return received

    graph, _ = capture(post, warm=False)
    for step in range(num_replays):
        sent.fill_(10.0 * step + dist.get_rank())
        graph.replay()
        expected = 10.0 * step + torch.arange(size).repeat_interleave(4)
        assert torch.equal(received.cpu(), expected)
        # A call outside the graph goes on beside it.
        received.fill_(-1.0)
        dist.all_to_all_single(received, sent, group=group)
        assert torch.equal(received.cpu(), expected)
    meet()
    used = _loader.load().describe_device_group(group.group_name)
    del graph
    dist.destroy_process_group(group)
    return used


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

    def read() -> dict[str, int]:
        free, total = torch.cuda.mem_get_info()
        return {"allocated": torch.cuda.memory_allocated(), "device": total - free}

    def used() -> dict[str, int]:
        # Tensors of the last calls are let go by another thread, and nothing tells
        # when: so until it has rested for half a second.
        before, same = read(), 0
        for _ in range(200):
            time.sleep(0.05)
            now = read()
            same = same + 1 if now == before else 0
            if same == 10:
                return now
            before = now
        raise AssertionError(f"memory does not come to rest: {before}")

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


def lose_rank_in_replays(losing: int) -> tuple[float, str]:
    """One rank exits; others say when their replays ended, and what a call told."""
    x, weights, plan, _ = prepare(_CASE)
    graph, _ = capture(lambda: exchange(x, weights, plan))
    graph.replay()
    meet()
    if dist.get_rank() == losing:
        os._exit(3)
    begin = time.monotonic()
    for _ in range(3):
        graph.replay()
    # There is no call of which the host could be told: only the GPU waits.
    torch.cuda.synchronize()
    seconds = time.monotonic() - begin
    text = ""
    try:
        exchange(x, weights, plan)
        torch.cuda.synchronize()
    except dist.DistBackendError as error:
        text = str(error)
    return seconds, text
