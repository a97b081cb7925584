# SPDX-License-Identifier: Apache-2.0
"""Registration and life of the backend, in fresh processes that import only torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import backend_groups as groups
import backend_programs as programs
import pytest
from distributed import FreshRun, run_fresh

# Nothing of this may appear on stderr of a rank that ends well.
_BAD_WORDS = ("Traceback", "terminate called", "Fatal", "leaked", "automoe:")


@dataclass(frozen=True)
class Program:
    """One function of backend_programs and where it runs.

    Attributes:
        run: the function; a parameter "path" becomes a file name of its own.
        nodes: ranks of each node.
    """

    run: Callable[..., None]
    nodes: tuple[int, ...] = (2,)
    arguments: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        words = [self.run.__name__, *(it for it in self.arguments if it != "path")]
        return "-".join(words)


_PROGRAMS = [
    Program(programs.by_name, (1, 1)),
    Program(programs.cpu_map),
    Program(programs.both_devices_map),
    Program(programs.gloo_and_automoe_map),
    Program(programs.stays_behind_the_defaults),
    Program(programs.beside_gloo, (2, 1)),
    Program(programs.meshes, (2, 2)),
    Program(programs.strided_and_permuted_groups, (2, 2)),
    Program(programs.one_rank, (1,)),
    Program(programs.groups_of_one_rank),
    Program(programs.read_outs, (2, 1)),
    Program(programs.init_again, (2, 1), ("file", "path")),
    Program(programs.init_again, (2, 1), ("tcp", "path")),
    Program(programs.file_method, arguments=("path",)),
    Program(programs.exits_without_destroy, (2, 1)),
    Program(programs.exits_with_pending_work, (2, 1)),
    Program(programs.destroys_with_pending_work, (1, 1)),
    Program(programs.debug_detail, env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}),
    Program(programs.without_autoload, env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}),
    Program(groups.takes_options),
    Program(groups.splits, (2, 1)),
    Program(groups.many_groups, (2, 1)),
    Program(groups.completion_hooks),
    Program(groups.other_devices),
    Program(programs.forks),
    Program(programs.forks_and_exits, (1, 1)),
    Program(programs.loads_data_in_forked_workers),
]


@pytest.fixture(scope="module")
def launches(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[FreshRun]]:
    """Every selected program, two at a time: they mostly wait for imports."""
    folder = tmp_path_factory.mktemp("stores")

    def launch(program: Program) -> FreshRun:
        path = str(folder / program.name)
        arguments = [path if it == "path" else it for it in program.arguments]
        return run_fresh(program.nodes, program.run, *arguments, env=program.env)

    selected = [
        item.callspec.params["program"]
        for item in request.session.items
        if item.module is request.module and "program" in item.fixturenames
    ]
    with ThreadPoolExecutor(max_workers=2) as threads:
        futures = {it.name: threads.submit(launch, it) for it in selected}
        # Launching reads os.environ, which pytest changes from test to test.
        wait(futures.values())
    return futures


@pytest.mark.parametrize("program", _PROGRAMS, ids=lambda program: program.name)
def test_in_fresh_processes(
    program: Program, launches: dict[str, Future[FreshRun]]
) -> None:
    result = launches[program.name].result()
    for rank, text in enumerate(result.stderr):
        found = [word for word in _BAD_WORDS if word in text]
        assert not found, f"rank {rank} wrote:\n{text}"


def test_torchrun() -> None:
    source = "import backend_programs; backend_programs.under_torchrun()"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "--no-python"),
            *(sys.executable, "-c", source),
        ],
        env={**os.environ, "PYTHONPATH": str(Path(programs.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 is done", "rank 1 is done"]
