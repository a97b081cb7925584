# SPDX-License-Identifier: Apache-2.0
"""Start the ranks of a run in the laboratory, or on this machine alone."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from torch_automoe.lab import (
    Lab,
    LabError,
    Loopback,
    available,
    forward_signals,
    parse_nodes,
)
from torch_automoe.train.config import TrainConfig, UsageError


def launch(
    config: TrainConfig,
    nodes: str | None,
    ranks_per_node: int | None,
    rate: str | None,
) -> int:
    """Run ``config`` on new ranks; returns the exit code of the job.

    Args:
        config: what the ranks run.
        nodes: number of nodes or ranks of each ("3,3,2"); None: two nodes where
            they can be emulated, else one.
        ranks_per_node: ranks of each node; None: four ranks in all on one node,
            two on each of several.
        rate: of each node's link ("1gbit"); None: unshaped.

    Raises:
        UsageError: an option cannot work; the message names it.
    """
    where = choose_nodes(nodes, ranks_per_node, rate)
    config.check(where.spec.world_size)
    if config.data and not Path(config.data).exists():
        raise UsageError(f"--data is {config.data}, expected a file or folder")
    if config.color == "auto":  # the ranks write into pipes and cannot see it
        colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        config = replace(config, color="always" if colored else "never")
    argv = [sys.executable, "-u", "-m", "torch_automoe.train", *config.to_argv()]
    try:
        with where:
            _say(f"{where.spec.describe()}; starting")
            for note in getattr(where, "notes", []):
                _say(note)
            with where.launch(argv, prefix=False) as job, forward_signals(job):
                return job.wait()
    except LabError as error:
        _say(str(error))
        return 1


def choose_nodes(
    nodes: str | None, ranks_per_node: int | None, rate: str | None
) -> Lab | Loopback:
    """Decide where the ranks run; arguments and errors as for ``launch``."""
    shaped = rate is not None
    can_emulate, reason = (False, "") if nodes == "1" else available(shaped)
    if not can_emulate and nodes not in (None, "1"):
        raise UsageError(f"--nodes is {nodes}, but {reason}; or use --nodes 1")
    if not can_emulate and shaped:
        reason = reason or "one node has no link"
        raise UsageError(f"--rate is {rate}, but {reason}; leave --rate out")
    try:
        if can_emulate:
            return Lab(parse_nodes(nodes or "2", ranks_per_node), rate=rate)
        if nodes is None:
            _say(f"one node only: {reason}")
        return Loopback([4 if ranks_per_node is None else ranks_per_node])
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def _say(text: str) -> None:
    print(f"automoe train: {text}", file=sys.stderr, flush=True)
