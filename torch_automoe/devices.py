# SPDX-License-Identifier: Apache-2.0
"""What a group's nodes and GPUs are, and which way CUDA tensors take between them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from torch_automoe import _loader
from torch_automoe.backend import Topology, topology


def explain_topology(
    group: dist.ProcessGroup | None = None, *, gather: bool = False
) -> str:
    """Return in lines of text what was found of nodes and GPUs, and what is used.

    Without a process group, the lines are about this process alone. What is missing,
    such as a driver, is a line too. Where there are GPUs, the last lines tell which way
    CUDA tensors of the group have been given, and why, once there were any.

    Args:
        group: the group, with the backend "automoe"; None: the default group.
        gather: ask the other ranks for their GPUs too, for lines on each pair of ranks
            and on the way that CUDA tensors can take. All ranks of the group must then
            call it.

    Raises:
        ValueError: the group has no backend "automoe", or ``gather`` is asked for
            without a group.
    """
    if group is None and not dist.is_initialized():
        if gather:
            raise ValueError(
                "explain_topology got gather=True, but there is no process group: call "
                "torch.distributed.init_process_group('automoe') first"
            )
        lines = ["there is no process group: this is about this process alone"]
        return "\n".join(lines + _explain_own(rank=0))

    found = topology(group)
    lines = _explain_nodes(found)
    if gather:
        facts: list[bytes] = [b""] * len(found.node_of_rank)
        dist.all_gather_object(facts, _own_facts(found.rank), group)
        lines += _loader.load().explain_devices(facts, found.node_of_rank)
    else:
        lines += _explain_own(found.rank)
    if torch.cuda.is_available():
        name = (group or dist.group.WORLD).group_name
        used = _loader.load().describe_device_group(name).splitlines()
        lines += [line for line in used if line not in lines]
    return "\n".join(lines)


def _explain_nodes(found: Topology) -> list[str]:
    """Say which ranks are on each node, and which make a rail."""
    nodes: dict[int, list[int]] = {}
    rails: dict[int, list[int]] = {}
    for rank, node in enumerate(found.node_of_rank):
        nodes.setdefault(node, []).append(rank)
        rails.setdefault(found.local_rank_of_rank[rank], []).append(rank)
    ranks = len(found.node_of_rank)
    lines = [
        f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {found.num_nodes} "
        f"{'node' if found.num_nodes == 1 else 'nodes'}; this is rank {found.rank}"
    ]
    lines += [f"node {node}: {_rank_text(nodes[node])}" for node in sorted(nodes)]
    if found.num_nodes > 1:
        # Rows cross between nodes from each rank to its peer on the same rail.
        lines += [f"rail {rail}: {_rank_text(rails[rail])}" for rail in sorted(rails)]
    return lines


def _rank_text(ranks: list[int]) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"


def _explain_own(rank: int) -> list[str]:
    return _loader.load().explain_device(_own_facts(rank))


def _own_facts(rank: int) -> bytes:
    """Return what this process sees of GPUs, as bytes for the other ranks."""
    return _loader.load().device_facts(
        rank=rank,
        nccl_shares_gpus=os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1",
        why_no_device=_why_not_torch(torch.__version__, torch.version.cuda),
    )


def _why_not_torch(version: str, cuda: str | None) -> str:
    """Return why this torch has no CUDA device on any machine, or nothing."""
    return "" if cuda else f"torch {version} is a CPU build"
