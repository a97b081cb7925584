# SPDX-License-Identifier: Apache-2.0
"""Open MPI beside the c10d backends: its program, started over the same ranks.

mpirun starts one daemon per other node through a "remote shell". Here that is a script
which leaves the command line in a private folder; rank 0 passes it on over the control
group, and one rank of each node runs it. So it needs no sshd, and works wherever the
job itself does, also between network namespaces.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from counters import find_route, own_address
from exchange import Measurement
from routing import Cell

_SOURCE = Path(__file__).with_name("mpi_alltoallv.c")
_LAUNCH_S = 600.0  # the longest that one block may take, start and end included

# Arguments: host, command words. Ends with mpirun, or with the benchmark.
_REMOTE_SHELL = """\
#!/bin/sh
host=$1
shift
printf '%s' "$*" > {folder}/$host.part
mv {folder}/$host.part {folder}/$host.command
while [ -e {folder}/running ]; do sleep 0.1; done
"""


class MpiContender:
    """MPI's all-to-all, if ``mpi`` is among the peers and can run; else nothing."""

    def __init__(
        self,
        node_of_rank: list[int],
        options: argparse.Namespace,
        note: Callable[[str], None],
    ) -> None:
        """Compile the program on every node. Collective."""
        self._options = options
        self._note = note
        self._nodes = node_of_rank
        self._rank = dist.get_rank()
        self._leads = node_of_rank.index(node_of_rank[self._rank]) == self._rank
        self._folder: Path | None = None
        self._why_not: str | None = None
        self.enabled = "mpi" in options.against
        if not self.enabled:
            return
        found: list[tuple[str, str | None] | None] = [None] * len(node_of_rank)
        dist.all_gather_object(found, (own_address(), self._build()))
        self._hosts = [address for address, _ in found]
        problems = [problem for _, problem in found if problem]
        if node_of_rank != sorted(node_of_rank):
            problems.append("it needs the ranks placed node after node")
        if problems:
            self._leave_out(problems[0])
        elif self._rank == 0:
            note(f"mpi: {_version()}")

    def _leave_out(self, reason: str) -> None:
        self.enabled = False
        self._note(f"mpi: left out: {reason}")
        self.close()

    def __enter__(self) -> MpiContender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the compiled program of this node."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _build(self) -> str | None:
        """Compile for this node; returns what stands against it, or None."""
        path: list[str | None] = [None]
        if self._rank == 0:
            path = [tempfile.mkdtemp(prefix="all_to_all_bench_")]
        dist.broadcast_object_list(path, src=0)
        if not self._leads:
            return None
        # The same path on every node, whether these share the folder or not.
        self._folder = Path(str(path[0]))
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for program in ("mpicc", "mpirun"):
            if shutil.which(program) is None:
                return (
                    f"{program} is not installed (Debian: openmpi-bin libopenmpi-dev)"
                )
        program = self._folder / f"alltoallv.{self._nodes[self._rank]}"
        built = subprocess.run(
            ["mpicc", "-O2", "-o", str(program), str(_SOURCE)],
            capture_output=True,
            text=True,
        )
        if built.returncode != 0:
            return "mpicc failed: " + " ".join(built.stderr.split()[-12:])
        program.rename(self._folder / "alltoallv")
        return None

    def run(self, cell: Cell, iterations: int) -> Measurement | None:
        """Time one block of iterations; None if there is none. Collective."""
        if not self.enabled or iterations == 0:
            return None
        outcome: list[object] = [None]
        if self._rank == 0:
            outcome = [self._start(cell, iterations)]
        else:
            self._serve()
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], str):
            self._leave_out(outcome[0])
            return None
        return outcome[0]

    def _serve(self) -> None:
        """Run the daemon of this node, if one was asked for."""
        commands: list[dict[str, str] | None] = [None]
        dist.broadcast_object_list(commands, src=0)
        command = (commands[0] or {}).get(self._hosts[self._rank])
        if self._leads and command:
            subprocess.run(
                ["/bin/sh", "-c", command], stdout=subprocess.DEVNULL, timeout=_LAUNCH_S
            )

    def _start(self, cell: Cell, iterations: int) -> Measurement | str:
        """Rank 0: run mpirun; returns the times, or what went wrong."""
        for left in self._folder.glob("*.command"):
            left.unlink()
        shell = self._folder / "remote_shell"
        shell.write_text(_REMOTE_SHELL.format(folder=shlex.quote(str(self._folder))))
        shell.chmod(0o700)
        running = self._folder / "running"
        running.touch()
        # Files, not pipes: the remote shells outlive mpirun and would keep these open.
        out, err = self._folder / "stdout", self._folder / "stderr"
        with out.open("w") as out_file, err.open("w") as err_file:
            process = subprocess.Popen(
                self._mpirun(shell, cell, iterations),
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
            )
            try:
                commands = self._await_commands(process)
                dist.broadcast_object_list([commands], src=0)
                process.wait(timeout=_LAUNCH_S)
            except subprocess.TimeoutExpired:
                return f"mpirun did not end within {_LAUNCH_S:.0f} s"
            finally:
                process.kill()
                process.wait()
                running.unlink()
        result = _read_times(out.read_text())
        return result or "mpirun failed: " + " ".join(err.read_text().split()[-40:])

    def _await_commands(self, process: subprocess.Popen) -> dict[str, str]:
        """Commands for the other nodes by host; fewer if mpirun ended early."""
        wanted = max(self._nodes)
        while True:
            ended = process.poll() is not None
            found = list(self._folder.glob("*.command"))
            if ended or len(found) == wanted:
                return {path.stem: path.read_text() for path in found}
            time.sleep(0.05)

    def _mpirun(self, shell: Path, cell: Cell, iterations: int) -> list[str]:
        options = self._options
        hosts = {
            self._hosts[self._nodes.index(node)]: self._nodes.count(node)
            for node in range(max(self._nodes) + 1)
        }
        parameters = {
            "plm_rsh_agent": shell,
            "plm_rsh_no_tree_spawn": 1,
            # It cannot see that emulated nodes share processors; where they do not,
            # yielding to nobody costs next to nothing.
            "mpi_yield_when_idle": 1,
            "pml": "ob1",
            "btl": "self,vader,tcp",
        }
        route = find_route()
        if len(hosts) > 1 and route is not None:
            parameters["oob_tcp_if_include"] = route.network
            parameters["btl_tcp_if_include"] = route.network
        numbers = [
            iterations,
            options.warmup,
            options.agg_iters,
            options.check,
            cell.row_bytes,
            cell.dtype.itemsize,
        ]
        return [
            "mpirun",
            "--allow-run-as-root",
            "--oversubscribe",
            "--leave-session-attached",  # else the daemon outlives its shell
            *("--bind-to", "none", "-np", str(len(self._nodes))),
            *("--host", ",".join(f"{host}:{n}" for host, n in hosts.items())),
            *(word for k, v in parameters.items() for word in ("--mca", k, str(v))),
            str(self._folder / "alltoallv"),
            *map(str, numbers),
            ",".join(map(str, cell.rows.flatten().tolist())),
        ]


def _version() -> str:
    text = subprocess.run(["mpirun", "--version"], capture_output=True, text=True)
    return text.stdout.splitlines()[0] if text.stdout else "unknown version"


def _read_times(text: str) -> Measurement | None:
    """Parse the program's output; None if it did not end properly."""
    result = Measurement("mpi", wrong=-1)
    for line in text.splitlines():
        kind, _, value = line.partition(" ")
        if kind == "us":
            result.times_us.append(float(value))
        elif kind == "wrong":
            result.wrong = int(value)
    return None if result.wrong < 0 else result
