# SPDX-License-Identifier: Apache-2.0
"""More of what test_backend.py runs in fresh processes: options, splits, hooks."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from backend_programs import CPU, exchange, init


def takes_options() -> None:
    """Options of ours are taken, also by subgroups; all others are named in errors."""
    import torch_automoe as automoe

    for wrong, error in (
        ({"merge_row": True}, TypeError),
        ({"merge_rows": "yes"}, TypeError),
        ({"node": 3}, TypeError),
        ({"max_ctas": 1.5}, TypeError),
        ({"max_ctas": 0}, ValueError),
        ({"peer_all_to_all": -1}, TypeError),
        ({"wire": "fp16"}, ValueError),
        ({"wire": 8}, TypeError),
    ):
        try:
            automoe.Options(**wrong)
        except error:
            pass
        else:
            raise AssertionError(f"Options took {wrong}")
    name = f"node{os.environ['RANK']}"
    options = automoe.Options(
        node=name, merge_rows=False, timeout=timedelta(seconds=9), max_ctas=16
    )
    _, size = init(pg_options=options)
    backend = dist.group.WORLD._get_backend(CPU)
    assert backend.options._timeout == timedelta(seconds=9)
    assert backend.options.merge_rows is False
    assert backend.options.max_ctas == 16
    options.max_ctas = None
    assert backend.options.max_ctas == 16  # it has its own
    try:
        options.max_ctas = -1
    except ValueError as error:
        assert "max_ctas is -1, expected at least 1" in str(error)
    else:
        raise AssertionError("max_ctas = -1 was accepted")
    assert backend.options.node == name
    assert automoe.topology().num_nodes == size  # pinned apart
    exchange()
    mesh = dist.device_mesh.init_device_mesh(
        "cpu",
        (1, size),
        mesh_dim_names=("dp", "ep"),
        backend_override={"ep": ("automoe", automoe.Options())},
    )
    assert automoe.topology(mesh["ep"].get_group()).num_nodes == 1
    exchange(mesh["ep"].get_group())
    try:
        dist.new_group(pg_options=dist.ProcessGroupGloo._Options())
    except ValueError as error:
        assert "pg_options is a _Options, expected torch_automoe.Options" in str(error)
    else:
        raise AssertionError("pg_options of gloo were accepted")
    dist.destroy_process_group()


def splits() -> None:
    """A backend makes groups of some of its ranks; the others get nothing."""
    rank, size = init()
    parent = dist.group.WORLD._get_backend(CPU)
    assert parent.supports_splitting
    assert parent.supports_coalescing
    members = list(range(1, size))  # sorted by torch in any case
    child = dist.group.WORLD.split_group(members, group_name="some")
    if rank == 0:
        assert child is None
    else:
        assert (child.rank(), child.size()) == (members.index(rank), size - 1)
        assert child._get_backend(CPU).options._timeout == parent.options._timeout
        total = torch.tensor([float(rank)])
        child.allreduce([total]).wait()
        assert total.item() == size * (size - 1) / 2
    parent.perform_nocolor_split(CPU)
    exchange()
    dist.destroy_process_group()


def many_groups() -> None:
    """64 groups that are used cost no thread more than one."""
    init()
    exchange()
    before = len(os.listdir("/proc/self/task"))
    groups = [dist.new_group() for _ in range(64)]
    for group in groups:
        exchange(group, rounds=1)
    # A thread more may help for a moment where calls of a user wait in works.
    deadline = time.monotonic() + 10
    while (after := len(os.listdir("/proc/self/task"))) > before:
        assert time.monotonic() < deadline, (before, after)
        time.sleep(0.01)
    dist.destroy_process_group()


def completion_hooks() -> None:
    """The hook hears of every operation; waiting for pending works waits for it."""
    init()
    world = dist.group.WORLD
    heard = []
    world._register_on_completion_hook(
        lambda info: heard.append((info.seq, str(info.op_type), info.active_duration))
    )
    exchange(rounds=3)
    world._wait_for_pending_works()
    kinds = [kind for _, kind, _ in sorted(heard)]
    expected = ["OpType.ALLTOALL_BASE", "OpType.ALLREDUCE"] * 3
    assert kinds == [*expected, "OpType.BARRIER"], kinds
    assert all(duration.total_seconds() >= 0 for *_, duration in heard)
    dist.destroy_process_group()


def other_devices() -> None:
    """What is not on the CPU goes to the inner group: a stand-in, which is asked."""
    from torch._C._distributed_c10d import FakeProcessGroup

    import torch_automoe as automoe
    from torch_automoe._loader import load

    rank, size = init()
    inner = FakeProcessGroup._create_internal(rank, size)
    store = dist.PrefixStore("inner", dist.distributed_c10d._get_default_store())
    made = load().ProcessGroupAutoMoe(
        store, rank, size, "with inner", [], automoe.Options(), inner
    )
    one, many = torch.ones(4, device="meta"), torch.ones(4 * size, device="meta")
    lists = [torch.ones(4, device="meta") for _ in range(size)]
    calls = [
        lambda: made.allreduce([one]),
        lambda: made.broadcast([one]),
        lambda: made.allgather([lists], [one]),
        lambda: made._allgather_base(many, one),
        lambda: made._reduce_scatter_base(one, many),
        lambda: made.alltoall_base(many, many.clone(), [], []),
        lambda: made.send([one], (rank + 1) % size, 0),
    ]
    for call in calls:
        work = call()
        work.wait()
        assert type(work) is not type(made.barrier()), work
    total = torch.ones(3)
    made.allreduce([total]).wait()
    assert total.tolist() == [size] * 3  # the CPU's are ours
    alone = dist.group.WORLD._get_backend(CPU)
    try:
        alone.allreduce([one])
    except ValueError as error:
        assert "a tensor is on meta" in str(error)
    else:
        raise AssertionError("a meta tensor was accepted without an inner group")
    made.shutdown()
    dist.destroy_process_group()
