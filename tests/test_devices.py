# SPDX-License-Identifier: Apache-2.0
"""explain_topology: what it says of nodes and GPUs, on machines that have none."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool

from torch_automoe import _loader, devices
from torch_automoe.devices import explain_topology

_NO_GPU = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch is not a CPU build"
)
_CPU_LINE = (
    f"no CUDA device: torch {torch.__version__} is a CPU build; "
    "the exchange runs on CPU ranks"
)


def explain(gather: bool) -> list[str]:
    """Explain the default group on this rank."""
    return explain_topology(gather=gather).splitlines()


def explain_pair() -> list[str]:
    """Explain a group of ranks 1 and 2 on its members."""
    group = dist.new_group([1, 2])
    if dist.get_rank() not in (1, 2):
        return []
    return explain_topology(group, gather=True).splitlines()


def explain_gloo() -> str:
    """Return how a group with another backend is refused."""
    group = dist.new_group(backend="gloo")
    try:
        explain_topology(group)
    except ValueError as error:
        return str(error)
    return "no error"


@_NO_GPU
@pytest.mark.parametrize("rank_pool", [[2, 1]], indirect=True)
class TestRanks:
    @pytest.mark.parametrize("gather", [False, True])
    def test_nodes_rails_and_no_device(self, rank_pool: RankPool, gather: bool) -> None:
        for rank, lines in enumerate(rank_pool.run(explain, gather)):
            assert lines == [
                f"3 ranks on 2 nodes; this is rank {rank}",
                "node 0: ranks 0, 1",
                "node 1: rank 2",
                "rail 0: ranks 0, 2",
                "rail 1: rank 1",
                _CPU_LINE,
            ]

    def test_given_group(self, rank_pool: RankPool) -> None:
        outside, one, two = rank_pool.run(explain_pair)
        assert outside == []
        assert one[0] == "2 ranks on 2 nodes; this is rank 0"
        assert two[0] == "2 ranks on 2 nodes; this is rank 1"
        assert one[-1] == two[-1] == _CPU_LINE

    def test_group_of_another_backend(self, rank_pool: RankPool) -> None:
        for text in rank_pool.run(explain_gloo):
            assert "automoe" in text
            assert "gloo" in text


@_NO_GPU
def test_one_node_has_no_rails() -> None:
    found = devices.Topology(0, 1, [0, 0], [0, 1])
    assert devices._explain_nodes(found) == [
        "2 ranks on 1 node; this is rank 0",
        "node 0: ranks 0, 1",
    ]


@_NO_GPU
def test_without_group() -> None:
    assert explain_topology().splitlines() == [
        "there is no process group: this is about this process alone",
        _CPU_LINE,
    ]


def test_gather_needs_a_group() -> None:
    with pytest.raises(ValueError, match=r"gather=True.*init_process_group\('automoe'"):
        explain_topology(gather=True)


def test_a_cuda_build_of_torch_is_no_reason() -> None:
    assert devices._why_not_torch("2.14.1+cu130", "13.0") == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_extension_tells_why_it_has_no_device() -> None:
    extension = _loader.load()
    facts = extension.device_facts(rank=0, nccl_shares_gpus=False, why_no_device="")
    (line,) = extension.explain_device(facts)
    reason = "built without CUDA" if not _cuda_of_build() else "NVIDIA"
    assert line.startswith("no CUDA device: ")
    assert reason in line


def _cuda_of_build() -> str:
    return _loader.build_record().CUDA


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        (("x", "x"), ["no CUDA device: x; the exchange runs on CPU ranks"]),
        (
            ("x", "y"),
            [
                "rank 0: no CUDA device: x",
                "rank 1: no CUDA device: y",
                "the exchange runs on CPU ranks",
            ],
        ),
    ],
)
def test_the_reasons_of_all_ranks(
    reasons: tuple[str, str], expected: list[str]
) -> None:
    extension = _loader.load()
    facts = [
        extension.device_facts(rank=rank, nccl_shares_gpus=False, why_no_device=why)
        for rank, why in enumerate(reasons)
    ]
    assert extension.explain_devices(facts, [0, 0]) == expected


def test_forged_facts_are_refused() -> None:
    extension = _loader.load()
    facts = extension.device_facts(rank=0, nccl_shares_gpus=False, why_no_device="x")
    with pytest.raises(RuntimeError, match="ends early"):
        extension.explain_device(facts[:-1])
    with pytest.raises(RuntimeError, match="1 bytes follow"):
        extension.explain_device(facts + b"x")
