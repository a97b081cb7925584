# SPDX-License-Identifier: Apache-2.0
"""Layers of experts on random tokens: drawn, run on the ranks, and checked there."""

from __future__ import annotations

from dataclasses import dataclass, field

import moe_reference as reference
import torch
import torch.distributed as dist
from hypothesis import strategies
from torch import Tensor

import torch_automoe as automoe

FLOATS = ("float64", "float32", "bfloat16", "float16")
PATTERNS = ("distinct", "repeated", "holes", "none", "one expert", "last expert")


@dataclass(frozen=True)
class Case:
    """One layer on all ranks; every rank draws all of it from the seed.

    Attributes:
        tokens: T of each rank.
        pattern: how ids are drawn, one of PATTERNS.
        weighted: with topk_weights.
    """

    tokens: tuple[int, ...]
    hidden: int = 5
    topk: int = 2
    num_experts: int = 6
    dtype: str = "float64"
    pattern: str = "distinct"
    weighted: bool = True
    align: int = 1
    wide_ids: bool = False
    seed: int = 0


@strategies.composite
def cases(draw, size: int) -> Case:
    """Cases for a number of ranks."""
    integers = strategies.integers
    num_experts = draw(integers(1, 3 * size))
    pattern = draw(strategies.sampled_from(PATTERNS))
    largest = num_experts if pattern == "distinct" else 6
    return Case(
        tokens=tuple(
            draw(strategies.lists(integers(0, 6), min_size=size, max_size=size))
        ),
        hidden=draw(strategies.sampled_from([1, 2, 3, 7, 16, 33])),
        topk=draw(integers(1, largest)),
        num_experts=num_experts,
        dtype=draw(strategies.sampled_from(FLOATS)),
        pattern=pattern,
        weighted=draw(strategies.booleans()),
        align=draw(strategies.sampled_from([1, 1, 4])),
        wide_ids=draw(strategies.booleans()),
        seed=draw(integers(0, 1 << 16)),
    )


def edge_cases(size: int) -> list[Case]:
    """Cases that must not be left to chance."""
    even, uneven = (3,) * size, tuple(rank % 3 for rank in range(size))
    late = (0,) * (size - 1) + (4,)
    return [
        Case(even, topk=1),
        Case(even, topk=7, num_experts=7),
        Case(uneven, topk=5, num_experts=5, pattern="repeated"),
        Case(even, topk=3, num_experts=1, pattern="repeated"),
        Case(uneven, pattern="holes", hidden=1),
        Case(even, pattern="none"),
        Case(even, pattern="one expert", num_experts=size + 1),
        Case(even, pattern="last expert", num_experts=2 * size + 1, hidden=33),
        Case(late, num_experts=3, dtype="float32"),
        Case((0,) * size, weighted=False),
        Case(even, num_experts=max(2, size - 1), dtype="bfloat16", align=4),
        Case(even, weighted=False, dtype="float16", hidden=3),
        Case((40,) * size, topk=4, num_experts=16, hidden=1500, dtype="bfloat16"),
    ]


def small_case(**changes: object) -> Case:
    """A case for the ranks that there are, as small as can be."""
    size = dist.get_world_size()
    options = {"tokens": (4,) * size, "topk": 2, "num_experts": 5, "hidden": 6}
    return Case(**{**options, "pattern": "holes", "seed": 3, **changes})


@dataclass
class Inputs:
    """Inputs of all ranks; lists by rank."""

    ids: list[Tensor] = field(default_factory=list)
    x: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    grad_out: list[Tensor] = field(default_factory=list)


def _draw_ids(case: Case, tokens: int, generator: torch.Generator) -> Tensor:
    shape = (tokens, case.topk)
    last = case.num_experts - 1
    if case.pattern == "distinct":
        noise = torch.rand((tokens, case.num_experts), generator=generator)
        ids = noise.argsort(dim=1)[:, : case.topk]
    elif case.pattern in ("repeated", "holes"):
        low = -1 if case.pattern == "holes" else 0
        ids = torch.randint(low, last + 1, shape, generator=generator)
    else:
        value = {"none": -1, "one expert": 0, "last expert": last}[case.pattern]
        ids = torch.full(shape, value)
    return ids.to(torch.int64 if case.wide_ids else torch.int32)


