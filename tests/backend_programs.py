# SPDX-License-Identifier: Apache-2.0
"""What test_backend.py runs in fresh processes: like user code, it imports only torch.

Each function is the whole program of every rank.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# In a rank; pytest's own process may have loaded it for other tests.
assert "pytest" in sys.modules or "torch_automoe._C" not in sys.modules, (
    "import torch loads the extension"
)


def init(backend: str | None = "automoe", **options: object) -> tuple[int, int]:
    """Make the default group; returns rank and world size."""
    options.setdefault("timeout", timedelta(seconds=60))
    dist.init_process_group(backend, **options)
    return dist.get_rank(), dist.get_world_size()


def exchange(group: dist.ProcessGroup | None = None, rounds: int = 2) -> None:
    """Check uneven all-to-alls, an inner collective and a barrier in a group."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for _ in range(rounds):
        counts = [rank + peer for peer in range(size)]  # symmetric
        sent = torch.cat([torch.full((n,), 100 * rank + n) for n in counts])
        received = torch.empty(sum(counts), dtype=torch.int64)
        dist.all_to_all_single(received, sent, counts, counts, group=group)
        expected = [torch.full((n,), 100 * peer + n) for peer, n in enumerate(counts)]
        assert torch.equal(received, torch.cat(expected)), received
        total = torch.tensor([float(rank)])
        dist.all_reduce(total, group=group)
        assert total.item() == size * (size - 1) / 2
    dist.barrier(group)


def backend_of(group: dist.ProcessGroup, device: torch.device = CPU) -> str:
    """Name of what serves a device in a group."""
    return group._get_backend(device).name()


# ---- names and maps ----


def by_name() -> None:
    """init_process_group("automoe") serves both devices with one object."""
    init("automoe")
    assert dist.Backend.AUTOMOE == "automoe"
    assert dist.get_backend() == "automoe"
    world = dist.group.WORLD
    assert backend_of(world) == "automoe"
    assert world._get_backend(CPU) is world._get_backend(CUDA)
    exchange()
    dist.destroy_process_group()
    assert not dist.is_initialized()


def cpu_map() -> None:
    """init_process_group("cpu:automoe")."""
    init("cpu:automoe")
    assert backend_of(dist.group.WORLD) == "automoe"
    exchange()
    dist.destroy_process_group()


def both_devices_map() -> None:
    """Both devices in a map: still one object."""
    init("cpu:automoe,cuda:automoe")
    world = dist.group.WORLD
    assert world._get_backend(CPU) is world._get_backend(CUDA)
    exchange()
    dist.destroy_process_group()


def gloo_and_automoe_map() -> None:
    """Gloo for CPU tensors, automoe registered for CUDA tensors only."""
    init("cpu:gloo,cuda:automoe")
    assert backend_of(dist.group.WORLD) == "gloo"
    assert backend_of(dist.group.WORLD, CUDA) == "automoe"
    exchange()  # by gloo
    dist.destroy_process_group()


def stays_behind_the_defaults() -> None:
    """Who names no backend, or another one, never gets this one."""
    assert dist.get_default_backend_for_device("cpu") == "gloo"
    assert dist.Backend.default_device_backend_map["cuda"] == "nccl"
    init("gloo")
    exchange()
    dist.destroy_process_group()
    assert "torch_automoe._C" not in sys.modules


# ---- groups ----


def beside_gloo() -> None:
    """new_group(backend="automoe") over some ranks of a gloo job."""
    rank, size = init("gloo")
    ours = dist.new_group([0, size - 1], backend="automoe")
    everyone = dist.new_group(backend="automoe")
    if rank in (0, size - 1):
        assert dist.get_backend(ours) == "automoe"
        exchange(ours)
        dist.destroy_process_group(ours)
    exchange(everyone)  # the others outlive a destroyed group
    exchange()
    dist.destroy_process_group()


