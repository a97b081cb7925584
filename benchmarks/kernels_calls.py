# SPDX-License-Identifier: Apache-2.0
"""What kernels_bench.py times on one rank: our operators, torch's, Triton's, a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

import torch_automoe as automoe
from torch_automoe import ops  # noqa: F401  (loads the operators)

_ops = torch.ops.automoe
COPY = "copy"


@dataclass
class Kernel:
    """One job, and who does it.

    Attributes:
        bytes: of rows that are read and written, indices and weights not counted; of
            a plan, those of the ids and the lists.
        expected: the right result; None: rows that move, compared with torch's.
        exact: results must have the bits of ``expected``; else 1/16 of the largest
            value is allowed, for sums that are rounded at every step.
    """

    name: str
    bytes: int
    expected: Tensor
    exact: bool
    calls: dict[str, Callable[[], Tensor]] = field(default_factory=dict)


@dataclass
class Layer:
    """Tokens, their picks and their rows as the experts get them, on one device."""

    x: Tensor
    ids: Tensor
    weights: Tensor  # (T, K) float32
    plan: automoe.Plan
    rows: Tensor  # (R, H), by expert
    how: automoe.Permutation
    of_rows: Tensor  # (R,) float32

    @property
    def tokens_of_rows(self) -> Tensor:
        return self.how.index.div(self.how.topk, rounding_mode="floor").long()

    @property
    def rows_of_picks(self) -> Tensor:
        """(T, K): where the row of each pick is."""
        return self.how.index.argsort().view(self.ids.shape).to(torch.int32)


def draw_layer(
    tokens: int, topk: int, num_experts: int, hidden: int, device: torch.device
) -> Layer:
    """Draw a layer of bf16 rows; every token picks ``topk`` different experts."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand((tokens, num_experts), generator=generator)
    ids = noise.argsort(dim=1)[:, :topk].to(device)
    x = torch.randn((tokens, hidden), generator=generator).bfloat16().to(device)
    weights = torch.rand((tokens, topk), generator=generator).to(device)
    plan = automoe.plan(ids, num_experts=num_experts)
    rows, how = automoe.permute(x, ids, num_experts=num_experts)
    of_rows = weights.flatten()[how.index]
    return Layer(x, ids, weights, plan, rows, how, of_rows)


