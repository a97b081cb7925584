# SPDX-License-Identifier: Apache-2.0
"""automoe.clip_grad_norm_ against torch's own on whole gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from parallel_cases import moe_mesh, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Partial, Placement

import torch_automoe as automoe

MAX_NORM_OF_STAGES = 1.0
NORMS = [1.0, 2.0, 3.0, math.inf]


def with_grad(
    shape: tuple[int, ...],
    seed: int,
    mesh: DeviceMesh | None = None,
    placements: tuple[Placement, ...] = (),
    dtype: torch.dtype = torch.float64,
) -> nn.Parameter:
    """A parameter whose gradient is the same numbers, however they are placed."""
    drawn = torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)
    if mesh is not None:
        drawn = distribute_tensor(drawn, mesh, list(placements))
    parameter = nn.Parameter(torch.zeros_like(drawn))
    parameter.grad = drawn
    return parameter


def draw_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """On the meshes of a model with experts; some ranks have nothing of some."""
    mesh, hsdp = moe_mesh(ep=2), moe_mesh(ep=2, dp_replicate=2)
    whole_ep = moe_mesh(ep=4)
    experts = DeviceMesh._concatenate([mesh.sparse, mesh.ep])
    replicated = DeviceMesh._concatenate([hsdp.sparse, hsdp.ep])
    tp = moe_mesh(ep=2, tp=2)
    both = DeviceMesh._concatenate([tp.dense, tp.tp])
    placed: list[tuple[tuple[int, ...], DeviceMesh | None, tuple[Placement, ...]]] = [
        ((5, 3), None, ()),
        ((), None, ()),
        ((7, 4), mesh.dense, (Shard(0),)),
        ((2,), mesh.dense, (Shard(0),)),
        ((4, 3), mesh.dense, (Replicate(),)),
        ((5, 4, 3), experts, (Shard(1), Shard(0))),
        ((1, 4, 3), experts, (Shard(1), Shard(0))),
        ((3, 4), whole_ep.ep, (Shard(0),)),
        ((4, 4), hsdp.dense, (Replicate(), Shard(0))),
        ((4, 4, 3), replicated, (Replicate(), Shard(1), Shard(0))),
        ((4, 6), both, (Shard(0), Shard(1))),
        ((6,), both, (Shard(0), Replicate())),
    ]
    parameters = [
        with_grad(shape, seed, *place, dtype=dtype)
        for seed, (shape, *place) in enumerate(placed)
    ]
    return [*parameters, nn.Parameter(torch.zeros(3))]  # one without a gradient


def compare(
    norm_type: float, max_norm: float, dtype: torch.dtype, **options: Any
) -> float:
    """Norm and gradients of both; returns the norm."""
    parameters = draw_parameters(dtype)
    grads = [p.grad for p in parameters if p.grad is not None]
    # In float64, so that the reference rounds nothing.
    plain = [nn.Parameter(whole(grad).double()) for grad in grads]
    for parameter in plain:
        parameter.grad = parameter.detach().clone()
    expected = nn.utils.clip_grad_norm_(plain, max_norm, norm_type)
    kinds = [(type(grad), grad.dtype) for grad in grads]
    found = automoe.clip_grad_norm_(parameters, max_norm, norm_type, **options)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    assert found.dtype == torch.float64 and not isinstance(found, DTensor)
    grads = [p.grad for p in parameters if p.grad is not None]
    assert [(type(grad), grad.dtype) for grad in grads] == kinds
    scale = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    for grad, parameter in zip(grads, plain, strict=True):
        torch.testing.assert_close(
            whole(grad).double(), parameter.grad, rtol=scale, atol=0
        )
    return float(found)


def compare_all() -> dict[tuple, float]:
    """Every p, clipping and not, each implementation, each type."""
    found = {}
    for norm_type in NORMS:
        for max_norm in (0.1, 1e6, math.inf):
            for foreach in (None, True, False):
                key = (norm_type, max_norm, foreach)
                found[key] = compare(
                    norm_type, max_norm, torch.float64, foreach=foreach
                )
        for dtype in (torch.float32, torch.bfloat16):
            found[norm_type, dtype] = compare(norm_type, 0.1, dtype)
    return found


def nothing_to_scale() -> None:
    """max_norm inf leaves every bit; no gradients have the norm 0."""
    parameters = draw_parameters(torch.float64)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    automoe.clip_grad_norm_(parameters, math.inf)
    after = [p.grad for p in parameters if p.grad is not None]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(whole(old), whole(new))
    for norm_type in NORMS:
        empty = nn.Parameter(torch.zeros(3))
        assert automoe.clip_grad_norm_(empty, 1.0, norm_type) == 0
        assert automoe.clip_grad_norm_([], 1.0, norm_type) == 0


def some_ranks_without_gradients() -> float:
    """A rank may have no gradient at all, as one without a layer of its stage."""
    mesh = moe_mesh(ep=2, pp=2)
    generator = torch.Generator().manual_seed(7)
    stages = [torch.randn(4, 2, generator=generator).double() for _ in range(2)]
    own = stages[mesh.pp.get_local_rank()]
    parameter = nn.Parameter(torch.zeros_like(own))
    parameter.grad = own.clone()
    expert = nn.Parameter(
        distribute_tensor(torch.zeros(1, 2).double(), mesh.ep, [Shard(0)])
    )
    expert.grad = distribute_tensor(torch.ones(1, 2).double(), mesh.ep, [Shard(0)])
    found = automoe.clip_grad_norm_([parameter, expert], MAX_NORM_OF_STAGES, mesh=mesh)
    expected = math.sqrt(sum(float(g.square().sum()) for g in stages) + 2 * 2)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    lonely = [expert] if mesh.ep.get_local_rank() == 0 else []
    norm = automoe.clip_grad_norm_(lonely, math.inf, mesh=mesh)
    assert float(norm) == pytest.approx(2 * min(1, MAX_NORM_OF_STAGES / expected))
    return float(found)


def nonfinite(value: float, norm_type: float) -> tuple[float, str]:
    """One element of an expert of the last rank is not finite."""
    mesh = moe_mesh(ep=4)
    local = torch.ones(1, 3, dtype=torch.float64)
    if dist.get_rank() == dist.get_world_size() - 1:
        local[0, 1] = value
    grad = DTensor.from_local(local, mesh.ep, [Shard(0)], run_check=False)
    parameter = nn.Parameter(torch.zeros_like(grad))
    parameter.grad = grad
    text = ""
    try:
        automoe.clip_grad_norm_(parameter, 1.0, norm_type, error_if_nonfinite=True)
    except RuntimeError as error:
        text = str(error)
    kept = parameter.grad.to_local()
    assert torch.equal(kept[kept == 1], local[local == 1])
    return float(automoe.clip_grad_norm_(parameter, 1.0, norm_type)), text


def partial_sum() -> str:
    """A gradient that is not summed yet."""
    grad = DTensor.from_local(torch.ones(2), moe_mesh(ep=4).ep, [Partial()])
    parameter = nn.Parameter(torch.zeros_like(grad.redistribute(placements=[Shard(0)])))
    with pytest.raises(ValueError, match="expected sums that are complete") as found:
        parameter.grad = grad
        automoe.clip_grad_norm_(parameter, 1.0)
    return str(found.value)


@pytest.mark.parametrize("rank_pool", [[4]], indirect=True)
class TestRanks:
    def test_equals_torch(self, rank_pool: RankPool) -> None:
        first, *others = rank_pool.run(compare_all, deadline=300.0)
        assert all(found == first for found in others)

    def test_nothing_to_scale(self, rank_pool: RankPool) -> None:
        rank_pool.run(nothing_to_scale)

    def test_stages(self, rank_pool: RankPool) -> None:
        assert len(set(rank_pool.run(some_ranks_without_gradients))) == 1

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("norm_type", NORMS)
    def test_nonfinite(self, rank_pool: RankPool, value, norm_type) -> None:
        for norm, text in rank_pool.run(nonfinite, value, norm_type):
            assert not math.isfinite(norm)
            assert f"norm of order {norm_type}" in text
            assert "error_if_nonfinite=False" in text

    def test_partial_sums_are_refused(self, rank_pool: RankPool) -> None:
        assert "Partial" in rank_pool.run(partial_sum)[0]


@pytest.mark.parametrize("norm_type", NORMS)
def test_without_ranks(norm_type: float) -> None:
    def draw() -> list[nn.Parameter]:
        return [with_grad((4, 3), 0), with_grad((3,), 1), nn.Parameter(torch.ones(2))]

    ours, theirs = draw(), draw()
    found = automoe.clip_grad_norm_(ours, 0.5, norm_type)
    expected = nn.utils.clip_grad_norm_(theirs, 0.5, norm_type)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads: list[list[Tensor]] = [[p.grad for p in ps[:2]] for ps in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


def test_module_and_tensor_as_argument() -> None:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    norm = automoe.clip_grad_norm_(model, math.inf)
    assert float(norm) == pytest.approx(math.sqrt(8))
    assert float(automoe.clip_grad_norm_(model.bias, math.inf)) == pytest.approx(
        math.sqrt(2)
    )