def meshes() -> None:
    """Mesh dimensions by backend_override, and a mesh of an automoe job."""
    from torch.distributed.device_mesh import init_device_mesh

    init("gloo")
    names = ("dp", "ep")
    mesh = init_device_mesh(
        "cpu", (2, 2), mesh_dim_names=names, backend_override={"ep": "automoe"}
    )
    assert dist.get_backend(mesh["ep"].get_group()) == "automoe"
    assert dist.get_backend(mesh["dp"].get_group()) == "gloo"
    exchange(mesh["ep"].get_group())
    exchange(mesh["dp"].get_group())
    dist.destroy_process_group()

    init("automoe")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    for name in names:
        assert dist.get_backend(mesh[name].get_group()) == "automoe"
        exchange(mesh[name].get_group())
    flat = mesh._flatten("all")
    exchange(flat.get_group())
    dist.destroy_process_group()


def strided_and_permuted_groups() -> None:
    """Groups in any order of ranks, used beside each other."""
    rank, size = init()
    members = [[0, 2], [1, 3], [3, 1, 2], list(range(size))[::-1], [2, 0, 3, 1]]
    groups = [(ranks, dist.new_group(ranks, sort_ranks=False)) for ranks in members]
    for ranks, group in groups:
        if rank in ranks:
            assert dist.get_group_rank(group, rank) == ranks.index(rank)
            exchange(group)
    exchange()
    dist.destroy_process_group()


def one_rank() -> None:
    """A job of one rank: collectives copy."""
    init()
    exchange()
    sent = torch.arange(3.0)
    received = torch.empty(3)
    dist.all_to_all([received], [sent])
    assert torch.equal(received, sent)
    dist.destroy_process_group()


def groups_of_one_rank() -> None:
    """Groups of one rank in a larger job."""
    rank, size = init()
    for owner in range(size):
        group = dist.new_group([owner])
        if rank == owner:
            exchange(group)
    exchange()
    dist.destroy_process_group()


def read_outs() -> None:
    """topology, stats and explain_exchange, once the user does import the package."""
    import torch_automoe

    rank, size = init()
    other = dist.new_group(backend="gloo")
    exchange()
    topology = torch_automoe.topology()
    assert topology.rank == rank
    assert topology.num_nodes == len(set(topology.node_of_rank)) == 2
    assert topology.local_rank_of_rank == [0, 1, 0]
    stats = torch_automoe.stats(dist.group.WORLD)
    assert stats["operations"] == 5  # per round two, and a barrier
    assert stats["network_bytes_sent"] > 0
    assert stats["network_messages_sent"] > 0
    # What the only rank of node 1 sends to node 0 arrives at rank 0, its rail peer.
    assert rank == 1 or stats["network_bytes_received"] > 0
    assert stats["wait_us"] > 0
    assert "2 nodes" in torch_automoe.explain_exchange()
    for read in (torch_automoe.topology, torch_automoe.stats):
        try:
            read(other)
        except ValueError as error:
            assert "the group's backend is 'gloo', expected 'automoe'" in str(error)
        else:
            raise AssertionError(f"{read} accepts a gloo group")
    assert size == 3
    dist.destroy_process_group()


# ---- life ----


def init_again(kind: str, path: str) -> None:
    """Destroy and make the group again at once, with ranks out of step.

    The store outlives the groups, so that each finds the keys of its predecessors.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if kind == "file":
        store = dist.FileStore(path, size)
    else:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, size, is_master=rank == 0)
    for turn in range(6):
        init(store=store, rank=rank, world_size=size)
        group = dist.new_group([0, size - 1])
        if rank in (0, size - 1):
            exchange(group, rounds=1)
        exchange(rounds=1)
        dist.destroy_process_group()
        if turn % size == rank:
            time.sleep(0.2)
    # The store's owner leaves last.
    store.add("ended", 1)
    while rank == 0 and store.add("ended", 0) < size:
        time.sleep(0.01)


def file_method(path: str) -> None:
    """init_method="file://..."."""
    init(
        init_method=f"file://{path}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    exchange()
    dist.destroy_process_group()


def under_torchrun() -> None:
    """The agent's store serves one group after another."""
    assert "TORCHELASTIC_RUN_ID" in os.environ
    for _ in range(3):
        rank, _ = init()
        exchange()
        dist.destroy_process_group()
        time.sleep(0.1 * rank)
    # A single write: lines of several ranks do not mix.
    os.write(1, f"rank {rank} is done\n".encode())


