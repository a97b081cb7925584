# SPDX-License-Identifier: Apache-2.0
"""Ranks placed on nodes: how a job is started, whatever the nodes are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from .job import Job, Member, RankProcess
from .spec import LabSpec, hostname

# node, label, command line, environment
_Program = tuple[int, str, list[str], dict[str, str]]


class Nodes(ABC):
    """Base of Lab (namespaces) and Loopback (no namespaces).

    Attributes:
        spec: the shape.
        rank_pids: process ids of the ranks of the latest job.
    """

    def __init__(self, spec: LabSpec) -> None:
        self.spec = spec
        self.rank_pids: list[int] = []

    @property
    def master(self) -> tuple[str, int]:
        """Address and port of rank 0's store."""
        return self.spec.master

    def node_environment(self, node: int) -> dict[str, str]:
        """Variables of every program of a node."""
        return {"HOSTNAME": hostname(node)}

    @abstractmethod
    def popen(self, argv: Sequence[str], **options: object) -> RankProcess:
        """Start a program; takes node, env, cwd, stdin, stdout, stderr, kill_group."""

    def rank_environment(
        self, rank: int, env: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The environment of a rank: ``env`` (None: ours) and torchrun's contract."""
        base = os.environ if env is None else env
        rank_env = {
            name: value
            for name, value in base.items()
            if not name.startswith("TORCHELASTIC_")
        }
        rank_env.update(self.spec.rank_environment(rank))
        rank_env["MASTER_ADDR"], rank_env["MASTER_PORT"] = map(str, self.master)
        if self.spec.threads is not None:
            rank_env["OMP_NUM_THREADS"] = str(self.spec.threads)
        else:
            rank_env.setdefault("OMP_NUM_THREADS", "1")
        return rank_env

    def launch(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        torchrun: bool = False,
        **options: object,
    ) -> Job:
        """Start one process of ``argv`` per rank, with torchrun's environment.

        Args:
            argv: the program of a rank; with ``torchrun``, what follows torchrun's own
                options: a script, ``-m module`` or ``--no-python program``.
            torchrun: start one torchrun per node, which starts the ranks.
            options: on_line, on_event, grace and linger of Job.

        Returns:
            the running job: its ``wait()`` forwards the output and gives the exit code.
        """
        processes: list[RankProcess] = []
        members: list[Member] = []
        programs = self._torchrun_programs if torchrun else self._rank_programs
        try:
            for node, label, command, program_env in programs(argv, env):
                process = self.popen(
                    command,
                    node=node,
                    env=program_env,
                    cwd=cwd,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    kill_group=True,
                )
                processes.append(process)
                members.append(Member(len(members), node, label, process))
        except BaseException:
            for process in processes:
                process.signal_group(signal.SIGKILL)
                process.close()
            raise
        self.rank_pids = [] if torchrun else [process.pid for process in processes]
        return Job(members, **options)

    def run(self, argv: Sequence[str], **options: object) -> int:
        """Launch a job and wait for its end; options as for ``launch``.

        Returns:
            0, or the code of the rank that failed first (128 + n for signal n).
        """
        with self.launch(argv, **options) as job:
            return job.wait()

    def _rank_programs(
        self, argv: Sequence[str], env: Mapping[str, str] | None
    ) -> Iterator[_Program]:
        for rank, node in enumerate(self.spec.node_of_rank):
            label = f"{hostname(node)} rank{rank}"
            yield node, label, list(argv), self.rank_environment(rank, env)

    def _torchrun_programs(
        self, argv: Sequence[str], env: Mapping[str, str] | None
    ) -> Iterator[_Program]:
        if self.spec.placement != "block":
            raise ValueError(
                f"placement: got {self.spec.placement!r}, but torchrun numbers its "
                f"ranks node by node; use block"
            )
        master_addr, master_port = self.master
        agent_env = dict(os.environ if env is None else env)
        if self.spec.threads is not None:
            agent_env["OMP_NUM_THREADS"] = str(self.spec.threads)
        for node, count in enumerate(self.spec.ranks_per_node):
            agent = [sys.executable, "-m", "torch.distributed.run"]
            agent += [f"--nnodes={self.spec.num_nodes}", f"--node-rank={node}"]
            agent += [f"--nproc-per-node={count}", f"--master-addr={master_addr}"]
            agent += [f"--master-port={master_port}", *argv]
            yield node, hostname(node), agent, agent_env