def draw_inputs(case: Case) -> Inputs:
    """Draw the inputs of all ranks."""
    dtype = getattr(torch, case.dtype)
    found = Inputs()
    for rank, tokens in enumerate(case.tokens):
        generator = torch.Generator().manual_seed(case.seed * 64 + rank)

        def normal(columns: int, generator=generator, tokens=tokens) -> Tensor:
            shape = (tokens, columns)
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        found.ids.append(_draw_ids(case, tokens, generator))
        found.x.append(normal(case.hidden).to(dtype))
        found.grad_out.append(normal(case.hidden).to(dtype))
        weights = normal(case.topk).to(reference.wide_type(dtype))
        found.weights.append(weights)
    return found


class LocalExperts:
    """The experts of this rank; their parameters (2, E, H) are those of all ranks."""

    def __init__(self, case: Case, group: dist.ProcessGroup | None = None) -> None:
        dtype = getattr(torch, case.dtype)
        made = reference.make_experts(case.num_experts, case.hidden, dtype)
        self.parameters = made.requires_grad_()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.local = reference.local_experts(case.num_experts, rank, size)
        self.num_experts = case.num_experts
        self.calls = 0

    def __call__(self, rows: Tensor, offsets: Tensor) -> Tensor:
        self.calls += 1
        if not self.local:
            return rows
        index = reference.expert_of_row(offsets, rows.shape[0]) + self.local.start
        return reference.apply_experts(rows, index, self.parameters)


