# SPDX-License-Identifier: Apache-2.0
"""What a run shows and keeps: the progress line, JSON lines, balance figures."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

BITS_PER_NAT = 1 / math.log(2)
_COLORS = {
    "step": 31,
    "loss": 32,
    "bpb": 32,
    "grad_norm": 33,
    "memory": 36,
    "tps": 34,
    "comm": 35,
    "experts": 36,
}


class RunLog:
    """Writes metrics of rank 0 to ``metrics.jsonl`` and to the terminal.

    The other ranks make one too, which does nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        enabled: bool,
        as_json: bool,
        color: str = "auto",
        first_step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.enabled = enabled
        self.as_json = as_json
        self.stream = stream or sys.stdout
        self.color = color == "always" or (color == "auto" and self.stream.isatty())
        self._last_shown = -math.inf
        self._path = run_dir / "metrics.jsonl"
        if enabled:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(_lines_before(self._path, first_step)))

    def step(self, record: dict[str, Any], *, last: bool, every: float = 2.0) -> None:
        """Keep a record of a step; show it at most every ``every`` seconds."""
        self._keep(record)
        now = time.monotonic()
        if self.enabled and (last or now - self._last_shown >= every):
            self._last_shown = now
            self.show(json.dumps(record) if self.as_json else self._line(record))

    def event(self, record: dict[str, Any], text: str) -> None:
        """Keep a record that is no step, and show its text."""
        self._keep(record)
        self.show(json.dumps(record) if self.as_json else text)

    def show(self, text: str) -> None:
        """Print on rank 0."""
        if self.enabled:
            print(text, file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """Print on rank 0 unless JSON lines were asked for."""
        if not self.as_json:
            self.show(text)

    def _keep(self, record: dict[str, Any]) -> None:
        if self.enabled:
            with self._path.open("a") as stream:
                stream.write(json.dumps(record) + "\n")

    def _line(self, record: dict[str, Any]) -> str:
        shown = {
            "step": f"{record['step']:4d}",
            "loss": f"{record['loss']:7.4f}",
            "bpb": f"{record['bpb']:6.3f}",
            "grad_norm": f"{record['grad_norm']:7.4f}",
            "memory": f"{record['memory_gib']:5.2f}GiB",
            "tps": f"{record['tps']:,.0f}".rjust(6),
            "comm": f"{record['comm_pct']:3.0f}%",
            "experts": f"{record['moe/expert_utilization_min']:.2f}-"
            f"{record['moe/expert_utilization_max']:.2f}x "
            f"cv {record['moe/cv_mean']:.2f}",
        }
        parts = []
        for name, value in shown.items():
            part = f"{name}: {value}"
            if self.color:
                part = f"\033[{_COLORS[name]}m{part}\033[0m"
            parts.append(part)
        return "  ".join(parts)


def _lines_before(path: Path, first_step: int) -> list[str]:
    """Steps of an earlier run that a resumed one does not repeat."""
    if first_step == 0 or not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [
        line for line in lines if json.loads(line).get("step", math.inf) <= first_step
    ]


def peak_memory_gib() -> float:
    """Largest resident size of this process so far (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
