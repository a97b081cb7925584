# SPDX-License-Identifier: Apache-2.0
"""What trains on c10d: on automoe groups as on gloo groups, and the same bits again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from exchange_cases import group_pairs, same_bits
from torch import nn

Group = dist.ProcessGroup
Tensors = list[torch.Tensor]


def _model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 5))


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> Tensors:
    """Two steps on data of this rank's own; returns the losses."""
    generator = torch.Generator().manual_seed(dist.get_rank(group))
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 6, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


# ---- one per stack: (group) -> tensors of this rank ----


def functional(group: Group) -> Tensors:
    """The functional collectives that DTensor and compiled code use."""
    import torch.distributed._functional_collectives as funcol

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = torch.arange(size * 4.0).view(size * 2, 2) * (rank + 1)
    results = [
        funcol.all_reduce(mine, "sum", group),
        funcol.all_reduce(mine, "avg", group),
        funcol.all_gather_tensor(mine, 0, group),
        funcol.all_gather_tensor(mine, 1, group),
        funcol.reduce_scatter_tensor(mine, "sum", 0, group),
        funcol.broadcast(mine, 0, group),
        *funcol.all_reduce_coalesced([mine, mine + 1], "sum", group),
        *funcol.all_gather_into_tensor_coalesced([mine, mine + 1], group),
        *funcol.reduce_scatter_tensor_coalesced([mine, mine + 1], "sum", [0, 0], group),
        funcol.permute_tensor(mine.view(-1), [*range(1, size), 0], group),
    ]
    return [funcol.wait_tensor(it) for it in results]


def data_parallel(group: Group) -> Tensors:
    """DDP with small buckets, an unused parameter, and a buffer to synchronise."""
    model = nn.Sequential(_model(), nn.BatchNorm1d(5))
    model[0].register_parameter("unused", nn.Parameter(torch.ones(2)))
    model = nn.parallel.DistributedDataParallel(
        model, process_group=group, bucket_cap_mb=1e-4, find_unused_parameters=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.no_sync():
        model(torch.ones(4, 6)).sum().backward()
    losses = _steps(model, optimizer, group)
    state = model.state_dict().values()
    return losses + [it.detach().float() for it in state]


def fully_sharded(group: Group) -> Tensors:
    """FSDP2 with a nested module and parameters that do not divide evenly."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu")
    model = _model()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = _steps(model, optimizer, group)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    shards = [it.to_local().detach() for it in model.parameters()]
    return [*losses, norm.full_tensor().detach(), *shards]


def redistribute(group: Group) -> Tensors:
    """DTensor from every placement to every other."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
    )

    mesh = DeviceMesh.from_group(group, "cpu")
    whole = torch.arange(35.0).view(7, 5)  # divides by no group's size
    results = []
    for source in (Shard(0), Shard(1), Replicate()):
        tensor = distribute_tensor(whole, mesh, [source])
        for target in (Shard(0), Shard(1), Replicate()):
            moved = tensor.redistribute(mesh, [target])
            assert torch.equal(moved.full_tensor(), whole)
            results.append(moved.to_local())
    partial = DTensor.from_local(
        whole * (dist.get_rank(group) + 1), mesh, [Partial()], run_check=False
    )
    for target in (Shard(0), Shard(1), Replicate()):
        results.append(partial.redistribute(mesh, [target]).to_local())
    return results


def compare(stack: Callable[[Group], Tensors], exact: bool) -> int:
    """Run a stack on an automoe and on a gloo group; returns tensors compared.

    ``exact``: its numbers are whole, so that sums have the same bits in any order.
    Otherwise ours are over nodes first, gloo's along a ring.
    """
    compared = 0
    for pair in group_pairs():
        if dist.get_rank() in pair.ranks:
            ours, reference = stack(pair.automoe), stack(pair.gloo)
            assert same_bits(ours, stack(pair.automoe)), (stack.__name__, pair.ranks)
            if exact:
                assert same_bits(ours, reference), (stack.__name__, pair.ranks)
            else:
                torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
            compared += len(ours)
    return compared


def checkpoint(folder: str) -> None:
    """DCP writes shards of one placement and reads them back into another."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert dist.get_backend(mesh.get_group()) == "automoe"
    whole = {"a": torch.arange(35.0).view(7, 5), "b": torch.ones(3).bfloat16()}
    shards = {
        name: distribute_tensor(tensor, mesh, [Shard(0)])
        for name, tensor in whole.items()
    }
    dcp.save({"model": copy.copy(shards), "step": 3}, checkpoint_id=folder)
    zeros = {
        name: distribute_tensor(
            torch.zeros_like(tensor), mesh, [Shard(1) if name == "a" else Replicate()]
        )
        for name, tensor in whole.items()
    }
    state = {"model": zeros, "step": 0}
    dcp.load(state, checkpoint_id=folder)
    assert state["step"] == 3
    for name, tensor in whole.items():
        assert torch.equal(zeros[name].full_tensor(), tensor)


def checkpoint_asynchronously(folder: str) -> None:
    """A DCP save in a thread, on a group of its own, beside all-to-alls."""
    import torch.distributed.checkpoint as dcp

    group = dist.new_group(backend="automoe")
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.full((100,), float(rank))
    saving = dcp.async_save(
        {f"rank{rank}": mine}, checkpoint_id=folder, process_group=group
    )
    for _ in range(20):
        received = torch.empty(size * 1000)
        dist.all_to_all_single(received, torch.full((size * 1000,), float(rank)))
        assert torch.equal(received[::1000], torch.arange(float(size)))
    saving.result()
    loaded = {f"rank{rank}": torch.zeros(100)}
    dcp.load(loaded, checkpoint_id=folder, process_group=group)
    assert torch.equal(loaded[f"rank{rank}"], mine)
    dist.destroy_process_group(group)


@pytest.mark.parametrize("rank_pool", [[2, 1]], indirect=True)
class TestParallelTraining:
    @pytest.mark.parametrize(
        ("stack", "exact"),
        [
            (functional, True),
            (data_parallel, False),
            (fully_sharded, False),
            (redistribute, True),
        ],
        ids=lambda it: getattr(it, "__name__", ""),
    )
    def test_as_on_gloo(
        self, rank_pool: RankPool, stack: Callable[[Group], Tensors], exact: bool
    ) -> None:
        assert min(rank_pool.run(compare, stack, exact)) > 0

    def test_checkpoint(self, rank_pool: RankPool, tmp_path: Path) -> None:
        rank_pool.run(checkpoint, str(tmp_path))

    def test_asynchronous_checkpoint(self, rank_pool: RankPool, tmp_path: Path) -> None:
        rank_pool.run(checkpoint_asynchronously, str(tmp_path))
