# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_gpu_paths.py run: which way CUDA tensors go, and by whom."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

import gpu_cases
import gpu_operators
import torch
import torch.distributed as dist
from gpu_cases import Case, assert_same, on, own_device
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import torch_automoe as automoe
from torch_automoe import _loader

_ops = torch.ops.automoe
_SCALE_ELEMENTS = 128
_FP8_MOST = 448.0  # the largest finite value

_CASES = (
    Case(hidden=129),
    Case(tokens=(0, 40), topk=6, dtype="float32", align=4),
    Case(tokens=(300,), topk=8, num_experts=32, hidden=1024),
)


def join(ranks_per_node: int) -> None:
    """Make the group, in which so many ranks in turn call themselves one node."""
    if dist.is_initialized():
        return
    node = int(os.environ["RANK"]) // ranks_per_node
    os.environ["AUTOMOE_NODE"] = "abc"[node]
    dist.init_process_group("automoe")


def join_without_interface(refused: int) -> None:
    """The same, each rank a node, on one of which NCCL finds no interface."""
    if int(os.environ["RANK"]) == refused:
        os.environ["NCCL_SOCKET_IFNAME"] = "=no_such"
    join(1)


def compare_and_describe() -> tuple[str, str]:
    """Exchange on the GPU against the CPU; then what was used, and what was found."""
    for case in _CASES:
        gpu_operators.compare_exchange(case)
        gpu_operators.compare_gradients(case, 0, False)
        gpu_operators.compare_gradients(case, 3, False)
    used = _loader.load().describe_device_group(gpu_operators.group_name())
    return used, automoe.explain_topology(gather=True)


# Of rows whose 8-bit floats and scales take fewer bytes than the rows themselves.
_FP8_CASES = (
    Case(hidden=129),
    Case(hidden=256, dtype="float16", holes=True),
    Case(tokens=(0, 40), topk=6, hidden=33, dtype="float32", align=4),
    Case(hidden=64, dtype="float64"),  # goes as it is
    Case(tokens=(300,), topk=8, num_experts=32, hidden=1024),
)


def quantize(rows: Tensor) -> Tensor:
    """Rows as they come out of 8-bit floats with a scale for each 128 elements."""
    if rows.dtype == torch.float64:
        return rows
    count, hidden = rows.shape
    padded = torch.nn.functional.pad(rows.float(), (0, -hidden % _SCALE_ELEMENTS))
    blocks = padded.view(count, padded.shape[1] // _SCALE_ELEMENTS, _SCALE_ELEMENTS)
    largest = blocks.abs().amax(dim=2, keepdim=True)
    scales = (largest / _FP8_MOST).clamp(min=torch.finfo(torch.float32).tiny)
    scales = torch.where(largest == 0, 1.0, scales)
    values = blocks * (torch.ones_like(scales) / scales)
    values = values.clamp(-_FP8_MOST, _FP8_MOST).to(torch.float8_e4m3fn)
    back = (values.float() * scales).view(padded.shape)
    return back[:, :hidden].to(rows.dtype).contiguous()


def compare_fp8() -> str:
    """Exchange on a group of the wire "fp8", in which each rank is a node; what was
    used."""
    group = dist.new_group(pg_options=automoe.Options(wire="fp8"))
    name = group.group_name
    for case in _FP8_CASES:
        inputs = gpu_cases.draw(case, dist.get_rank())
        # Values of all magnitudes, and a block of zeros.
        x = inputs.x * torch.logspace(-3, 3, max(1, case.hidden)).to(inputs.x.dtype)
        x[:1] = 0
        ids, weights = inputs.ids, inputs.weights
        route, *lists = _ops.plan(ids, case.num_experts, name, case.align)
        sources = torch.full((x.shape[0], 1), float(dist.get_rank()))
        columns = [x, quantize(x), sources.to(x.dtype)]
        (exact, rounded, source), of_rows = _ops.dispatch(
            columns, weights, route, lists[0], name
        )
        rows = torch.where(source == dist.get_rank(), exact, rounded)
        out, _ = _ops.combine(rows, of_rows, None, route, lists[0], name, -1, -1)
        expected = [lists, rows, of_rows, out]

        ids, x, weights = on(own_device(), ids, x, weights)
        route, *lists = _ops.plan(ids, case.num_experts, name, case.align)
        (rows,), of_rows = _ops.dispatch([x], weights, route, lists[0], name)
        out, _ = _ops.combine(rows, of_rows, None, route, lists[0], name, -1, -1)
        where = gpu_cases.describe(case)
        assert_same([lists, rows, of_rows, out], expected, where=where)
    used = _loader.load().describe_device_group(name)
    dist.destroy_process_group(group)
    return used


def use_few_blocks(limit: int) -> tuple[str, list[int]]:
    """Exchange on a group of ``max_ctas``; what was used, and the blocks of each of our
    kernels."""
    group = dist.new_group(pg_options=automoe.Options(max_ctas=limit))
    for case in _CASES:
        gpu_operators.compare_exchange(case, group.group_name)
    used = _loader.load().describe_device_group(group.group_name)
    blocks = _measure_blocks(_CASES[-1], group)
    dist.destroy_process_group(group)
    return used, blocks


def _measure_blocks(case: Case, group: dist.ProcessGroup) -> list[int]:
    """Blocks of each of our kernels in a dispatch and combine, as CUPTI tells them."""
    inputs = gpu_cases.draw(case, dist.get_rank())
    ids, x, weights = on(own_device(), inputs.ids, inputs.x, inputs.weights)
    plan = automoe.plan(ids, num_experts=case.num_experts, group=group)

    def exchange() -> None:
        recv, recv_weights = automoe.dispatch(x, weights, plan)
        automoe.combine(recv, plan, recv_weights)
        torch.cuda.synchronize()

    exchange()  # arenas and kernels are made at first use
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        exchange()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        found.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return [
        math.prod(event["args"]["grid"])
        for event in events
        if "automoe::" in event.get("name", "") and "grid" in event.get("args", {})
    ]


def use_collectives() -> None:
    """Collectives of CUDA tensors, which the inner NCCL group runs."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), own_device()
    total = torch.full((5,), rank + 1.0, device=device)
    dist.all_reduce(total)
    assert total.tolist() == [size * (size + 1) / 2] * 5
    told = torch.full((3,), float(rank), device=device)
    dist.broadcast(told, 0)
    assert told.tolist() == [0.0] * 3
    parts = [torch.empty(2, device=device) for _ in range(size)]
    dist.all_gather(parts, torch.full((2,), float(rank), device=device))
    assert [part[1].item() for part in parts] == list(range(size))
    mine = torch.empty(2, device=device)
    dist.reduce_scatter_tensor(mine, torch.ones(2 * size, device=device))
    assert mine.tolist() == [size, size]
    work = dist.all_reduce(total, async_op=True)
    work.wait()
    assert total.tolist() == [size * size * (size + 1) / 2] * 5
    dist.barrier()


def use_all_to_all() -> None:
    """all_to_all_single, with even and uneven splits, and all_to_all as on the CPU."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), own_device()
    for splits in (None, [rank + peer + 1 for peer in range(size)]):
        count = size if splits is None else sum(splits)
        sent = torch.arange(3 * count).view(count, 3) + 1000 * rank
        found = []
        for place in ("cpu", device):
            received = torch.zeros_like(sent, device=place)
            dist.all_to_all_single(received, sent.to(place), splits, splits)
            found.append(received.cpu())
        assert torch.equal(*found)
    lists = []
    for place in ("cpu", device):
        blocks = [
            torch.full((rank + peer + 1, 2), 10 * rank + peer, device=place)
            for peer in range(size)
        ]
        received = [torch.empty_like(block) for block in blocks]
        dist.all_to_all(received, blocks)
        lists.append(torch.cat(received).cpu())
    assert torch.equal(*lists)


def use_peer_all_to_all(limit: int | None) -> str:
    """Equal blocks up to ``limit`` bytes through memory of the node; what was used."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), own_device()
    group = dist.new_group(pg_options=automoe.Options(peer_all_to_all=limit))
    for rows in (1, 300, 70_000):  # of 16 bytes, to each rank
        sent = torch.arange(rows * size * 4, device=device).view(-1, 4).int() * 7 + rank
        received = torch.zeros_like(sent)
        for _ in range(3):
            dist.all_to_all_single(received, sent, group=group)
        blocks = torch.arange(rows * size * 4).view(size, rows, 4).int() * 7
        expected = blocks[rank].repeat(size, 1)
        expected += torch.arange(size).int().repeat_interleave(rows)[:, None]
        assert torch.equal(received.cpu(), expected), rows
    used = _loader.load().describe_device_group(group.group_name)
    dist.destroy_process_group(group)
    return used
