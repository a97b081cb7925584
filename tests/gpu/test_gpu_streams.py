# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the host does not wait, graphs replay, memory does not grow, ranks fail."""

from __future__ import annotations

import gpu_streams as programs
import pytest
from distributed import RankPool

SECONDS = 60  # for one test

on_pools = pytest.mark.parametrize(
    "rank_pool",
    [pytest.param([2], id="2 ranks"), pytest.param([4], id="4 ranks")],
    indirect=True,
    scope="module",
)
two_ranks = pytest.mark.parametrize("rank_pool", [[2]], indirect=True, scope="module")


@two_ranks
@pytest.mark.parametrize(
    "program", [programs.find_host_waits, programs.find_backward_waits]
)
def test_the_host_does_not_wait(rank_pool: RankPool, program) -> None:
    for seconds, slept_on in rank_pool.run(program, deadline=SECONDS):
        assert slept_on, f"the GPU had finished when the calls returned ({seconds} s)"
        assert seconds < 0.2


@on_pools
def test_graph(rank_pool: RankPool) -> None:
    rank_pool.run(programs.replay_graph, 20, deadline=SECONDS)


@two_ranks
@pytest.mark.parametrize("new_plans", [False, True])
def test_no_growth(rank_pool: RankPool, new_plans: bool) -> None:
    for grown in rank_pool.run(
        programs.measure_growth, 1000, new_plans, deadline=2 * SECONDS
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
