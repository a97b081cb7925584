# SPDX-License-Identifier: Apache-2.0
"""What PyTorch ships on top of c10d gives the same on a group of ours as on gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import stock_functions as functions
import stock_programs as programs
import stock_tensors as tensors
import stock_training as training
from distributed import FreshRun, RankPool, run_fresh
from stock_cases import ROUNDING, compare, compare_pair

_SCHEDULES = [
    "GPipe",
    "1F1B",
    "LoopedBFS",
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]


@dataclass(frozen=True)
class Case:
    """A case, its arguments, and how close ours and gloo's results must be."""

    run: Callable[..., object]
    arguments: tuple = ()
    options: dict = field(default_factory=dict, hash=False)
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        words = [self.run.__name__, *self.arguments]
        words += [f"{key}={value}" for key, value in self.options.items()]
        return " ".join(map(str, words))


def _training(run: Callable[..., object], *arguments: object, **options: object):
    return Case(run, arguments, options, ROUNDING)


# Where others use the cores too, the first case's imports alone take a minute.
_DEADLINE = 300.0
# In float32: only the order of sums may differ.
_SINGLE = 1e-5

_TRAINING = [
    *(
        Case(training.fsdp2, arguments, options, _SINGLE)
        for arguments, options in (
            ((), {}),
            ((), {"reshard": False, "clip": 0.01}),
            ((), {"divide": 3.0, "force_sum": True}),
            ((), {"mixed": True}),
            (((2, 2),), {"clip": 0.01}),
            (((2, 2),), {"reshard": False}),
            (((2, 2),), {"mixed": True}),
        )
    ),
    *(
        _training(training.fsdp1, strategy)
        for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")
    ),
    _training(training.ddp),
    _training(training.ddp, gradient_as_bucket_view=True, accumulate=True),
    _training(
        training.ddp, find_unused_parameters=True, branches=("left", "right", "both")
    ),
    _training(training.ddp, static_graph=True, branches=("left",)),
    _training(training.ddp, broadcast_buffers=False),
    Case(training.ddp_hook, ("allreduce",), {}, _SINGLE),
    Case(training.ddp_hook, ("power_sgd",), {}, 1e-4),
    # Rounded to float16 (11 bits) before and after each addition.
    Case(training.ddp_hook, ("fp16",), {}, 2e-3),
    Case(training.ddp_hook, ("fp16_power_sgd",), {}, 2e-3),
    _training(training.ddp_join),
    _training(training.post_local_sgd),
    _training(training.zero_optimizer, views=True),
    _training(training.zero_optimizer, views=False),
    # Point to point: nothing is added, so the bits are the same.
    *(Case(training.pipeline, (schedule,)) for schedule in _SCHEDULES),
]

_TENSORS = [
    Case(tensors.redistribute, ((4,), 5, 7)),
    Case(tensors.redistribute, ((4,), 8, 4)),
    Case(tensors.redistribute, ((4,), 3, 2)),  # ranks with nothing
    Case(tensors.redistribute, ((2, 2), 5, 7)),
    Case(tensors.distribute),
    Case(tensors.operators),
    _training(tensors.tensor_parallel),
    *(
        Case(tensors.ring_attention, (method,), {"causal": causal})
        for method in ("allgather", "alltoall")
        for causal in (False, True)
    ),
    Case(functions.functional),
    Case(functions.in_place_operators),
    Case(functions.functional_gradients),
    Case(functions.autograd_collectives),
    Case(functions.compiled),
    Case(functions.make_groups),
    Case(functions.split_directly),
]


@pytest.mark.parametrize("rank_pool", [[2, 2]], indirect=True)
class TestSameAsGloo:
    @pytest.mark.parametrize("case", _TRAINING, ids=lambda case: case.name)
    def test_training(self, rank_pool: RankPool, case: Case) -> None:
        self._compare(rank_pool, case)

    @pytest.mark.parametrize("case", _TENSORS, ids=lambda case: case.name)
    def test_tensors(self, rank_pool: RankPool, case: Case) -> None:
        self._compare(rank_pool, case)

    @pytest.mark.parametrize("background", [False, True])
    def test_checkpoint(self, rank_pool: RankPool, background: bool, tmp_path) -> None:
        arguments = (str(tmp_path),)
        options = {"background": background}
        self._compare(rank_pool, Case(tensors.checkpoint, arguments, options, ROUNDING))

    def test_divided_gradients(self, rank_pool: RankPool) -> None:
        """PREMUL_SUM, which gloo refuses: the same as without FSDP."""
        counts = rank_pool.run(
            compare_pair, training.fsdp2_divided, 3.0, tolerance=_SINGLE
        )
        assert min(counts) > 0
        for text in rank_pool.run(training.refuses_divided, "gloo"):
            assert "PREMUL_SUM" in text, text

    def test_nested_futures(self, rank_pool: RankPool) -> None:
        """Where gloo hangs: callbacks of futures that wait for futures."""
        counts = rank_pool.run(compare_pair, training.nested_futures, tolerance=0.0)
        assert min(counts) > 0

    def _compare(self, rank_pool: RankPool, case: Case) -> None:
        counts = rank_pool.run(
            compare,
            case.run,
            *case.arguments,
            tolerance=case.tolerance,
            deadline=_DEADLINE,
            **case.options,
        )
        assert min(counts) > 0


# ---- fresh processes ----

_PROGRAMS: dict[str, tuple[Callable[..., None], tuple[int, ...], dict[str, str]]] = {
    "trains_by_defaults": (programs.trains_by_defaults, (2, 2), {}),
    "uses_groups_after_destroy": (programs.uses_groups_after_destroy, (1, 1), {}),
    "debug_detail_mismatch": (
        programs.debug_detail_mismatch,
        (2,),
        {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"},
    ),
    "takes_options": (programs.takes_options, (2, 2), {}),
    "loads_data_in_workers": (programs.loads_data_in_workers, (2,), {}),
}


@pytest.fixture(scope="module")
def launches(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[FreshRun]]:
    """Every selected program, two at a time: they mostly wait for imports."""
    folder = tmp_path_factory.mktemp("programs")

    def launch(name: str) -> FreshRun:
        program, nodes, env = _PROGRAMS[name]
        return run_fresh(nodes, program, str(folder), env=env, deadline=_DEADLINE)

    selected = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.module is request.module and "launches" in item.fixturenames
    ]
    with ThreadPoolExecutor(max_workers=2) as threads:
        futures = {name: threads.submit(launch, name) for name in selected}
        # Launching reads os.environ, which pytest changes from test to test.
        wait(futures.values())
    return futures


@pytest.mark.parametrize("name", _PROGRAMS)
def test_program(name: str, launches: dict[str, Future[FreshRun]]) -> None:
    result = launches[name].result()
    for rank, text in enumerate(result.stderr):
        assert "Traceback" not in text, f"rank {rank} wrote:\n{text}"


def test_elastic_restart(tmp_path: Path) -> None:
    """torchrun starts all ranks again when one fails; their groups are new."""
    call = f"fails_once_under_torchrun({str(tmp_path)!r})"
    source = f"import stock_programs as it; it.{call}"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "3", "--max-restarts", "1", "--no-python"),
            *(sys.executable, "-c", source),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=_DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    expected = [f"rank {rank} is done in life 1" for rank in range(3)]
    assert sorted(done.stdout.splitlines()) == expected
    for rank in (0, 2):
        text = (tmp_path / f"error-{rank}").read_text()
        assert "rank 1" in text, text
