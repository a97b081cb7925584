# SPDX-License-Identifier: Apache-2.0
"""The rank pool that other tests stand on, with gloo as the backend."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import RankFailure, RankPool, run_fresh
from lab_processes import ENVIRONMENT, alive, await_condition, descendants, needs_lab

_GLOO = [
    pytest.param({"nodes": nodes, "backend": "gloo", "after_failure": 4.0}, id=name)
    for name, nodes in (("2+1", [2, 1]), ("one-node", [2]))
]


def all_to_all(scale: int) -> tuple[list[float], str, int]:
    """What each rank received, its host name and its pid."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sent = torch.arange(world_size, dtype=torch.float64) + scale * rank
    received = torch.empty(world_size, dtype=torch.float64)
    dist.all_to_all_single(received, sent)
    return received.tolist(), socket.gethostname(), os.getpid()


def fail_on(ranks: list[int]) -> int:
    """Raise on some ranks, wait for them on the others."""
    if dist.get_rank() in ranks:
        raise ValueError(f"rank {dist.get_rank()} does not like this")
    dist.barrier()
    return dist.get_rank()


def wait_for_ever_on(rank: int) -> str:
    """Hang on one rank only."""
    if dist.get_rank() == rank:
        time.sleep(10_000)
    return "done"


def use_tensors(tensor: torch.Tensor, factor: int = 1) -> torch.Tensor:
    """Return a tensor that is too large for one socket buffer."""
    return tensor * factor + dist.get_rank()


def die_of(signum: int) -> None:
    """Send this rank a signal on rank 1; others wait for it."""
    if dist.get_rank() == 1:
        print("last words", flush=True)
        os.kill(os.getpid(), signum)
    dist.barrier()


def environment() -> dict[str, str]:
    """The variables of a rank."""
    return dict(os.environ)


@pytest.mark.parametrize("rank_pool", _GLOO, indirect=True)
class TestRankPool:
    def test_runs_many_cases_in_the_same_ranks(self, rank_pool: RankPool) -> None:
        pids = rank_pool.pids
        world_size = rank_pool.world_size
        for scale in (1, 10, 100):
            results = rank_pool.run(all_to_all, scale)
            for rank, (received, _, _) in enumerate(results):
                assert received == [rank + scale * r for r in range(world_size)]
        assert rank_pool.pids == pids
        assert len({pid for _, _, pid in results}) <= world_size

    def test_large_arguments_and_results(self, rank_pool: RankPool) -> None:
        tensor = torch.arange(1_000_000)
        results = rank_pool.run(use_tensors, tensor, factor=3)
        for rank, result in enumerate(results):
            assert torch.equal(result, tensor * 3 + rank)

    def test_exception_comes_back_with_its_traceback(self, rank_pool: RankPool) -> None:
        with pytest.raises(RankFailure, match="does not like this") as failure:
            rank_pool.run(fail_on, [0])
        outcome = failure.value.outcomes[0]
        assert (outcome.kind, outcome.error) == (
            "ValueError",
            "rank 0 does not like this",
        )
        assert "in fail_on" in outcome.details
        # The next case finds a working pool.
        assert len(rank_pool.run(all_to_all, 1)) == rank_pool.world_size

    def test_errors_as_outcomes(self, rank_pool: RankPool) -> None:
        everyone = list(range(rank_pool.world_size))
        outcomes = rank_pool.run(fail_on, everyone, check=False)
        assert [outcome.error for outcome in outcomes] == [
            f"rank {rank} does not like this" for rank in everyone
        ]

    def test_hang_shows_stacks_and_the_next_case_runs(
        self, rank_pool: RankPool
    ) -> None:
        old = rank_pool.pids
        with pytest.raises(RankFailure, match="no answer within 2 s") as failure:
            rank_pool.run(wait_for_ever_on, 1, deadline=2)
        outcome = failure.value.outcomes[1]
        assert outcome.kind == "hung"
        assert "in wait_for_ever_on" in outcome.details
        assert failure.value.outcomes[0].value == "done"
        assert len(rank_pool.run(all_to_all, 1)) == rank_pool.world_size
        assert not set(old) & set(rank_pool.pids)
        assert not any(os.path.exists(f"/proc/{pid}") for pid in old)

    def test_death_is_told_with_signal_and_log(self, rank_pool: RankPool) -> None:
        outcomes = rank_pool.run(die_of, signal.SIGTERM, check=False)
        assert (outcomes[1].kind, outcomes[1].error) == ("died", "killed by SIGTERM")
        assert "last words" in outcomes[1].details

    def test_kill_from_outside(self, rank_pool: RankPool) -> None:
        rank_pool.submit(wait_for_ever_on, 0)
        rank_pool.kill(0)
        outcomes = rank_pool.join(check=False)
        assert (outcomes[0].kind, outcomes[0].error) == ("died", "killed by SIGKILL")
        assert outcomes[1].value == "done"

    def test_refuses_local_functions(self, rank_pool: RankPool) -> None:
        with pytest.raises(ValueError, match="expected a module's function"):
            rank_pool.run(lambda: None)