def exits_without_destroy() -> None:
    """The interpreter's exit ends the backend."""
    init()
    exchange(dist.new_group())
    exchange()


def exits_with_pending_work() -> None:
    """Exit with a Work that nobody waited for, on all ranks and on one rank only."""
    rank, size = init()
    exchange()
    keep = []
    for _ in range(3):
        keep.append(dist.all_to_all_single(*_pair(size), async_op=True))
    if rank == 0:
        keep.append(dist.all_to_all_single(*_pair(size), async_op=True))
    sys.keep = keep  # alive until the interpreter ends


def destroys_with_pending_work() -> None:
    """Destroy drains what all ranks have posted; its data is there."""
    rank, size = init()
    received, sent = _pair(size)
    sent += rank
    if rank == 0:
        time.sleep(0.5)
    work = dist.all_to_all_single(received, sent, async_op=True)
    dist.destroy_process_group()
    assert work.is_completed()
    work.wait()
    expected = [peer + 1.0 for peer in range(size) for _ in range(1000)]
    assert received.tolist() == expected


def _pair(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(1000 * size), torch.ones(1000 * size)


def debug_detail() -> None:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL wraps the backend and checks every call."""
    import torch_automoe

    assert dist.get_debug_level() == dist.DebugLevel.DETAIL
    rank, size = init()
    exchange()
    group = dist.new_group([0, size - 1])
    if rank in (0, size - 1):
        exchange(group)
    assert torch_automoe.stats()["operations"] == 5
    dist.destroy_process_group()


def without_autoload() -> None:
    """TORCH_DEVICE_BACKEND_AUTOLOAD=0: importing the module registers it."""
    assert "automoe" not in dist.Backend.backend_list
    assert "torch_automoe" not in sys.modules
    import torch_automoe.backend

    assert torch_automoe.backend.BACKEND in dist.Backend.backend_list
    init()
    exchange()
    dist.destroy_process_group()


# ---- fork ----


def _in_child(call) -> str:
    """Run something in a forked child; returns what it wrote."""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, which this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(write_end, str(call()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end) as end:
        text = end.read()
    assert os.waitpid(child, 0)[1] == 0, "the forked child failed"
    return text


def error_of(call, *args: object) -> str:
    try:
        call(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def forks() -> None:
    """A forked child is told what is wrong, at once; its parent goes on."""
    init()
    exchange()
    for use in (exchange, lambda: dist.new_group([dist.get_rank()])):
        text = _in_child(lambda use=use: error_of(use))
        assert "this process was forked from one that had used" in text, text
    # While another thread is inside a wait.
    received, sent = _pair(dist.get_world_size())
    if dist.get_rank() == 0:
        work = dist.all_to_all_single(received, sent, async_op=True)
        waiter = threading.Thread(target=work.wait)
        waiter.start()
        time.sleep(0.2)
        text = _in_child(lambda: error_of(exchange))
        assert "this process was forked from one that had used" in text, text
        dist.send(torch.ones(1), 1)
        waiter.join()
    elif dist.get_rank() == 1:
        dist.recv(torch.ones(1), 0)
        dist.all_to_all_single(received, sent)
    exchange()
    dist.destroy_process_group()


def forks_and_exits() -> None:
    """Children that leave as multiprocessing's do, atexit functions included."""
    init()
    exchange()
    child = os.fork()
    if child == 0:
        sys.exit(0)  # runs the interpreter's whole end
    assert os.waitpid(child, 0)[1] == 0
    exchange()
    dist.destroy_process_group()


class _Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


def loads_data_in_forked_workers() -> None:
    """A DataLoader forks its workers after init, in every epoch."""
    init()
    exchange()
    loader = torch.utils.data.DataLoader(
        _Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork"
    )
    for _ in range(2):
        numbers = torch.cat(list(loader))
        assert numbers.flatten().tolist() == [float(i) for i in range(16)]
        exchange()
    dist.destroy_process_group()
