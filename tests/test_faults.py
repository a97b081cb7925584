# SPDX-License-Identifier: Apache-2.0
"""A rank is killed: every wait ends with an error that names it; nothing remains."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import Outcome, RankPool
from lab_processes import await_condition

from torch_automoe.lab import Lab

_SHAPES = {"1x4": [4], "2x2": [2, 2], "4x2": [2, 2, 2, 2]}


# ---- what the survivors wait in; the victim never comes ----


def small_exchange(group: dist.ProcessGroup, victim: int) -> None:
    size = dist.get_world_size(group)
    dist.all_to_all_single(torch.empty(size), torch.ones(size), group=group)


def large_exchange(group: dist.ProcessGroup, victim: int) -> None:
    numel = 200_000 * dist.get_world_size(group)
    dist.all_to_all_single(torch.empty(numel), torch.ones(numel), group=group)


def many_exchanges(group: dist.ProcessGroup, victim: int) -> None:
    size = dist.get_world_size(group)
    works = [
        dist.all_to_all_single(
            torch.empty(size * numel),
            torch.ones(size * numel),
            group=group,
            async_op=True,
        )
        for numel in [10, 50_000] * 10
    ]
    errors = []
    for work in works:
        try:
            work.wait()
        except dist.DistBackendError as error:
            errors.append(error)
    assert len(errors) == len(works), "some waits ended well without the victim"
    raise errors[-1]


def reduction(group: dist.ProcessGroup, victim: int) -> None:
    dist.all_reduce(torch.ones(1000), group=group)


def barrier(group: dist.ProcessGroup, victim: int) -> None:
    dist.barrier(group)


def receive(group: dist.ProcessGroup, victim: int) -> None:
    dist.recv(torch.empty(10), victim, group=group)


_EXCHANGES = [small_exchange, large_exchange, many_exchanges]
_INNER = [reduction, barrier, receive]


def lose_a_rank(
    wait: Callable[..., None], victim: int, folder: str, members: list[int], warm: bool
) -> tuple[str, str]:
    """Wait for a rank that is killed.

    Args:
        members: of the group to wait in; empty: the default group.
        warm: the ranks have talked before, so connections stand.

    Returns:
        type and text of the error.
    """
    group = dist.group.WORLD
    if members:
        group = dist.new_group(members, sort_ranks=False)
    rank = dist.get_rank()
    if members and rank not in members:
        Path(folder, str(rank)).touch()
        return "", "not a member"
    if warm:
        small_exchange(group, victim)
        reduction(group, victim)
    Path(folder, str(rank)).touch()
    if rank == victim:
        time.sleep(1000)
    error = ("", "no error")
    try:
        wait(group, victim)
    except Exception as it:
        error = (type(it).__name__, str(it))
    again = ("", "no error")
    try:
        small_exchange(group, victim)
    except Exception as it:
        again = (type(it).__name__, str(it))
    assert again[0] == "DistBackendError", (error, again)
    dist.destroy_process_group()
    return error


def die_while_sending(victim: int, folder: str) -> tuple[str, str]:
    """The victim has posted, and dies while its bytes and ours are under way."""
    numel = 4_000_000 * dist.get_world_size()
    received, sent = torch.empty(numel), torch.ones(numel)
    dist.barrier()
    Path(folder, str(dist.get_rank())).touch()
    try:
        for _ in range(10_000):
            dist.all_to_all_single(received, sent)
    except Exception as it:
        return type(it).__name__, str(it)
    return "", "no error"


def crash_with_open_groups(folder: str) -> None:
    """Use node memory and network, so that there is something to leave behind."""
    for group in (dist.group.WORLD, dist.new_group(timeout=timedelta(seconds=30))):
        small_exchange(group, 0)
        large_exchange(group, 0)
    Path(folder, str(dist.get_rank())).touch()
    time.sleep(1000)


# ---- tests ----


def _await_ready(pool: RankPool, folder: Path) -> None:
    await_condition(
        lambda: len(list(folder.iterdir())) == pool.world_size, "ranks are ready"
    )


def _kill_when_ready(pool: RankPool, victim: int, folder: Path) -> list[Outcome]:
    _await_ready(pool, folder)
    time.sleep(0.3)  # most of them are inside the wait now; both ways must work
    pool.kill(victim)
    return pool.join(check=False)


def _check(outcomes: list[Outcome], victim: int, members: list[int]) -> None:
    shown = "\n".join(f"{rank}: {outcome}" for rank, outcome in enumerate(outcomes))
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert (outcome.kind, outcome.error) == ("died", "killed by SIGKILL"), shown
        elif rank in members:
            assert outcome.error is None, shown
            kind, text = outcome.value
            assert kind == "DistBackendError", shown
            assert re.search(rf"\brank {victim}\b", text), shown


def _cases() -> list:
    """Every shape, wait and victim; the quick ones hold each pair of them once."""
    quick = {
        "1x4": {*((wait, 0) for wait in _EXCHANGES + _INNER), (reduction, -1)},
        "2x2": {*((wait, -1) for wait in _EXCHANGES + _INNER), (large_exchange, 0)},
        "4x2": {(wait, v) for wait in (many_exchanges, reduction) for v in (0, -1)},
    }
    return [
        pytest.param(
            nodes,
            wait,
            victim,
            id=f"{shape}-{wait.__name__}-{victim}",
            marks=() if (wait, victim) in quick[shape] else pytest.mark.slow,
        )
        for shape, nodes in _SHAPES.items()
        for wait in _EXCHANGES + _INNER
        for victim in (0, -1)
    ]


@pytest.mark.parametrize(
    ("rank_pool", "wait", "victim"), _cases(), indirect=["rank_pool"]
)
def test_ends_every_wait(
    rank_pool: RankPool, wait: Callable[..., None], victim: int, tmp_path: Path
) -> None:
    victim %= rank_pool.world_size
    rank_pool.submit(lose_a_rank, wait, victim, str(tmp_path), [], True)
    outcomes = _kill_when_ready(rank_pool, victim, tmp_path)
    _check(outcomes, victim, list(range(rank_pool.world_size)))


@pytest.mark.parametrize(
    "rank_pool", list(_SHAPES.values()), ids=list(_SHAPES), indirect=True
)
class TestKilledRank:
    @pytest.mark.parametrize("victim", [0, -1])
    def test_ends_exchanges_under_way(
        self, rank_pool: RankPool, victim: int, tmp_path: Path
    ) -> None:
        victim %= rank_pool.world_size
        rank_pool.submit(die_while_sending, victim, str(tmp_path))
        outcomes = _kill_when_ready(rank_pool, victim, tmp_path)
        _check(outcomes, victim, list(range(rank_pool.world_size)))

    def test_leaves_nothing_behind(self, rank_pool: RankPool, tmp_path: Path) -> None:
        def left() -> set[str]:
            found = {str(it) for it in Path("/tmp").iterdir()}
            found = {it for it in found if re.search("automoe|ucx|ucp|gloo", it)}
            # Those of the laboratory and of pools, of other test runs too.
            found = {it for it in found if not re.match("/tmp/automoe-(ranks|lab)", it)}
            for node in range(len(rank_pool.nodes)):
                found |= {f"{node} {it}" for it in _shared_memory(rank_pool, node)}
            return found

        before = left()
        rank_pool.submit(crash_with_open_groups, str(tmp_path))
        _await_ready(rank_pool, tmp_path)
        # All are stopped first, or the last ones hear of the first one's end.
        for signum in (signal.SIGSTOP, signal.SIGKILL):
            for rank in range(rank_pool.world_size):
                rank_pool.kill(rank, signum)
        outcomes = rank_pool.join(check=False)
        assert {outcome.error for outcome in outcomes} == {"killed by SIGKILL"}
        assert left() == before


def _shared_memory(pool: RankPool, node: int) -> list[str]:
    """Names in /dev/shm and System V segments of a node."""
    script = "ls -A /dev/shm; tail -n +2 /proc/sysvipc/shm"
    if isinstance(pool._nodes, Lab):
        done = pool.lab.exec(node, ["sh", "-c", script])
        return done.stdout.splitlines()
    return os.listdir("/dev/shm")


@pytest.mark.parametrize("rank_pool", [[2, 2]], ids=["2x2"], indirect=True)
class TestOtherGroups:
    @pytest.mark.parametrize(
        "wait", [small_exchange, reduction, receive], ids=lambda it: it.__name__
    )
    def test_names_the_global_rank(
        self, rank_pool: RankPool, wait: Callable[..., None], tmp_path: Path
    ) -> None:
        members = [3, 0, 2]  # rank 3 is rank 0 of the group
        rank_pool.submit(lose_a_rank, wait, 3, str(tmp_path), members, True)
        outcomes = _kill_when_ready(rank_pool, 3, tmp_path)
        _check(outcomes, 3, members)

    @pytest.mark.parametrize("wait", _EXCHANGES + _INNER, ids=lambda it: it.__name__)
    def test_before_anybody_has_talked(
        self, rank_pool: RankPool, wait: Callable[..., None], tmp_path: Path
    ) -> None:
        rank_pool.submit(lose_a_rank, wait, 1, str(tmp_path), [], False)
        outcomes = _kill_when_ready(rank_pool, 1, tmp_path)
        _check(outcomes, 1, list(range(4)))
