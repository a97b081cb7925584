# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the host does not wait, graphs replay, memory does not grow, ranks fail."""

from __future__ import annotations

import gpu_cases
import gpu_streams as programs
import pytest
from distributed import RankPool
from gpu_cases import SECONDS

on_pools = pytest.mark.parametrize(
    "rank_pool",
    [pytest.param([2], id="2 ranks"), pytest.param([4], id="4 ranks")],
    indirect=True,
    scope="module",
)
two_ranks = pytest.mark.parametrize("rank_pool", [[2]], indirect=True, scope="module")


@two_ranks
@pytest.mark.parametrize(
    "program",
    [
        programs.find_host_waits,
        pytest.param(
            programs.find_backward_waits,
            marks=pytest.mark.skipif(
                gpu_cases.WITHOUT_GPU, reason="needs torch's own kernels, and a GPU"
            ),
        ),
        programs.find_plan_waits,
    ],
)
def test_the_host_does_not_wait(rank_pool: RankPool, program) -> None:
    for seconds, slept_on in rank_pool.run(program, deadline=SECONDS):
        assert slept_on, f"the GPU had finished when the calls returned ({seconds} s)"
        # Without a GPU, ranks and what stands for GPUs take turns on few cores.
        assert gpu_cases.WITHOUT_GPU or seconds < 0.2


@on_pools
def test_graph(rank_pool: RankPool) -> None:
    rank_pool.run(programs.replay_graph, 20, deadline=SECONDS)


@on_pools
def test_graph_that_plans(rank_pool: RankPool) -> None:
    rank_pool.run(programs.replay_plan, 10, deadline=SECONDS)


@on_pools
def test_graph_after_other_plans(rank_pool: RankPool) -> None:
    rank_pool.run(programs.replay_after_other_plans, 70, deadline=SECONDS)


@on_pools
def test_graph_with_a_new_plan(rank_pool: RankPool) -> None:
    rank_pool.run(programs.replay_new_plan, deadline=SECONDS)


@on_pools
@pytest.mark.parametrize("in_chunks", [False, True])
def test_graph_of_pending_calls(rank_pool: RankPool, in_chunks: bool) -> None:
    rank_pool.run(programs.replay_pending_calls, 5, in_chunks, deadline=SECONDS)


@two_ranks
@pytest.mark.parametrize("new_plans", [False, True])
def test_no_growth(rank_pool: RankPool, new_plans: bool) -> None:
    deadline = max(2 * 60, SECONDS)
    for grown in rank_pool.run(
        programs.measure_growth, 1000, new_plans, deadline=deadline
    ):
        # With new plans, R differs from call to call, and torch's blocks with it; the
        # plan itself is the only tensor that stays.
        assert grown["allocated"] <= (64 << 10 if new_plans else 0), grown
        assert grown["device"] <= 16 << 20, grown


@pytest.mark.parametrize("nodes", [[2], [4]])
def test_lost_rank(make_rank_pool, nodes: list[int]) -> None:
    pool = make_rank_pool(nodes)
    outcomes = pool.run(programs.lose_rank, 1, deadline=SECONDS, check=False)
    assert outcomes[1].kind == "died"
    for rank, outcome in enumerate(outcomes):
        if rank != 1:
            assert outcome.error is None, outcome.details
            heard, text, released = outcome.value
            assert "rank 1" in text, text
            assert heard < 15 and released < 15


@pytest.mark.parametrize("nodes", [[2], [4]])
def test_rank_lost_during_replays(make_rank_pool, nodes: list[int]) -> None:
    pool = make_rank_pool(nodes)
    outcomes = pool.run(programs.lose_rank_in_replays, 1, deadline=SECONDS, check=False)
    assert outcomes[1].kind == "died"
    for rank, outcome in enumerate(outcomes):
        if rank != 1:
            assert outcome.error is None, outcome.details
            seconds, text = outcome.value
            assert seconds < 15
            assert "rank 1" in text, text