def _sort_and_gather(layer: Layer) -> Tensor:
    order = layer.ids.flatten().argsort(stable=True)
    return layer.x.index_select(0, order // layer.how.topk)


def gather_kernel(layer: Layer, triton: ModuleType | None) -> Kernel:
    """Rows of tokens to rows of experts."""
    tokens = layer.tokens_of_rows
    narrow = tokens.to(torch.int32)
    plan, num_experts = layer.plan, layer.plan.num_experts
    expected = layer.x.index_select(0, tokens)
    kernel = Kernel("gather", 2 * expected.nbytes, expected, exact=True)
    kernel.calls = {
        "automoe dispatch": lambda: automoe.dispatch(layer.x, None, plan)[0],
        "automoe permute": lambda: automoe.permute(
            layer.x, layer.ids, num_experts=num_experts
        )[0],
        "torch index_select": lambda: layer.x.index_select(0, tokens),
        "torch sort": lambda: _sort_and_gather(layer),
    }
    if triton is not None:
        kernel.calls["triton"] = lambda: triton.gather(layer.x, narrow)
    return kernel


def plan_kernel(layer: Layer) -> Kernel:
    """Picks to lists: counts of experts, positions of rows."""
    plan, num_experts, ids = layer.plan, layer.plan.num_experts, layer.ids
    capacity = plan.num_recv_tokens

    def with_torch() -> Tensor:
        picks = ids.flatten()
        picks.argsort(stable=True)
        counts = picks.bincount(minlength=num_experts)
        counts.cumsum(0)
        return counts.to(torch.int32)

    lists = (plan.receive_index, plan.num_tokens_per_expert, plan.offsets)
    moved = ids.nbytes + sum(tensor.nbytes for tensor in lists)
    kernel = Kernel("plan", moved, with_torch(), exact=True)
    kernel.calls = {
        "automoe plan": lambda: (
            automoe.plan(ids, num_experts=num_experts).num_tokens_per_expert
        ),
        "automoe plan, bounded": lambda: (
            automoe.plan(
                ids, num_experts=num_experts, max_recv_tokens=capacity
            ).num_tokens_per_expert
        ),
        "torch sort, bincount": with_torch,
    }
    return kernel


def pack_kernel(layer: Layer) -> Kernel:
    """Rows of tokens to rows that are sent: on one rank, each token once."""
    everything = torch.arange(layer.x.shape[0], device=layer.x.device)
    kernel = Kernel("pack", 2 * layer.x.nbytes, layer.x, exact=True)
    kernel.calls = {
        "automoe pack_rows": lambda: _ops.pack_rows(layer.x, [layer.plan.route])[0],
        "torch index_select": lambda: layer.x.index_select(0, everything),
    }
    return kernel


def _index_add(layer: Layer, tokens: Tensor) -> Tensor:
    scaled = layer.rows * layer.of_rows.bfloat16().unsqueeze(1)
    return torch.zeros_like(layer.x).index_add_(0, tokens, scaled)


def _select_and_sum(layer: Layer, index: Tensor) -> Tensor:
    picked = layer.rows.index_select(0, index.flatten()).view(*index.shape, -1)
    return (picked.float() * layer.weights.unsqueeze(2)).sum(1).bfloat16()


def reduce_kernel(layer: Layer, triton: ModuleType | None) -> Kernel:
    """Rows of experts to weighted sums of tokens."""
    tokens, index = layer.tokens_of_rows, layer.rows_of_picks
    wide = index.long()
    expected = _select_and_sum(layer, wide)
    moved = layer.rows.nbytes + expected.nbytes
    kernel = Kernel("reduce", moved, expected, exact=False)
    kernel.calls = {
        "automoe unpermute": lambda: automoe.unpermute(
            layer.rows, layer.how, layer.of_rows
        ),
        "automoe combine": lambda: automoe.combine(
            layer.rows, layer.plan, layer.of_rows
        ),
        "torch index_add_": lambda: _index_add(layer, tokens),
        "torch select, sum": lambda: _select_and_sum(layer, wide),
    }
    if triton is not None:
        kernel.calls["triton"] = lambda: triton.reduce(layer.rows, layer.of_rows, index)
    return kernel


def partials_kernel(layer: Layer) -> Kernel:
    """Partial sums to sums: on one rank, one of each token."""
    route, count = layer.plan.route, layer.x.shape[0]
    kernel = Kernel("partials", 2 * layer.x.nbytes, layer.x, exact=True)
    kernel.calls = {
        "automoe reduce_partials": lambda: _ops.reduce_partials(
            [layer.x], [route], count
        ),
    }
    return kernel


def scale_kernel(layer: Layer) -> Kernel:
    """The gradients of rows, scaled, and their dot products with the rows."""
    grads, values, weights = layer.rows.flip(0).contiguous(), layer.rows, layer.of_rows

    def with_torch() -> Tensor:
        wide = grads.float()
        (wide * values).sum(1)
        return (wide * weights.unsqueeze(1)).bfloat16()

    moved = 3 * grads.nbytes
    kernel = Kernel("scale+dot", moved, with_torch(), exact=False)
    kernel.calls = {
        "automoe scale_and_dot": lambda: _ops.scale_and_dot(
            grads, values, weights, layer.how.index
        )[0],
        "torch": with_torch,
    }
    return kernel


def make_kernels(layer: Layer, triton: ModuleType | None) -> list[Kernel]:
    """All jobs on one layer; the first call of each is a copy of as many bytes."""
    kernels = [
        plan_kernel(layer),
        gather_kernel(layer, triton),
        pack_kernel(layer),
        reduce_kernel(layer, triton),
        partials_kernel(layer),
        scale_kernel(layer),
    ]
    for kernel in kernels:
        half = kernel.bytes // 2
        source = torch.ones(half, dtype=torch.uint8, device=layer.x.device)
        to = torch.empty_like(source)
        copy = {COPY: lambda to=to, source=source: to.copy_(source)}
        kernel.calls = {**copy, **kernel.calls}
    return kernels


def count_wrong(kernel: Kernel, result: Tensor) -> int:
    """Elements of a result that are not what they must be."""
    if kernel.exact:
        return int((result != kernel.expected).sum())
    allowed = float(kernel.expected.abs().max()) / 16
    off = (result.float() - kernel.expected.float()).abs()
    return int((~(off <= allowed)).sum())  # NaN too


def make_group() -> None:
    """A group of this process alone, for the operators that need one."""
    dist.init_process_group("automoe", store=dist.HashStore(), rank=0, world_size=1)
