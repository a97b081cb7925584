# SPDX-License-Identifier: Apache-2.0
"""automoe.moe: any number of chunks gives what dispatch and combine give."""

from __future__ import annotations

import moe_cases
import moe_reference as reference
import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import data
from moe_cases import Case

import torch_automoe as automoe

_SHAPES = {
    "1x1": [1],
    "1x3": [3],
    "2x2": [2, 2],
    "4x2": [2, 2, 2, 2],
    "3+3+2": [3, 3, 2],
    "gloo": {"nodes": [3], "backend": "gloo"},
}


def _on(*names: str) -> pytest.MarkDecorator:
    shapes = [pytest.param(_SHAPES[name], id=name) for name in names]
    return pytest.mark.parametrize("rank_pool", shapes, indirect=True)


# ---- what runs on the ranks ----


def compare_chunks(case: Case, chunks: list[int | str]) -> None:
    """Bits of moe in chunks against those of dispatch and combine."""
    inputs = moe_cases.draw_inputs(case)
    plan, pair = moe_cases.run_pair(case, inputs)
    rank = dist.get_rank()
    moe_cases.check_result(case, inputs, plan.reduction_map, pair, rank)
    for count in chunks:
        result = moe_cases.run_moe(case, count, inputs)
        pair.assert_same_bits(result, (case, count))
        if case.dtype == "float64":
            found, expected = result.grad_parameters, pair.grad_parameters
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def count_auto_chunks(tokens: int, hidden: int) -> int:
    """How many chunks the layer chooses."""
    size = dist.get_world_size()
    case = Case(
        tuple(tokens + rank for rank in range(size)),
        hidden=hidden,
        topk=4,
        num_experts=2 * size,
        dtype="float32",
    )
    inputs, rank = moe_cases.draw_inputs(case), dist.get_rank()
    experts = moe_cases.LocalExperts(case)
    with torch.no_grad():
        x, weights = inputs.x[rank], inputs.weights[rank]
        automoe.moe(x, inputs.ids[rank], weights, experts)
    return experts.calls


def cover_parts(case: Case, num_parts: int) -> list[int]:
    """Every row is in one part, sorted; returns the rows of each part."""
    inputs, rank = moe_cases.draw_inputs(case), dist.get_rank()
    plan = automoe.plan(inputs.ids[rank], num_experts=case.num_experts)
    parts = [plan.part(index, num_parts) for index in range(num_parts)]
    counts = torch.stack([part.num_tokens_per_expert for part in parts])
    assert torch.equal(counts.sum(0, dtype=torch.int32), plan.num_tokens_per_expert)
    prints = {part.fingerprint for part in parts} | {plan.fingerprint}
    assert len(prints) == num_parts + 1
    sends = sum(part.facts.num_send_rows for part in parts)
    assert sends == plan.facts.num_send_rows
    for part in parts:
        assert part.num_tokens == plan.num_tokens
        assert part.reduction_map == plan.reduction_map
    return [part.num_recv_tokens for part in parts]


