# SPDX-License-Identifier: Apache-2.0
"""The operators under torch.compile and activation checkpointing."""

from __future__ import annotations

from functools import partial

import moe_cases
import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointError,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import torch_automoe as automoe

_GLOO = {"nodes": [2], "backend": "gloo", "timeout": 300.0}
_POOLS = [
    pytest.param({"nodes": [2, 1], "timeout": 300.0}, id="2+1"),
    pytest.param(_GLOO, id="gloo"),
]


# ---- torch.compile ----


def compile_layer(backend: str, num_chunks: int | None) -> None:
    """One graph for other sizes too, with the bits of eager mode."""
    torch._dynamo.reset()
    rank, size = dist.get_rank(), dist.get_world_size()

    def run(x: Tensor, weights: Tensor, ids: Tensor, experts, parameters) -> Tensor:
        if num_chunks is None:
            return moe_cases.pair(x, weights, ids, experts)
        return automoe.moe(x, ids, weights, experts, num_chunks=num_chunks)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for seed, tokens in enumerate([4, 4, 7]):
        case = moe_cases.small_case(seed=seed, tokens=(tokens,) * size)
        inputs = moe_cases.draw_inputs(case)
        results = []
        for fn in (run, compiled):
            x, weights = moe_cases.leaves(case, inputs, rank)
            experts = moe_cases.LocalExperts(case)
            out = fn(x, weights, inputs.ids[rank], experts, experts.parameters)
            results.append(
                moe_cases.backward(out, x, weights, experts, inputs.grad_out[rank])
            )
        eager, other = results
        torch.testing.assert_close(other.out, eager.out)
        torch.testing.assert_close(other.grad_x, eager.grad_x)
        torch.testing.assert_close(other.grad_weights, eager.grad_weights)
        torch.testing.assert_close(other.grad_parameters, eager.grad_parameters)


def compile_static_shapes(backend: str) -> None:
    """With max_recv_tokens nothing depends on data but the plan's own tensors."""
    torch._dynamo.reset()
    case, rank = moe_cases.small_case(), dist.get_rank()
    inputs = moe_cases.draw_inputs(case)

    def run(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        plan = automoe.plan(ids, num_experts=5, max_recv_tokens=30)
        recv, _ = automoe.dispatch(x, None, plan)
        return recv, automoe.combine(recv * 2, plan)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    expected = run(inputs.x[rank], inputs.ids[rank])
    found = compiled(inputs.x[rank], inputs.ids[rank])
    assert found[0].shape == (30, 6)
    torch.testing.assert_close(found, expected)


def compile_around_a_plan(backend: str) -> None:
    """A plan crosses the border of compiled code, either way; async forms block."""
    torch._dynamo.reset()
    case, rank = moe_cases.small_case(), dist.get_rank()
    inputs = moe_cases.draw_inputs(case)

    def make_plan(ids: Tensor) -> automoe.Plan:
        return automoe.plan(ids, num_experts=5)

    def run(x: Tensor, weights: Tensor, plan: automoe.Plan) -> Tensor:
        pending = automoe.dispatch(x, weights, plan, async_op=True)
        recv, recv_weights = pending.wait()
        return automoe.combine(recv * 2, plan, recv_weights, async_op=True).wait()

    plans = [make_plan(inputs.ids[rank])]
    compiled = torch.compile(make_plan, fullgraph=True, backend=backend)
    plans.append(compiled(inputs.ids[rank]))
    assert plans[0].fingerprint == plans[1].fingerprint
    x, weights = moe_cases.leaves(case, inputs, rank)
    outs = [
        fn(x, weights, plan)
        for fn in (run, torch.compile(run, fullgraph=True, backend=backend))
        for plan in plans
    ]
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


# ---- activation checkpointing ----


def checkpoint_layer(how: str) -> None:
    """Gradients with and without checkpointing are the same."""
    case, rank = moe_cases.small_case(dtype="float32"), dist.get_rank()
    inputs = moe_cases.draw_inputs(case)
    contexts = {
        "plain": {},
        "selective": {
            "context_fn": partial(
                create_selective_checkpoint_contexts, automoe.checkpoint_policy()
            )
        },
        "dispatch saved": {
            "context_fn": partial(
                create_selective_checkpoint_contexts,
                automoe.checkpoint_policy(save_dispatch=True),
            )
        },
    }[how]
    seen: list[str] = []
    for num_chunks in (None, 1, 3):
        results = []
        for options in (None, contexts):
            x, weights = moe_cases.leaves(case, inputs, rank)
            experts = moe_cases.LocalExperts(case)

            def run(x, weights, experts=experts, num_chunks=num_chunks) -> Tensor:
                ids = inputs.ids[rank]
                if num_chunks is None:
                    return moe_cases.pair(x, weights, ids, experts)
                return automoe.moe(x, ids, weights, experts, num_chunks=num_chunks)

            with _CountOperators(seen if options is not None else []):
                if options is None:
                    out = run(x, weights)
                else:
                    out = checkpoint(run, x, weights, use_reentrant=False, **options)
                results.append(
                    moe_cases.backward(out, x, weights, experts, inputs.grad_out[rank])
                )
        results[0].assert_same_bits(results[1], (how, num_chunks))
        torch.testing.assert_close(
            results[0].grad_parameters, results[1].grad_parameters
        )
    # Forward, and once more where the plan is not saved.
    assert seen.count("automoe::plan") == (6 if how == "plain" else 3)


class _CountOperators(torch.utils._python_dispatch.TorchDispatchMode):
    """Writes down the operators that really run."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def change_ids(same_counts: bool, policy: bool) -> tuple[str, str]:
    """Recompute with other ids; returns the error's type and text."""
    case, rank = moe_cases.small_case(pattern="distinct", topk=1), dist.get_rank()
    inputs = moe_cases.draw_inputs(case)
    x, weights = moe_cases.leaves(case, inputs, rank)
    experts = moe_cases.LocalExperts(case)
    ids = inputs.ids[rank]
    # The same rows in another order leave every count as it is.
    turns = [ids, ids.flip(0) if same_counts else (ids + 1) % 5]

    def run(x: Tensor, weights: Tensor) -> Tensor:
        return moe_cases.pair(x, weights, turns.pop(0), experts)

    options = {}
    if policy:
        policy_fn = automoe.checkpoint_policy()
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy_fn)
    out = checkpoint(run, x, weights, use_reentrant=False, **options)
    if policy:
        result = moe_cases.backward(out, x, weights, experts, inputs.grad_out[rank])
        _, expected = moe_cases.run_pair(case, inputs)
        expected.assert_same_bits(result)
        return "", ""
    try:
        out.sum().backward()
    except (ValueError, CheckpointError) as error:
        return type(error).__name__, str(error)
    return "", "no error"


