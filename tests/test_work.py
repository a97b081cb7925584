# SPDX-License-Identifier: Apache-2.0
"""What the Work of an all-to-all promises: completion, errors, time limits, threads."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool

_CPU = torch.device("cpu")
# Elements per rank: in a mailbox or a packet; read or sent once matched.
_SIZES = [10, 100_000]
_LIMIT = 30.0  # seconds; only a hang takes so long


# ---- what runs on the ranks ----


def _post(
    numel: int, group: dist.ProcessGroup | None = None
) -> tuple[dist.Work, torch.Tensor, torch.Tensor]:
    """Post an exchange; returns its work, its output and what must come."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sent = torch.arange(size * numel) + 1_000_000 * rank
    received = torch.full_like(sent, -1)
    work = dist.all_to_all_single(received, sent, group=group, async_op=True)
    column = 1_000_000 * torch.arange(size)[:, None]
    expected = column + rank * numel + torch.arange(numel)
    return work, received, expected.view(-1)


def _await(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"not reached: {what}"
        time.sleep(0.005)


def _error_of(call: Callable[..., object], *args: object) -> tuple[str, str]:
    try:
        call(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "no error"


def complete_without_wait(numel: int) -> None:
    """is_completed becomes true while this thread only looks."""
    work, received, expected = _post(numel)
    _await(work.is_completed, "is_completed() without a wait()")
    assert torch.equal(received, expected)
    assert work.is_success()
    assert work.exception() is None
    (result,) = work.result()
    assert result.data_ptr() == received.data_ptr()
    assert work.wait() is True
    assert work.wait() is True


def serve_others_without_wait(numel: int) -> None:
    """A rank that never waits completes the waits of the others."""
    works = [_post(numel) for _ in range(20)]
    if dist.get_rank() > 0:
        for work, received, expected in works:
            work.wait()
            assert torch.equal(received, expected)
        dist.barrier()
    else:
        barrier = dist.barrier(async_op=True)
        _await(barrier.is_completed, "the waits of the other ranks")


def use_future(numel: int) -> None:
    """A future made before the end, one made after it, and their callbacks."""
    if dist.get_rank() == 0:
        time.sleep(0.2)  # on the other ranks the future comes first
    work, received, expected = _post(numel)
    future = work.get_future()
    called = threading.Event()
    seen = []

    def callback(done: torch.futures.Future) -> int:
        seen.append(done.value()[0])
        called.set()
        return 7

    chained = future.then(callback)
    assert torch.equal(future.wait()[0], expected)
    assert chained.wait() == 7
    assert called.wait(_LIMIT)
    assert seen[0].data_ptr() == received.data_ptr()
    _await(work.is_completed, "the work of a completed future")
    (late,) = work.get_future().wait()
    assert torch.equal(late, expected)
    del work
    gc.collect()
    assert torch.equal(future.value()[0], expected)


def future_without_work(numel: int) -> None:
    """A future goes on when its Work is dropped."""
    if dist.get_rank() == 0:
        time.sleep(0.2)
    future, expected = [(it[0].get_future(), it[2]) for it in [_post(numel)]][0]
    gc.collect()
    assert torch.equal(future.wait()[0], expected)


def wait_too_short(numel: int) -> tuple[str, str]:
    """A wait that ends too early, and a later one that succeeds."""
    error = ("", "")
    side = dist.new_group(backend="gloo")  # not in the order of the world's calls
    if dist.get_rank() == 0:
        dist.barrier(side)  # the others have given up once
        work, received, expected = _post(numel)
    else:
        work, received, expected = _post(numel)
        error = _error_of(work.wait, timedelta(milliseconds=50))
        assert not work.is_completed()
        dist.barrier(side)
    work.wait(timedelta(seconds=_LIMIT))
    assert torch.equal(received, expected)
    return error


def wait_in_many_threads(numel: int) -> int:
    """Several threads wait for one Work, others for others."""
    if dist.get_rank() == 0:
        time.sleep(0.1)
    posted = [_post(numel) for _ in range(4)]
    right = []

    def wait(index: int) -> None:
        work, received, expected = posted[index % 4]
        work.wait()
        right.append(torch.equal(received, expected))

    threads = [threading.Thread(target=wait, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(right)


def abort_group() -> tuple[str, str]:
    """One rank aborts a group that others wait in; returns what the wait said."""
    group = dist.new_group(backend="automoe")
    if dist.get_rank() == 0:
        for rank in range(1, dist.get_world_size()):
            dist.recv(torch.empty(1), rank)  # it has posted
        group._get_backend(_CPU).abort()
        error = _error_of(_post, 10, group)
    else:
        work, _, _ = _post(10, group)
        future = work.get_future()
        dist.send(torch.ones(1), 0)
        error = _error_of(work.wait)
        assert work.is_completed()
        assert not work.is_success()
        assert error[1] in str(work.exception()), work.exception()
        assert error[1] in _error_of(future.wait)[1]
    dist.barrier()
    dist.destroy_process_group(group)
    return error


def time_out(missing: int, seconds: float) -> tuple[str, str]:
    """A rank does not come in the group's time; returns what each was told."""
    group = dist.new_group(backend="automoe", timeout=timedelta(seconds=20))
    _post(10, group)[0].wait()
    backend = group._get_backend(torch.device("cpu"))
    backend.set_timeout(timedelta(seconds=seconds))
    error = ("", "")
    if dist.get_rank() != missing:
        error = _error_of(_post(10, group)[0].wait)
    dist.barrier()
    if dist.get_rank() == missing:
        # What the others had sent may still complete its first use.
        uses = [_error_of(lambda: _post(10, group)[0].wait()) for _ in range(2)]
        error = uses[1]
    # The default group has its own time and is well.
    work, received, expected = _post(10)
    work.wait()
    assert torch.equal(received, expected)
    dist.destroy_process_group(group)
    return error


def hold_the_gil(path: str, rounds: int) -> bool:
    """Rank 0 holds its GIL until all others have finished exchanges with it.

    Its lock call goes through PyDLL, which keeps the GIL. Were anything of its engine
    to need it, the others would wait for rank 0 and rank 0 for them.
    """
    rank = dist.get_rank()
    lock = open(path, "w")  # noqa: SIM115
    if rank > 0:
        fcntl.flock(lock, fcntl.LOCK_SH)
    dist.barrier()
    # Every second one is large: rank 0 has to serve it after the others have posted.
    sizes = [_SIZES[number % 2] for number in range(rounds)]
    if rank == 0:
        posted = [_post(numel) for numel in sizes]
        assert ctypes.PyDLL(None).flock(lock.fileno(), fcntl.LOCK_EX) == 0
    else:
        posted = []
        for numel in sizes:
            time.sleep(2.0 / rounds)
            posted.append(_post(numel))
            posted[-1][0].wait()
        lock.close()
    for work, received, expected in posted:
        work.wait()
        assert torch.equal(received, expected)
    lock.close()
    return True


def profile() -> list[str]:
    """Names of the profiler's ranges around two exchanges."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU]) as recorded:
        work, _, _ = _post(10)
        work.wait()
        dist.all_to_all_single(torch.empty(6), torch.ones(6))
    return [event.name for event in recorded.events()]


# ---- tests ----


@pytest.mark.parametrize("rank_pool", [[2, 1]], indirect=True)
class TestWork:
    @pytest.mark.parametrize("numel", _SIZES)
    @pytest.mark.parametrize(
        "check",
        [
            complete_without_wait,
            serve_others_without_wait,
            use_future,
            future_without_work,
        ],
        ids=lambda check: check.__name__,
    )
    def test_promise(
        self, rank_pool: RankPool, check: Callable[[int], None], numel: int
    ) -> None:
        rank_pool.run(check, numel)

    @pytest.mark.parametrize("numel", _SIZES)
    def test_wait_that_is_too_short(self, rank_pool: RankPool, numel: int) -> None:
        _, *others = rank_pool.run(wait_too_short, numel)
        for kind, text in others:
            assert kind == "DistBackendError"
            assert "did not end within 50 ms" in text
            assert "ranks that have not posted it: 0" in text

    @pytest.mark.parametrize("numel", _SIZES)
    def test_waits_in_many_threads(self, rank_pool: RankPool, numel: int) -> None:
        assert set(rank_pool.run(wait_in_many_threads, numel)) == {12}

    def test_abort_ends_every_wait(self, rank_pool: RankPool) -> None:
        for kind, text in rank_pool.run(abort_group):
            assert kind == "DistBackendError"
            assert "rank 0 aborted group" in text

    @pytest.mark.parametrize("missing", [1, 2], ids=["same-node", "other-node"])
    def test_timeout_names_the_missing_rank(
        self, rank_pool: RankPool, missing: int
    ) -> None:
        for kind, text in rank_pool.run(time_out, missing, 1.5):
            assert kind == "DistBackendError"
            assert "timed out in all_to_all number 1 of group" in text
            assert f"ranks that have not posted it: {missing}" in text

    def test_gil_held_elsewhere_delays_nobody(
        self, rank_pool: RankPool, tmp_path: Path
    ) -> None:
        path = str(tmp_path / "lock")
        assert rank_pool.run(hold_the_gil, path, 20, deadline=60) == [True] * 3

    def test_profiler_shows_a_range(self, rank_pool: RankPool) -> None:
        for names in rank_pool.run(profile):
            assert names.count("automoe:all_to_all") == 2
