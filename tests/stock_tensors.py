# SPDX-License-Identifier: Apache-2.0
"""Cases of stock_cases: DTensor, checkpoints, context parallelism. All run on ranks.

Sums are of small whole numbers, so they are exact and every case may ask for bits.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from stock_cases import Groups, check_close
from stock_training import Net, batch, make_net, sgd
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

SHARDS: list[Placement] = [Shard(0), Shard(1), Replicate()]
PARTIALS: list[Placement] = [Partial("sum"), Partial("avg"), Partial("max")]


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers as float32; the same on every rank for one seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float()


# ---- DTensor ----


def redistribute(groups: Groups, shape: tuple[int, ...], *sizes: int) -> object:
    """From every placement to every other one, on a mesh of any shape.

    Returns:
        local results by placements; where DTensor refuses, the error's type.
    """
    mesh = groups.mesh(*shape)
    results: dict[str, object] = {}
    kinds = SHARDS + PARTIALS if mesh.ndim == 1 else [*SHARDS, Partial("sum")]
    choices = list(itertools.product(kinds, repeat=mesh.ndim))
    for before, after in itertools.product(choices, choices):
        name = f"{before} -> {after}"
        try:
            source = _tensor_of(mesh, before, sizes)
            moved = source.redistribute(mesh, after)
            results[name] = moved.to_local()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            results[name] = type(error).__name__
    return results


def _tensor_of(mesh, placements, sizes: tuple[int, ...]) -> DTensor:
    """A DTensor whose partial values differ by rank."""
    if not any(it.is_partial() for it in placements):
        return distribute_tensor(whole_numbers(*sizes), mesh, placements)
    # A sum of different parts: shard what is sharded, add what tells ranks apart.
    whole = [Replicate() if it.is_partial() else it for it in placements]
    local = distribute_tensor(whole_numbers(*sizes), mesh, whole).to_local()
    salt = sum(
        (7 * index + 1) * mesh.get_local_rank(index)
        for index, it in enumerate(placements)
        if it.is_partial()
    )
    shape = torch.Size(sizes)
    stride = tuple(whole_numbers(*sizes).stride())
    return DTensor.from_local(
        local + 4 * salt, mesh, placements, run_check=False, shape=shape, stride=stride
    )


def distribute(groups: Groups) -> object:
    """distribute_tensor from a source rank: what other ranks passed is ignored."""
    results = {}
    for shape, source in (((4,), 2), ((2, 2), 0)):
        mesh = groups.mesh(*shape)
        for placements in itertools.product(SHARDS, repeat=mesh.ndim):
            mine = whole_numbers(6, 5, seed=dist.get_rank())
            made = distribute_tensor(mine, mesh, placements, src_data_rank=source)
            results[f"{shape} {placements}"] = (made.to_local(), made.full_tensor())
    return results


def operators(groups: Groups) -> object:
    """Operators of DTensor that communicate, and their gradients."""
    mesh = groups.mesh(4)
    a = distribute_tensor(whole_numbers(10, 7, seed=1), mesh, [Shard(0)])
    b = distribute_tensor(whole_numbers(7, 9, seed=2), mesh, [Shard(0)])
    a.requires_grad_()
    b.requires_grad_()
    product = a @ b
    product.full_tensor().square().sum().backward()
    assert a.grad is not None and b.grad is not None
    logits = distribute_tensor(whole_numbers(6, 11, seed=3), mesh, [Shard(1)])
    return {
        "product": product.to_local(),
        "gradients": (a.grad.full_tensor(), b.grad.full_tensor()),
        "max": logits.max().full_tensor(),
        "argmax": logits.argmax().full_tensor(),
        "sum": logits.sum(0).full_tensor(),
        "mean": logits.mean(1).full_tensor(),
        "norm": logits.redistribute(mesh, [Shard(0)]).abs().sum().full_tensor(),
    }


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 20)
        self.down = nn.Linear(20, 8)
        self.head = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(F.relu(self.up(self.norm(x))))
        return self.head(x)


def tensor_parallel(groups: Groups) -> object:
    """Tensor and sequence parallel layers with a loss over a sharded vocabulary."""
    mesh = groups.mesh(4)
    torch.manual_seed(1)
    model = _Block().double()
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    parallelize_module(model, mesh, plan)
    optimizer = sgd(model.parameters())
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(step)
        x = torch.randn(8, 8, dtype=torch.float64)
        target = torch.randint(0, 12, (8,))
        mine = x.chunk(4)[mesh.get_local_rank()]
        with loss_parallel():
            loss = F.cross_entropy(model(mine), target)
            loss.backward()
        optimizer.step()
        losses.append(loss.full_tensor().detach())
    state = {name: it.full_tensor() for name, it in model.named_parameters()}
    return losses, {name: it.detach() for name, it in state.items()}


# ---- checkpoints ----


def _sharded(groups: Groups, shape: tuple[int, ...]) -> tuple[Net, object]:
    model = make_net().eval()  # BatchNorm's statistics would differ by rank
    for layer in (model.first, model.left, model.right):
        fully_shard(layer, mesh=groups.mesh(*shape))
    fully_shard(model, mesh=groups.mesh(*shape))
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def _step(model: Net, optimizer, number: int) -> None:
    optimizer.zero_grad()
    model(batch(dist.get_rank(), number)).square().mean().backward()
    optimizer.step()


def _state(model: Net, optimizer) -> dict[str, dict]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def _whole(model: Net, optimizer) -> dict[str, dict]:
    return _copy_whole(_state(model, optimizer))


def _copy_whole(value):
    if isinstance(value, dict):
        return {key: _copy_whole(it) for key, it in value.items()}
    if isinstance(value, list):
        return [_copy_whole(it) for it in value]
    if isinstance(value, DTensor):
        return value.full_tensor().clone()
    return value.clone() if isinstance(value, Tensor) else value


def checkpoint(groups: Groups, folder: str, *, background: bool) -> object:
    """Save a training state and load it into a model that is sharded otherwise.

    Args:
        background: by async_save, while training goes on with other groups.

    Returns:
        the loaded state, which is the saved one.
    """
    path = Path(folder, f"{groups.backend}-{background}")
    model, optimizer = _sharded(groups, (4,))
    _step(model, optimizer, 0)
    saved = _whole(model, optimizer)
    state = _state(model, optimizer)
    save = dcp.async_save if background else dcp.save
    saving = save(state, checkpoint_id=path, process_group=groups.world)
    for number in range(1, 4):
        _step(model, optimizer, number)
    if background:
        saving.result()
    other, its_optimizer = _sharded(groups, (2, 2))
    _step(other, its_optimizer, 9)
    state = _state(other, its_optimizer)
    dcp.load(state, checkpoint_id=path, process_group=groups.world)
    set_state_dict(
        other,
        its_optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    loaded = _whole(other, its_optimizer)
    check_close(loaded, saved, 0.0)
    return loaded


# ---- context parallelism ----


def ring_attention(groups: Groups, method: str, *, causal: bool) -> object:
    """The ring of context parallelism, forward and backward, with CPU attention.

    ``context_parallel()`` itself dispatches CUDA's attention operators only, so the
    CPU's are put into the same ring.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import (
        _HeadTailLoadBalancer,
    )

    options, aten = _attention._cp_options, torch.ops.aten
    before = options.rotate_method, options.enable_load_balance
    _attention.set_rotate_method(method)
    options.enable_load_balance = causal
    mesh = groups.mesh(4)
    balancer = _HeadTailLoadBalancer(32, 4, torch.device("cpu")) if causal else None
    torch.manual_seed(2)
    whole = [torch.randn(2, 3, 32, 8) for _ in range(4)]
    try:
        parts = _attention._context_parallel_shard(mesh, whole, [2] * 4, balancer)
        query, key, value, gradient = (it.contiguous() for it in parts)
        out, logsumexp = _attention._templated_ring_attention(
            groups.world,
            2,
            aten._scaled_dot_product_flash_attention_for_cpu,
            query,
            key,
            value,
            is_causal=causal,
        )
        gradients = _attention._templated_ring_attention_backward(
            groups.world,
            2,
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            gradient,
            "grad_out",
            query,
            key,
            value,
            out,
            logsumexp,
            causal,
            dropout_p=0.0,
        )
        results = _attention.context_parallel_unshard(
            mesh, [out, *gradients], [2] * 4, balancer
        )
    finally:
        options.rotate_method, options.enable_load_balance = before
    _check_attention(whole, results, causal)
    return results


def _check_attention(whole, results, causal: bool) -> None:
    *inputs, gradient = whole
    for it in inputs:
        it.requires_grad_()
    out = F.scaled_dot_product_attention(*inputs, is_causal=causal)
    expected = [out, *torch.autograd.grad(out, inputs, gradient)]
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-4)
