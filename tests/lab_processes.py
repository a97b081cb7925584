# SPDX-License-Identifier: Apache-2.0
"""What the tests of the laboratory share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from torch_automoe.lab import available

PYTHON = [sys.executable, "-S", "-c"]
_ROOT = str(Path(__file__).resolve().parents[1])
ENVIRONMENT = {**os.environ, "PYTHONPATH": _ROOT}

needs_lab = pytest.mark.skipif(
    not available()[0], reason=f"nodes cannot be emulated: {available()[1]}"
)


def processes_with(mark: str) -> list[int]:
    """Pids of all processes whose command line holds a mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def descendants(pid: int) -> set[tuple[int, str]]:
    """(pid, start time) of every process below one: names no later process shares."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(entry.name)] = (int(fields[1]), fields[19])
    found: set[tuple[int, str]] = set()
    level = {pid}
    while level:
        level = {child for child, (parent, _) in parents.items() if parent in level}
        found |= {(child, parents[child][1]) for child in level}
    return found


def alive(processes: set[tuple[int, str]]) -> set[tuple[int, str]]:
    """Those of ``processes`` that still exist."""
    found = set()
    for pid, start in processes:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[19] == start:
            found.add((pid, start))
    return found


def await_condition(condition: Callable[[], object], what: str) -> None:
    """Wait for something that must come soon; AssertionError after 30 s."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"not reached in 30 s: {what}"
        time.sleep(0.02)


def lab_command(*arguments: str) -> list[str]:
    """The command line of ``automoe lab``."""
    return [sys.executable, "-m", "torch_automoe.lab", *arguments]


def run_cli(*arguments: str, before: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Run ``automoe lab``; returns exit code, stdout and stderr."""
    done = subprocess.run(
        [*before, *lab_command(*arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr
