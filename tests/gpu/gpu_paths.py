# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_gpu_paths.py run: which way CUDA tensors go, and by whom."""

from __future__ import annotations

import os

import gpu_operators
import torch
import torch.distributed as dist
from gpu_cases import Case, own_device

import torch_automoe as automoe
from torch_automoe import _loader

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
    os.environ["AUTOMOE_NODE"] = "ab"[node]
    dist.init_process_group("automoe")


def compare_and_describe() -> tuple[str, str]:
    """Exchange on the GPU against the CPU; then what was used, and what was found."""
    for case in _CASES:
        gpu_operators.compare_exchange(case)
        gpu_operators.compare_gradients(case, 0, False)
        gpu_operators.compare_gradients(case, 3, False)
    used = _loader.load().describe_device_group(gpu_operators.group_name())
    return used, automoe.explain_topology(gather=True)


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
    """all_to_all_single with even and uneven splits, against the CPU's."""
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
