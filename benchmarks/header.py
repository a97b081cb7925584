# SPDX-License-Identifier: Apache-2.0
"""What a benchmark prints of a run: machine, versions, ranks, command line, notes."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections import Counter
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist


class Output:
    """Prints on rank 0, and keeps the notes for the report."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._speaks = dist.get_rank() == 0

    def line(self, text: str) -> None:
        """Print one line of the run."""
        if self._speaks:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """Print a comment line, once, which also goes into the report."""
        if text not in self.notes:
            self.notes.append(text)
            self.line(f"# {text}")


def date() -> str:
    """Date and time of now, to the minute."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def machine() -> str:
    """Processor, processors to run on, memory and kernel; no names or paths."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processors = len(os.sched_getaffinity(0))
    release = ".".join(platform.release().split(".")[:2])
    system = f"{platform.system()} {release}"
    return f"{model}, {processors} processors, {memory:.0f} GiB, {system}"


def versions() -> str:
    """Versions of Python, torch, and what is installed of this package and UCX."""
    parts = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("torch_automoe", "libucx-cu13"):
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def shape(node_of_rank: list[int]) -> str:
    """E.g. ``8 ranks on 3 nodes (3, 3, 2)``."""
    sizes = list(Counter(node_of_rank).values())
    if len(sizes) == 1:
        return f"{len(node_of_rank)} ranks on 1 node"
    each = f"{sizes[0]} each" if len(set(sizes)) == 1 else ", ".join(map(str, sizes))
    return f"{len(node_of_rank)} ranks on {len(sizes)} nodes ({each})"


def command(program: str, launch: str | None, node_of_rank: list[int]) -> str:
    """The command line, with file names but not the folders of this machine.

    ``launch`` is what stands before the program, ``--launch`` of its options; None:
    torchrun, where that started it.
    """
    size, nodes = len(node_of_rank), max(node_of_rank) + 1
    if launch is None and "TORCHELASTIC_RUN_ID" in os.environ:
        launch = f"torchrun --nnodes {nodes} --nproc-per-node {-(-size // nodes)}"
    words = [launch] if launch else []
    words.append(f"benchmarks/{program}")
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument == "--launch":
            next(arguments)
        elif not argument.startswith("--launch="):
            option, equals, value = argument.rpartition("=")
            words.append(shlex.quote(option + equals + Path(value).name))
    return " ".join(words)


def append_section(
    path: str,
    title: str,
    header: dict[str, object],
    notes: list[str],
    columns: list[str],
    cells: list[list[str]],
    footer: list[str],
) -> None:
    """Append one section to a Markdown report; a new file begins with a title."""
    file = Path(path)
    lines = []
    if not file.exists():
        lines += [f"# {title}", "", "Columns: ../README.md", ""]
    lines += [f"## {header['date']}, {header['shape']}", ""]
    lines += ["```", str(header["command"]), "```", ""]
    skipped = ("date", "shape", "command")
    lines += [
        f"- {key}: {value}"
        for key, value in header.items()
        if key not in skipped and value is not None
    ]
    lines += [f"- {note}" for note in notes]
    lines += ["", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    lines += ["", *(line.lstrip("# ") + "  " for line in footer), "", ""]
    with file.open("a") as report:
        report.write("\n".join(lines))
