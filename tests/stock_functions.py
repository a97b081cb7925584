# SPDX-License-Identifier: Apache-2.0
"""Cases of stock_cases: functional collectives, autograd's, compiled ones, groups.

Sums are of small whole numbers, so they are exact and every case may ask for bits.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.nn.functional as with_grad
from stock_cases import CPU, Groups
from stock_tensors import whole_numbers
from torch import Tensor


def _mine(*shape: int, salt: int = 0) -> Tensor:
    return whole_numbers(*shape, seed=10 * salt + dist.get_rank())


def _uneven(size: int) -> tuple[list[int], list[int]]:
    """Rows from each rank and to each rank, some of them none."""
    rank = dist.get_rank()
    return (
        [(source + 2 * rank) % 3 for source in range(size)],
        [(rank + 2 * peer) % 3 for peer in range(size)],
    )


# ---- functional collectives ----


def functional(groups: Groups) -> object:
    """Every functional collective, with a group, a mesh and a mesh dimension."""
    size = dist.get_world_size()
    mesh = groups.mesh(2, 2)
    results: dict[str, object] = {}
    for op in ("sum", "avg", "min", "max", "product"):
        results[op] = funcol.all_reduce(_mine(3, 5), op, groups.world)
    for op in ("band", "bor", "bxor"):
        results[op] = funcol.all_reduce(_mine(7).int(), op, groups.world)
    results["one mesh dimension"] = funcol.all_reduce(_mine(4), "sum", (mesh, 1))
    results["broadcast"] = funcol.broadcast(_mine(5), 2, groups.world)
    for dim in (0, 1):
        results[f"gather {dim}"] = funcol.all_gather_single(
            _mine(3, 2), dim, groups.world
        )
        for op in ("sum", "avg", "max"):
            results[f"scatter {op} {dim}"] = funcol.reduce_scatter_single(
                _mine(2 * size, 3 * size), op, dim, groups.world
            )
    lists = [_mine(4, 3), _mine(8, salt=1)]
    results["reduced"] = funcol.all_reduce_coalesced(lists, "sum", groups.world)
    results["gathered"] = funcol.all_gather_single_coalesced(lists, groups.world)
    results["scattered"] = funcol.reduce_scatter_single_coalesced(
        lists, "sum", [0, 0], groups.world
    )
    received, sent = _uneven(size)
    rows = _mine(sum(sent), 3)
    results["all_to_all"] = funcol.all_to_all_single(rows, received, sent, groups.world)
    results["equal"] = funcol.all_to_all_single(_mine(8), None, None, groups.world)
    results["permuted"] = funcol.permute_tensor(_mine(3), [1, 2, 3, 0], groups.world)
    return _waited(results)


def in_place_operators(groups: Groups) -> object:
    """The operators that compiled code uses in place, and those between two ranks."""
    ops, name = torch.ops._c10d_functional, groups.world.group_name
    rank, size = dist.get_rank(), dist.get_world_size()
    results: dict[str, object] = {
        "all_reduce": ops.all_reduce_(_mine(6), "sum", name),
        "coalesced": ops.all_reduce_coalesced_(
            [_mine(3), _mine(4, salt=1)], "max", name
        ),
        "broadcast": ops.broadcast_(_mine(5), 1, name),
        "gathered": ops.all_gather_into_tensor_out(
            _mine(3), size, name, out=torch.zeros(3 * size)
        ),
        "scattered": ops.reduce_scatter_tensor_out(
            _mine(3 * size), "sum", size, name, out=torch.zeros(3)
        ),
    }
    after, before = (rank + 1) % size, (rank - 1) % size
    received = torch.zeros(4)
    sending, receiving = ops.batch_p2p_ops(
        ["isend", "irecv"], [after, before], [0, 0], [_mine(4), received], name
    )
    ops.wait_tensor(sending)
    results["batch"] = receiving
    return _waited(results)


def _waited(results: dict[str, object]) -> object:
    """Plain tensors once the collectives are done."""
    return torch.utils._pytree.tree_map(
        lambda it: funcol.wait_tensor(it).clone() if isinstance(it, Tensor) else it,
        results,
    )


def _differentiated(x: Tensor, group, received: list[int], sent: list[int]):
    """Collectives in a row; each has a backward."""
    x = funcol.all_gather_single_autograd(x, 0, group)
    x = x * torch.arange(1.0, 1.0 + len(x))[:, None]
    x = funcol.reduce_scatter_single_autograd(x, "sum", 0, group)
    x = funcol.all_to_all_single_autograd(x[: sum(sent)], received, sent, group)
    return funcol.all_reduce(x.square().sum(), "sum", group)


def functional_gradients(groups: Groups) -> object:
    """Gradients through functional collectives, and by the older operators."""
    size = dist.get_world_size()
    received, sent = _uneven(size)
    x = _mine(8, 2).requires_grad_()
    result = _differentiated(x, groups.world, received, sent)
    result.backward()
    assert x.grad is not None
    older, name = torch.ops._c10d_functional_autograd, groups.world.group_name
    y = _mine(size * 2, 3, salt=1).requires_grad_()
    z = older.all_to_all_single(y, [2] * size, [2] * size, name)
    z = older.reduce_scatter_tensor(z * z, "sum", size, name)
    older.all_gather_into_tensor(z * 2.0, size, name).sum().backward()
    assert y.grad is not None
    return result.detach(), x.grad, y.grad


def autograd_collectives(groups: Groups) -> object:
    """torch.distributed.nn.functional: collectives that autograd goes through."""
    group, rank, size = groups.world, dist.get_rank(), dist.get_world_size()
    results = []
    for use in (
        lambda x: with_grad.broadcast(x, 1, group),
        lambda x: torch.stack(with_grad.gather(x, 2, group)),
        lambda x: with_grad.scatter([x * peer for peer in range(size)], 1, group),
        # Elsewhere than at its destination the result is anything.
        lambda x: with_grad.reduce(x, 0, group=group) * float(rank == 0),
        lambda x: with_grad.reduce_scatter(
            torch.zeros_like(x), [x + peer for peer in range(size)], group=group
        ),
        lambda x: torch.stack(with_grad.all_gather(x, group)),
        lambda x: torch.stack(
            with_grad.all_to_all(
                [torch.zeros_like(x) for _ in range(size)],
                [x * peer for peer in range(size)],
                group,
            )
        ),
        lambda x: with_grad.all_to_all_single(
            torch.zeros_like(x), x * 2.0, None, None, group
        ),
        lambda x: with_grad.all_reduce(x, group=group),
    ):
        x = _mine(size, 3).requires_grad_()
        y = use(x)
        (y * y * (rank + 1.0)).sum().backward()
        results.append((y.detach(), x.grad))
    return results


# ---- compiled ----


def compiled(groups: Groups) -> object:
    """Functional and plain collectives in whole graphs, forward and backward."""
    torch._dynamo.reset()
    group, size = groups.world, dist.get_world_size()
    received, sent = _uneven(size)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def functions(x: Tensor) -> Tensor:
        return _differentiated(x, group, received, sent)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def in_place(x: Tensor) -> tuple[Tensor, ...]:
        total = x * 2.0
        dist.all_reduce(total, group=group)
        gathered = x.new_empty(size * len(x))
        dist.all_gather_into_tensor(gathered, x + 1.0, group=group)
        scattered = x.new_empty(len(x))
        dist.reduce_scatter_tensor(scattered, gathered, group=group)
        swapped = torch.empty_like(x)
        dist.all_to_all_single(swapped, x, group=group)
        return total, gathered, scattered, swapped

    x = _mine(8, 2).requires_grad_()
    result = functions(x)
    result.backward()
    assert x.grad is not None
    return result.detach(), x.grad, in_place(_mine(2 * size, salt=1))


# ---- groups ----


def make_groups(groups: Groups) -> object:
    """Every way to make a group out of others; each sums over its ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    backend = groups.backend
    pairs, _ = dist.new_subgroups(2, backend=backend)
    uneven, _ = dist.new_subgroups_by_enumeration([[0, 2, 3], [1]], backend=backend)
    alone = dist.new_group([rank], backend=backend, use_local_synchronization=True)
    mine = [rank % 2, rank % 2 + 2]
    local = dist.new_group(mine, backend=backend, use_local_synchronization=True)
    mesh = groups.mesh(2, 2)
    flat = mesh._flatten(f"{backend}_flat", backend_override=backend)
    made = [pairs, uneven, alone, local, *mesh.get_all_groups(), flat.get_group()]
    results = []
    for group in made:
        assert dist.get_backend(group) == backend
        total = _mine(3)
        dist.all_reduce(total, group=group)
        results.append((dist.get_process_group_ranks(group), total))
    for group in (pairs, uneven, alone, local):
        dist.destroy_process_group(group)
    assert size == 4
    return results


def split_directly(groups: Groups) -> object:
    """``ProcessGroup.split_group``: dist.split_group asks for an accelerator.

    Gloo has a plain group of the same ranks for it, which is the reference.
    """
    rank = dist.get_rank()
    halves = [[0, 2], [1, 3]]
    ranks = halves[rank % 2]
    if groups.backend == "gloo":
        child, _ = dist.new_subgroups_by_enumeration(halves, backend="gloo")
    else:
        child = groups.world.split_group(
            ranks,
            timeout=timedelta(seconds=60),
            group_name=f"{groups.backend} {ranks}",  # the store's prefix
            group_desc="a split",
        )
    assert child._get_backend(CPU).name() == groups.backend
    assert child.size() == 2 and child.rank() == ranks.index(rank)
    total = _mine(3)
    child.allreduce(total).wait()
    received = torch.zeros(2)
    child.alltoall_base(received, torch.full((2,), float(rank)), [], []).wait()
    if groups.backend == "gloo":
        dist.destroy_process_group(child)
    else:
        child.shutdown()
    return total, received


split_directly.counted = False  # c10d does not know that group
