# SPDX-License-Identifier: Apache-2.0
"""Which way CUDA tensors take: IPC in a node, NCCL between nodes, else the host."""

from __future__ import annotations

import gpu_paths as programs
import gpu_streams
import pytest
import torch
from distributed import RankPool
from gpu_cases import SECONDS

SHARING = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
_FIRST_TO_SHARE = (2, 30)
DIRECT = "CUDA tensors go between the GPUs themselves"
STAGED = "CUDA tensors are staged through the host"
# What a machine may lack; any other reason to stage is a fault of ours.
_LACKS = (
    "cannot wait for memory",
    "no peer access",
    "peer access is not known",
)


def need_shared_nccl(ranks: int) -> dict[str, str]:
    """Variables with which NCCL runs several ranks on a GPU; a skip where it cannot."""
    if ranks <= torch.cuda.device_count():
        return {}
    version = tuple(torch.cuda.nccl.version())
    if version < _FIRST_TO_SHARE:
        found = ".".join(map(str, version))
        pytest.skip(f"needs NCCL >= 2.30, or {ranks} GPUs; torch has NCCL {found}")
    return SHARING


def skip_where_lacking(used: str) -> None:
    if any(lack in used for lack in _LACKS):
        pytest.skip(f"needs a machine that can do this: {used.splitlines()[-1]}")


def expect_direct(texts: list[tuple[str, str]]) -> None:
    """Every rank says that GPUs are used directly, or what the machine lacks."""
    for used, _ in texts:
        skip_where_lacking(used)
        assert DIRECT in used and STAGED not in used, used


@pytest.mark.parametrize("nodes", [[2], [4]])
def test_ipc_inside_a_node(make_rank_pool, nodes: list[int]) -> None:
    pool: RankPool = make_rank_pool(nodes)
    texts = pool.run(programs.compare_and_describe, deadline=SECONDS)
    expect_direct(texts)
    for used, found in texts:
        assert "(CUDA IPC)" in used and "(CUDA IPC)" in found


@pytest.mark.parametrize(("nodes", "per_node"), [([2], 1), ([4], 2)])
def test_nccl_between_nodes(make_rank_pool, nodes: list[int], per_node: int) -> None:
    env = need_shared_nccl(sum(nodes))
    pool = make_rank_pool(nodes, backend=None, env=env)
    pool.run(programs.join, per_node, deadline=SECONDS)
    texts = pool.run(programs.compare_and_describe, deadline=SECONDS)
    expect_direct(texts)
    for used, _ in texts:
        assert "can carry rows between nodes" in used


def test_graph_between_nodes(make_rank_pool) -> None:
    pool = make_rank_pool([2], backend=None, env=need_shared_nccl(2))
    pool.run(programs.join, 1, deadline=SECONDS)
    expect_direct(pool.run(programs.compare_and_describe, deadline=SECONDS))
    pool.run(gpu_streams.replay_graph, 10, deadline=SECONDS)


def test_fp8_between_nodes(make_rank_pool) -> None:
    pool = make_rank_pool([2], backend=None, env=need_shared_nccl(2))
    pool.run(programs.join, 1, deadline=SECONDS)
    used = pool.run(programs.compare_fp8, deadline=SECONDS)
    expect_direct([(text, "") for text in used])


def test_few_blocks(make_rank_pool) -> None:
    pool = make_rank_pool([2])
    found = pool.run(programs.use_few_blocks, 2, deadline=SECONDS)
    expect_direct([(used, "") for used, _ in found])
    for _, blocks in found:
        if not blocks:
            pytest.skip("needs CUPTI, by which torch.profiler sees kernels")
        assert max(blocks) == 2, blocks


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="needs ranks on one GPU")
def test_without_nccl_nodes_are_staged(make_rank_pool) -> None:
    env = {"NCCL_MULTI_RANK_GPU_ENABLE": "0"}
    pool = make_rank_pool([2], backend=None, env=env)
    pool.run(programs.join, 1, deadline=SECONDS)
    for used, _ in pool.run(programs.compare_and_describe, deadline=SECONDS):
        assert STAGED in used and "two ranks share a GPU" in used


def test_a_rank_without_nccl_is_not_waited_for(make_rank_pool) -> None:
    pool = make_rank_pool([3], backend=None, env=need_shared_nccl(3))
    pool.run(programs.join_without_interface, 2, deadline=SECONDS)
    for used, _ in pool.run(programs.compare_and_describe, deadline=SECONDS):
        skip_where_lacking(used)
        expected = f"{STAGED}: rank 2: ncclCommInitRankConfig failed: "
        assert expected in used, used


@pytest.mark.parametrize("nodes", [[1], [2]])
def test_collectives(make_rank_pool, nodes: list[int]) -> None:
    pool = make_rank_pool(nodes, env=need_shared_nccl(sum(nodes)))
    pool.run(programs.use_collectives, deadline=SECONDS)


@pytest.mark.parametrize("nodes", [[1], [2]])
def test_all_to_all_single(make_rank_pool, nodes: list[int]) -> None:
    pool = make_rank_pool(nodes, env=need_shared_nccl(sum(nodes)))
    pool.run(programs.use_all_to_all, deadline=SECONDS)
    pool.run(gpu_streams.replay_all_to_all, 5, deadline=SECONDS)


@pytest.mark.parametrize("limit", [None, 0, 1 << 30])
def test_peer_all_to_all(make_rank_pool, limit: int | None) -> None:
    pool = make_rank_pool([2], env=need_shared_nccl(2))
    for used in pool.run(programs.use_peer_all_to_all, limit, deadline=SECONDS):
        if limit == 0:
            assert used == "no CUDA tensors have gone through this group yet"
            continue
        expect_direct([(used, "")])
        assert ("64 KiB: " in used and " by NCCL" in used) == (limit is None)


def test_graph_of_peer_all_to_all(make_rank_pool) -> None:
    pool = make_rank_pool([2])
    used = pool.run(gpu_streams.replay_all_to_all, 5, 1 << 30, deadline=SECONDS)
    expect_direct([(text, "") for text in used])