def run_quantized(num_chunks: int) -> None:
    """fp8 rows with their scales; experts that make numbers of them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    case = Case((5,) * size, topk=3, num_experts=size + 2, hidden=8, dtype="float32")
    inputs = moe_cases.draw_inputs(case)
    scales = [x.abs().amax(1, keepdim=True) for x in inputs.x]
    rows = [
        (x / scale).to(torch.float8_e4m3fn)
        for x, scale in zip(inputs.x, scales, strict=True)
    ]
    plain = [row.float() * scale for row, scale in zip(rows, scales, strict=True)]
    experts = moe_cases.LocalExperts(case)

    def widen(recv: tuple[torch.Tensor, ...], offsets: torch.Tensor) -> torch.Tensor:
        quantized, scale = recv
        return experts(quantized.float() * scale, offsets)

    args = (inputs.ids[rank], inputs.weights[rank])
    options = {"num_experts": case.num_experts, "num_chunks": num_chunks}
    out = automoe.moe((rows[rank], scales[rank]), *args, widen, **options)
    expected = automoe.moe(plain[rank], *args, experts, **options)
    assert torch.equal(out, expected)


def train_frozen(num_chunks: int, frozen: str) -> None:
    """Some ranks' rows depend on nothing that needs a gradient; all go backward."""
    rank, size = dist.get_rank(), dist.get_world_size()
    # The last rank has no expert, and the experts of rank 0 get no token.
    case = Case((4,) * size, topk=1, num_experts=size - 1, pattern="last expert")
    inputs = moe_cases.draw_inputs(case)
    experts = moe_cases.LocalExperts(case)
    experts.parameters.requires_grad_(frozen != "experts")

    def detached(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        if rows.shape[0] == 0:
            return torch.zeros_like(rows)
        return experts(rows, offsets)

    x, weights = moe_cases.leaves(case, inputs, rank)
    x.requires_grad_(frozen != "x")
    weights.requires_grad_(frozen == "experts")
    out = automoe.moe(
        x,
        inputs.ids[rank],
        weights,
        detached,
        num_experts=case.num_experts,
        num_chunks=num_chunks,
    )
    out.backward(inputs.grad_out[rank])
    dense = reference.run_dense(
        inputs.x,
        inputs.ids,
        inputs.weights,
        inputs.grad_out,
        experts.parameters,
    )
    local = reference.local_experts(case.num_experts, rank, size)
    if frozen == "experts":
        assert experts.parameters.grad is None
        assert x.grad is not None and weights.grad is not None
    elif list(local) == [case.num_experts - 1]:
        found = experts.parameters.grad[:, -1]
        torch.testing.assert_close(found, dense[:, -1], rtol=1e-12, atol=1e-12)


def compare_fixed_rows(case: Case, capacity: int) -> None:
    """With room for all rows, their number changes no bit of the result."""
    inputs, rank = moe_cases.draw_inputs(case), dist.get_rank()
    shapes = []

    def experts(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        shapes.append(rows.shape[0])
        return rows * rows

    args = (inputs.x[rank], inputs.ids[rank], inputs.weights[rank], experts)
    options = {"num_experts": case.num_experts}
    expected = automoe.moe(*args, **options)
    shapes.clear()
    out = automoe.moe(*args, **options, max_recv_tokens=capacity)
    assert shapes == [capacity]  # and one chunk
    assert torch.equal(out, expected)
    assert torch.equal(
        automoe.moe(*args, **options, max_recv_tokens=capacity, num_chunks=3), expected
    )
    assert len(shapes) == 4


def refuse_arguments() -> list[str]:
    """Errors of arguments that only the layer has."""
    ids, x = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 3)
    found = []
    for options in (
        {"num_experts": 1, "num_chunks": 0},
        {"num_experts": 1, "num_chunks": "many"},
        {},
    ):
        try:
            automoe.moe(x, ids, None, lambda rows, offsets: rows, **options)
        except ValueError as error:
            found.append(str(error))
    return found


# ---- tests ----


@_on(*_SHAPES)
class TestEveryShape:
    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    def test_one_to_eight_chunks(self, rank_pool: RankPool, dtype: str) -> None:
        size = rank_pool.world_size
        case = Case(
            tuple(3 + (5 * rank) % 7 for rank in range(size)),
            topk=3,
            num_experts=2 * size + 1,
            pattern="holes",
            dtype=dtype,
        )
        rank_pool.run(compare_chunks, case, [*range(1, 9), "auto"])

    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=data())
    def test_drawn_cases(self, rank_pool: RankPool, data) -> None:
        case = data.draw(moe_cases.cases(rank_pool.world_size))
        rank_pool.run(compare_chunks, case, [2, 5])

    @pytest.mark.parametrize("num_parts", [1, 2, 5])
    def test_parts_cover_the_plan(self, rank_pool: RankPool, num_parts: int) -> None:
        size = rank_pool.world_size
        case = Case((9,) * size, topk=3, num_experts=2 * size)
        for rows in rank_pool.run(cover_parts, case, num_parts):
            assert len(rows) == num_parts


@_on("2x2", "3+3+2", "gloo")
class TestSomeShapes:
    def test_edge_cases(self, rank_pool: RankPool) -> None:
        for case in moe_cases.edge_cases(rank_pool.world_size):
            rank_pool.run(compare_chunks, case, [3])

    def test_fixed_number_of_rows(self, rank_pool: RankPool) -> None:
        size = rank_pool.world_size
        case = Case(
            (12,) * size, hidden=5, topk=3, num_experts=2 * size, dtype="float32"
        )
        rank_pool.run(compare_fixed_rows, case, 36 * size)

    def test_large_rows_are_in_flight_together(self, rank_pool: RankPool) -> None:
        size = rank_pool.world_size
        case = Case(
            (64,) * size, hidden=2048, topk=4, num_experts=2 * size, dtype="bfloat16"
        )
        rank_pool.run(compare_chunks, case, [4, 8])

    @pytest.mark.parametrize("num_chunks", [1, 3])
    def test_rows_of_several_tensors(
        self, rank_pool: RankPool, num_chunks: int
    ) -> None:
        rank_pool.run(run_quantized, num_chunks)

    @pytest.mark.parametrize("num_chunks", [1, 3])
    @pytest.mark.parametrize("frozen", ["x", "experts"])
    def test_ranks_without_gradients_go_backward_too(
        self, rank_pool: RankPool, num_chunks: int, frozen: str
    ) -> None:
        rank_pool.run(train_frozen, num_chunks, frozen)


@_on("1x3", "2x2")
def test_automatic_number_of_chunks(rank_pool: RankPool) -> None:
    assert set(rank_pool.run(count_auto_chunks, 4, 16)) == {1}
    found = set(rank_pool.run(count_auto_chunks, 300, 8192))
    assert len(found) == 1
    one_node = len(rank_pool.nodes) == 1
    assert (found == {1}) == one_node


@pytest.mark.parametrize("rank_pool", [[1]], indirect=True)
def test_arguments_of_the_layer_are_named(rank_pool: RankPool) -> None:
    ((zero, many, experts),) = rank_pool.run(refuse_arguments)
    assert "num_chunks is 0, expected 'auto' or a positive number" in zero
    assert "num_chunks is 'many'" in many
    assert "num_experts is None" in experts
