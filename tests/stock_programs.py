# SPDX-License-Identifier: Apache-2.0
"""What test_stock_callers.py runs in fresh processes; each function is a program."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from backend_programs import error_of, exchange, init
from stock_cases import CPU, ROUNDING, check_close
from stock_training import batch, make_net, sgd, train, values
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def _backends_alive() -> set[str]:
    return {dist.get_backend(it) for it in dist.distributed_c10d._world.pg_map}


def _train_by_defaults(backend: str, folder: str) -> object:
    """What a user's script does that names a backend in one place only."""
    rank, _ = init(backend)
    results: list[object] = []
    model = DistributedDataParallel(make_net())
    results += [train(model, sgd(model.parameters())), values(model)]
    # The names tell the meshes apart: DTensor caches outlive a destroyed group.
    names = (f"replicate_{backend}", f"shard_{backend}")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    model = make_net()
    fully_shard(model, mesh=mesh)
    optimizer = sgd(model.parameters())
    results += [train(model, optimizer)]
    state = {"model": model.state_dict(), "step": 3}
    path = Path(folder, backend)
    saving = dcp.async_save(state, checkpoint_id=path)
    saving.result()
    results += [values(model)]
    train(model, optimizer)
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
    assert state["step"] == 3
    loaded = {name: it for name, it in values(model).items() if "running" not in name}
    results += [loaded]
    shared = [{"rank": rank, "seed": 17}]
    dist.broadcast_object_list(shared, src=2)
    losses: list[object] = [None] * 4
    dist.all_gather_object(losses, model.eval()(batch(rank, 0)).sum().item())
    assert shared == [{"rank": 2, "seed": 17}] and None not in losses
    assert _backends_alive() == {backend}
    dist.destroy_process_group()
    return results


def trains_by_defaults(folder: str) -> None:
    """Nothing but init_process_group names the backend; each in turn, then again."""
    ours = _train_by_defaults("automoe", folder)
    reference = _train_by_defaults("gloo", folder)
    assert check_close(ours, reference, ROUNDING) > 30
    init("automoe")
    exchange()
    dist.destroy_process_group()


def uses_groups_after_destroy(folder: str) -> None:
    """A destroyed group says so, at once; others and a new default group go on."""
    rank, size = init()
    group = dist.new_group()
    exchange(group)
    dist.destroy_process_group(group)
    for use in (
        lambda: group.allreduce(torch.ones(1)).wait(),
        lambda: group.alltoall_base(torch.ones(size), torch.ones(size), [], []),
        lambda: group.send([torch.ones(1)], (rank + 1) % size, 0),
        lambda: group.barrier().wait(),
    ):
        text = error_of(use)
        assert "destroyed" in text, text
    text = error_of(lambda: dist.all_reduce(torch.ones(1), group=group))
    assert "no error" not in text, text
    exchange()
    world = dist.group.WORLD
    dist.destroy_process_group()
    text = error_of(lambda: world.allreduce(torch.ones(1)).wait())
    assert "destroyed" in text, text
    text = error_of(lambda: dist.all_reduce(torch.ones(1)))
    assert "has not been initialized" in text, text
    init()
    exchange()
    dist.destroy_process_group()


def debug_detail_mismatch(folder: str) -> None:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL names what differs between ranks."""
    rank, size = init()
    exchange()
    model = DistributedDataParallel(make_net(), find_unused_parameters=True)
    train(model, sgd(model.parameters()), branches=("left", "right"))
    text = error_of(lambda: dist.all_reduce(torch.ones(3 + rank)))
    assert "mismatch between collectives" in text and "AL" in text, text
    assert "TensorShape=[3]" in text and "TensorShape=[4]" in text, text

    def differ() -> None:
        if rank == 0:
            dist.all_reduce(torch.ones(4))
        else:
            dist.broadcast(torch.ones(4), 0)

    text = error_of(differ)
    assert "ALLREDUCE" in text and "BROADCAST" in text, text
    text = error_of(
        lambda: dist.all_gather_into_tensor(
            torch.empty(size * 2, dtype=torch.float64 if rank else torch.float32),
            torch.ones(2, dtype=torch.float64 if rank else torch.float32),
        )
    )
    assert "Float" in text and "Double" in text, text
    exchange()  # nothing was called on the group, which is whole
    dist.destroy_process_group()


def takes_options(folder: str) -> None:
    """Options reach groups by pg_options and by backend_override, one per dimension."""
    import torch_automoe

    options = torch_automoe.Options(timeout=timedelta(seconds=45))
    init("automoe", pg_options=options)
    names = ("dp", "ep")
    other = torch_automoe.Options(timeout=timedelta(seconds=35))
    for override in (
        {"ep": ("automoe", other), "dp": "gloo"},
        {"ep": other, 0: "gloo"},
        {1: ("automoe", other), "dp": "gloo"},
    ):
        mesh = init_device_mesh(
            "cpu", (2, 2), mesh_dim_names=names, backend_override=override
        )
        group = mesh["ep"].get_group()
        assert dist.get_backend(group) == "automoe"
        assert dist.get_backend(mesh["dp"].get_group()) == "gloo"
        backend = group._get_backend(CPU)
        assert backend.options._timeout == timedelta(seconds=35), backend.options
        exchange(group)
        exchange(mesh["dp"].get_group())
    # The user's object is a template: no group's name was written into it.
    assert other._timeout == timedelta(seconds=35)
    exchange()
    dist.destroy_process_group()


# ---- DataLoader ----


class Squares(torch.utils.data.Dataset):
    """Number squared, made in a worker, which has torch with the backend in it."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        assert torch.utils.data.get_worker_info() is not None
        assert "automoe" in dist.Backend.backend_list
        return torch.tensor([float(index * index)])


def loads_data_in_workers(folder: str) -> None:
    """Workers of both start methods, alive across steps that use the group."""
    rank, size = init()
    exchange()
    for method in ("spawn", "fork"):
        loader = torch.utils.data.DataLoader(
            Squares(),
            batch_size=2,
            sampler=torch.utils.data.DistributedSampler(Squares(), shuffle=False),
            num_workers=1,
            multiprocessing_context=method,
            persistent_workers=True,
        )
        for _ in range(2):
            found = []
            for numbers in loader:
                found += numbers.flatten().tolist()
                exchange(rounds=1)
            assert found == [float(i * i) for i in range(rank, 12, size)], found
        del loader
    dist.destroy_process_group()


# ---- torchrun ----


def fails_once_under_torchrun(folder: str) -> None:
    """Rank 1 fails in its first life, in the middle of the others' collective."""
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rank, size = init()
    if life == 0 and rank != 1:
        # The agent ends them as soon as rank 1 has failed; they write first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    exchange()
    if life == 0:
        if rank == 1:
            os._exit(3)
        text = error_of(lambda: dist.all_reduce(torch.ones(1000)))
        Path(folder, f"error-{rank}").write_text(text)
        sys.exit(4)
    total = torch.full((3,), float(rank))
    dist.all_reduce(total)
    assert total.tolist() == [sum(range(size))] * 3
    exchange()
    model = DistributedDataParallel(make_net())
    train(model, sgd(model.parameters()), steps=1)
    dist.destroy_process_group()
    # A single write: lines of several ranks do not mix.
    os.write(1, f"rank {rank} is done in life {life}\n".encode())