@needs_lab
def test_pool_lives_on_emulated_nodes(make_rank_pool) -> None:
    pool = make_rank_pool([2, 1], backend="gloo")
    before = pool.lab.counters()
    hosts = [host for _, host, _ in pool.run(all_to_all, 1)]
    assert hosts == ["node0", "node0", "node1"]
    after = pool.lab.counters()
    assert all(
        a["tx_bytes"] > b["tx_bytes"] for a, b in zip(after, before, strict=True)
    )
    assert make_rank_pool([2, 1], backend="gloo") is pool


def test_pool_pretends_nodes_where_they_cannot_be_emulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = "not on this machine"
    monkeypatch.setattr("distributed.available", lambda shaped: (False, reason))
    options = {"backend": "gloo", "env": {"EXTRA": "1"}, "placement": "cyclic"}
    with RankPool([2, 1], **options) as pool:
        environments = pool.run(environment)
        assert [env["AUTOMOE_NODE"] for env in environments] == [
            "node0",
            "node1",
            "node0",
        ]
        assert [env["EXTRA"] for env in environments] == ["1"] * 3
        assert len(pool.run(all_to_all, 1)) == 3
    with pytest.raises(pytest.skip.Exception, match=reason):
        RankPool([1, 1], rate="1gbit")
    with pytest.raises(pytest.skip.Exception, match=reason):
        RankPool([1, 1], need_lab=True)


def test_fresh_processes_run_source_and_report_failure() -> None:
    source = (
        "import os, sys\n"
        "assert 'torch_automoe' not in sys.modules\n"
        "print('rank', os.environ['RANK'])\n"
        "sys.exit('wrong' if os.environ['RANK'] == os.environ.get('BAD') else 0)\n"
    )
    result = run_fresh([2, 1], source)
    assert result.stdout == ["rank 0\n", "rank 1\n", "rank 2\n"]
    with pytest.raises(AssertionError, match="exit code 1\n.*rank2(.|\n)*wrong"):
        run_fresh([2, 1], source, env={"BAD": "2"})
    with pytest.raises(AssertionError, match=r"no end within 0\.5 s"):
        run_fresh([1], "import time; time.sleep(1000)", deadline=0.5)


def write_rank(folder: str) -> None:
    """Leave a file named after this rank."""
    Path(folder, os.environ["RANK"]).touch()


def test_fresh_processes_run_functions(tmp_path: Path) -> None:
    run_fresh([1, 1], write_rank, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@needs_lab
@pytest.mark.parametrize("nodes", ["[1, 1]", "[2]"])
def test_ranks_die_with_pytest(nodes: str) -> None:
    source = (
        "import time\n"
        "from distributed import RankPool\n"
        f"pool = RankPool({nodes}, backend=None)\n"
        "print(*pool.pids, flush=True)\n"
        "time.sleep(1000)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", source],
        env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    )
    with owner:
        ranks = {int(pid) for pid in owner.stdout.readline().split()}
        assert len(ranks) == 2
        started = descendants(owner.pid)
        assert ranks <= {pid for pid, _ in started}
        owner.kill()
    await_condition(lambda: not alive(started), "all ranks are gone")
