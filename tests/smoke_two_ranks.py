# SPDX-License-Identifier: Apache-2.0
"""One all-to-all between two ranks, without importing the package, then the rest of it.

A torchrun script:

torchrun --nproc-per-node 2 tests/smoke_two_ranks.py
"""

import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


def main() -> None:
    """Exchange rows of uneven sizes; every rank checks what it received."""
    dist.init_process_group("automoe")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Rank r sends r + d + 1 rows to rank d, each filled with 10 * r + d.
    input_split_sizes = [rank + peer + 1 for peer in range(world_size)]
    rows = [
        torch.full((count, 3), 10 * rank + peer)
        for peer, count in enumerate(input_split_sizes)
    ]
    received = torch.empty(sum(input_split_sizes), 3, dtype=torch.int64)
    # The sizes are symmetric: what goes to a peer is as long as what comes from it.
    dist.all_to_all_single(
        received, torch.cat(rows), input_split_sizes, input_split_sizes
    )
    expected = torch.cat(
        [
            torch.full((count, 3), 10 * peer + rank)
            for peer, count in enumerate(input_split_sizes)
        ]
    )
    if not torch.equal(received, expected):
        raise AssertionError(f"rank {rank} received {received}, expected {expected}")
    use_collectives(rank, world_size)
    use_operators(rank, world_size)
    for one_unit in (False, True):
        parallelize_layer(one_unit)
    dist.destroy_process_group()
    print(
        f"rank {rank} of {world_size}: all_to_all_single is right, and so are plan, "
        "dispatch, combine and their gradients, and a layer of parallel experts",
        flush=True,
    )


def use_collectives(rank: int, world_size: int) -> None:
    """Call by the names of this torch, split the group, copy its options."""
    gathered = torch.empty(4 * world_size)
    dist.all_gather_single(gathered, torch.full((4,), float(rank)))
    assert gathered[-1] == world_size - 1
    scattered = torch.empty(4)
    dist.reduce_scatter_single(scattered, torch.ones(4 * world_size))
    assert (scattered == world_size).all()
    backend = dist.group.WORLD._get_backend(gathered.device)
    assert copy.deepcopy(backend.options).node == backend.options.node
    part = dist.group.WORLD.split_group(list(range(world_size)), group_name="part")
    total = torch.ones(2)
    part.allreduce([total]).wait()
    dist.all_reduce(total, dist._make_nccl_premul_sum(3.0))
    assert (total == 3 * world_size**2).all()
    objects = [None] * world_size
    dist.all_gather_object(objects, rank)
    assert objects == list(range(world_size))
    if rank == 0:
        dist.send(torch.ones(3), 1, tag=2)
    elif rank == 1:
        assert dist.recv(torch.zeros(3), tag=2) == 0


def use_operators(rank: int, world_size: int) -> None:
    """Send each token to every expert and back; experts multiply by their number."""
    import torch_automoe as automoe

    x = torch.full((3, 4), rank + 1.0, requires_grad=True)
    topk_ids = torch.arange(world_size).expand(3, -1)
    plan = automoe.plan(topk_ids, num_experts=world_size)
    recv_x, recv_weights = automoe.dispatch(x, torch.ones(3, world_size), plan)
    out = automoe.combine(recv_x * (rank + 1), plan, weights=recv_weights)
    out.sum().backward()
    factor = world_size * (world_size + 1) / 2
    for name, got, expected in [
        ("combine", out, (rank + 1) * factor),
        ("gradient", x.grad, factor),
    ]:
        if not torch.equal(got, torch.full((3, 4), expected)):
            raise AssertionError(f"rank {rank}: {name} is {got}, expected {expected}")


def parallelize_layer(one_unit: bool) -> None:
    """Compare a layer whose experts lie on all ranks with the same on one."""
    import torch_automoe as automoe

    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    layer = automoe.MoE(8, automoe.Experts(4, 8, 16), num_experts=4, top_k=2)
    alone = copy.deepcopy(layer)
    inputs = torch.randn(world_size, 2, 3, 8)
    outputs = [alone(x) for x in inputs]
    (torch.stack(outputs).square().sum() / world_size).backward()

    mesh = automoe.init_moe_mesh("cpu", ep=world_size)
    automoe.parallelize(layer, mesh, fully_shard_experts=not one_unit)
    place = automoe.shard_placement_fn(mesh) if one_unit else None
    fully_shard(layer, mesh=mesh.dense, shard_placement_fn=place)
    automoe.set_gradient_divide_factors(layer, mesh)
    out = layer(inputs[rank])
    out.square().sum().backward()
    torch.testing.assert_close(out, outputs[rank])
    expected = dict(alone.named_parameters())
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name].grad)


if __name__ == "__main__":
    main()