# ---- tests ----


@pytest.mark.slow
@pytest.mark.parametrize("rank_pool", [[1]], indirect=True)
def test_inductor(rank_pool: RankPool) -> None:
    rank_pool.run(compile_layer, "inductor", None, deadline=600)


# What is traced does not depend on the backend.
@pytest.mark.parametrize("rank_pool", _POOLS[:1], indirect=True)
class TestCompile:
    @pytest.mark.parametrize("num_chunks", [None, "auto", 3])
    def test_layer(self, rank_pool: RankPool, num_chunks: int | str | None) -> None:
        rank_pool.run(
            compile_layer, "aot_eager_decomp_partition", num_chunks, deadline=300
        )

    def test_static_shapes(self, rank_pool: RankPool) -> None:
        rank_pool.run(compile_static_shapes, "aot_eager")

    def test_plan_crosses_the_border(self, rank_pool: RankPool) -> None:
        rank_pool.run(compile_around_a_plan, "aot_eager")


@pytest.mark.parametrize("rank_pool", _POOLS, indirect=True)
class TestCheckpoint:
    @pytest.mark.parametrize("how", ["plain", "selective", "dispatch saved"])
    def test_gradients_are_the_same(self, rank_pool: RankPool, how: str) -> None:
        rank_pool.run(checkpoint_layer, how)

    @pytest.mark.parametrize("same_counts", [True, False])
    def test_changed_ids_raise(self, rank_pool: RankPool, same_counts: bool) -> None:
        for kind, text in rank_pool.run(change_ids, same_counts, False):
            if same_counts:
                assert kind == "ValueError", text
                assert "topk_ids changed between forward and recompute" in text
            else:
                assert kind in ("ValueError", "CheckpointError"), text

    def test_saved_plan_outlives_changed_ids(self, rank_pool: RankPool) -> None:
        rank_pool.run(change_ids, True, True)
