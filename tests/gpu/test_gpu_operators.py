# SPDX-License-Identifier: Apache-2.0
"""The operators on ranks that share a GPU, against the same ranks' CPU, bit for bit."""

from __future__ import annotations

import gpu_cases
import gpu_operators as programs
import pytest
from distributed import RankPool
from gpu_cases import CASES, SECONDS, Case

on_pools = pytest.mark.parametrize(
    "rank_pool",
    [pytest.param([2], id="2 ranks"), pytest.param([4], id="4 ranks")],
    indirect=True,
    scope="module",
)
one_rank = pytest.mark.parametrize("rank_pool", [[1]], indirect=True, scope="module")
by_case = pytest.mark.parametrize("case", CASES, ids=gpu_cases.describe)

LAYERS = [
    Case(dtype="float32", hidden=33),
    Case(dtype="bfloat16", hidden=129, align=4, holes=True),
    Case(tokens=(0, 40), dtype="float64", topk=6),
    Case(tokens=(256,), dtype="bfloat16", topk=8, num_experts=32, hidden=2048),
]
by_layer = pytest.mark.parametrize("case", LAYERS, ids=gpu_cases.describe)


@on_pools
@by_case
def test_exchange(rank_pool: RankPool, case: Case) -> None:
    rank_pool.run(programs.compare_exchange, case, deadline=SECONDS)


@on_pools
@pytest.mark.parametrize("hidden", [3, 32])
@pytest.mark.parametrize("dtype", gpu_cases.OTHERS)
def test_rows_of_any_type(rank_pool: RankPool, dtype: str, hidden: int) -> None:
    rank_pool.run(programs.compare_type, dtype, hidden, deadline=SECONDS)


@on_pools
def test_fixed_number_of_rows(rank_pool: RankPool) -> None:
    rank_pool.run(programs.compare_capacity, deadline=SECONDS)


@on_pools
def test_parts(rank_pool: RankPool) -> None:
    rank_pool.run(programs.compare_parts, deadline=SECONDS)


@on_pools
@by_layer
@pytest.mark.parametrize("num_chunks", [1, 2, 4])
def test_layer(rank_pool: RankPool, case: Case, num_chunks: int) -> None:
    rank_pool.run(programs.compare_gradients, case, num_chunks, False, deadline=SECONDS)


@on_pools
@by_layer
@pytest.mark.parametrize("async_op", [False, True])
def test_pair(rank_pool: RankPool, case: Case, async_op: bool) -> None:
    rank_pool.run(programs.compare_gradients, case, 0, async_op, deadline=SECONDS)


@on_pools
def test_calls_in_flight(rank_pool: RankPool) -> None:
    rank_pool.run(programs.compare_calls_in_flight, deadline=SECONDS)


@on_pools
def test_side_stream(rank_pool: RankPool) -> None:
    rank_pool.run(programs.compare_side_stream, deadline=SECONDS)


@one_rank
@by_case
def test_local(rank_pool: RankPool, case: Case) -> None:
    rank_pool.run(programs.compare_local, case, deadline=SECONDS)