@dataclass
class Result:
    """What a rank got."""

    out: Tensor
    grad_x: Tensor
    grad_weights: Tensor | None
    grad_parameters: Tensor

    def assert_same_bits(self, other: Result, what: object = "") -> None:
        for name in ("out", "grad_x", "grad_weights"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                assert torch.equal(mine, theirs), f"{name} differs: {what}"


def pair(x: Tensor, weights: Tensor, ids: Tensor, experts: LocalExperts) -> Tensor:
    """plan, dispatch, experts, combine."""
    plan = automoe.plan(ids, num_experts=experts.num_experts)
    recv, recv_weights = automoe.dispatch(x, weights, plan)
    return automoe.combine(experts(recv, plan.offsets), plan, recv_weights)


def run_pair(
    case: Case,
    inputs: Inputs | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    **options: object,
) -> tuple[automoe.Plan, Result]:
    """plan, dispatch, experts, combine and the backward of this rank."""
    inputs = inputs or draw_inputs(case)
    rank = dist.get_rank(group)
    options.setdefault("align", case.align)
    plan = automoe.plan(
        inputs.ids[rank], num_experts=case.num_experts, group=group, **options
    )
    x, weights = leaves(case, inputs, rank)
    experts = LocalExperts(case, group)
    recv = automoe.dispatch(x, weights, plan, async_op=async_op)
    recv_x, recv_weights = recv.wait() if async_op else recv
    rows = experts(recv_x, plan.offsets)
    out = automoe.combine(rows, plan, weights=recv_weights, async_op=async_op)
    out = out.wait() if async_op else out
    return plan, backward(out, x, weights, experts, inputs.grad_out[rank])


def run_moe(
    case: Case,
    num_chunks: int | str,
    inputs: Inputs | None = None,
    group: dist.ProcessGroup | None = None,
) -> Result:
    """automoe.moe and its backward of this rank."""
    inputs = inputs or draw_inputs(case)
    rank = dist.get_rank(group)
    x, weights = leaves(case, inputs, rank)
    experts = LocalExperts(case, group)
    out = automoe.moe(
        x,
        inputs.ids[rank],
        weights,
        experts,
        group,
        num_chunks=num_chunks,
        align=case.align,
    )
    if num_chunks != "auto":
        assert experts.calls == num_chunks
    return backward(out, x, weights, experts, inputs.grad_out[rank])


def leaves(case: Case, inputs: Inputs, rank: int) -> tuple[Tensor, Tensor | None]:
    """x and topk_weights of a rank as leaves of a graph."""
    x = inputs.x[rank].clone().requires_grad_()
    weights = inputs.weights[rank].clone().requires_grad_() if case.weighted else None
    return x, weights


def backward(
    out: Tensor,
    x: Tensor,
    weights: Tensor | None,
    experts: LocalExperts,
    grad_out: Tensor,
) -> Result:
    """Run the backward; collect what came out of both directions."""
    # A scalar: torch imports sympy (seconds) to check the shape of a given gradient.
    (out * grad_out).sum().backward()
    parameters = experts.parameters
    grad = parameters.grad
    return Result(
        out.detach(),
        x.grad,
        None if weights is None else weights.grad,
        torch.zeros_like(parameters) if grad is None else grad,
    )


# ---- checks ----


def check_pair(case: Case, group: dist.ProcessGroup | None = None) -> Result:
    """dispatch and combine of a case against the reference."""
    inputs = draw_inputs(case)
    rank = dist.get_rank(group)
    plan, result = run_pair(case, inputs, group)
    check_plan(case, inputs, plan)
    check_received(case, inputs, plan)
    check_result(case, inputs, plan.reduction_map, result, rank)
    return result


def check_plan(case: Case, inputs: Inputs, plan: automoe.Plan) -> None:
    """Counts, offsets and figures of a plan."""
    rank = dist.get_rank(plan.group)
    expected = reference.receive(inputs.ids, case.num_experts, rank, plan.align)
    assert plan.num_tokens_per_expert.tolist() == expected.counts
    assert plan.offsets.tolist() == expected.offsets
    assert plan.num_recv_tokens == len(expected.picks)
    assert plan.num_tokens == case.tokens[rank] and plan.topk == case.topk
    assert plan.facts.total_tokens == sum(case.tokens)
    assert plan.num_dropped == 0


def check_received(case: Case, inputs: Inputs, plan: automoe.Plan) -> None:
    """Received rows and weights, bit by bit."""
    rank = dist.get_rank(plan.group)
    picks = reference.receive(inputs.ids, case.num_experts, rank, plan.align).picks
    weights = inputs.weights[rank] if case.weighted else None
    recv, recv_weights = automoe.dispatch(inputs.x[rank], weights, plan)
    assert torch.equal(recv, reference.gather(inputs.x, picks))
    if case.weighted:
        expected = reference.gather_weights(inputs.weights, picks)
        assert torch.equal(recv_weights, expected)
    else:
        assert recv_weights is None


def check_result(
    case: Case, inputs: Inputs, reduction_map: list[int], result: Result, rank: int
) -> None:
    """Output and gradients against the reference; bits, where the order is fixed."""
    routing = reference.Routing(inputs.ids[rank], case.num_experts, reduction_map)
    dtype = getattr(torch, case.dtype)
    parameters = reference.make_experts(case.num_experts, case.hidden, dtype)
    weights = inputs.weights if case.weighted else None
    expected = reference.run_layer(
        inputs.x[rank],
        None if weights is None else weights[rank],
        inputs.grad_out[rank],
        parameters,
        routing,
    )
    assert torch.equal(result.out, expected.out), "out"
    assert torch.equal(result.grad_x, expected.grad_x), "grad_x"
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    if case.weighted:
        _assert_close(result.grad_weights, expected.grad_weights, tolerance)
    if dtype == torch.float64:
        dense = reference.run_dense(
            inputs.x, inputs.ids, weights, inputs.grad_out, parameters
        )
        local = reference.local_experts(case.num_experts, rank, len(case.tokens))
        mine = slice(local.start, local.stop)
        _assert_close(result.grad_parameters[:, mine], dense[:, mine], 1e-12)


def _assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within a tolerance of the largest value."""
    assert found.shape == expected.shape
    if found.numel():
        scale = max(1.0, expected.abs().max().item())
        error = (found - expected).abs().max().item()
        assert error <= tolerance * scale, (error, scale)
