# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training steps: all contenders train the same model alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_all_contenders_lose_alike(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the model is one of its")
    sizes = "--layers 1 --hidden 64 --expert-dim 16 --experts 6 --topk 2 --vocab 32"
    files = ["--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "a.md")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = str(ROOT / "benchmarks" / "train_step_bench.py")
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", program, *sizes.split()]
        + ["--seq-len", "16", "-n", "2", "-w", "1", *files],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    losses = {row["contender"]: row["loss"] for row in rows}
    own = losses.pop("automoe")
    assert losses.pop("no_exchange") != own
    assert set(losses) == {"transformers", "stock"}
    for loss in losses.values():
        assert loss == pytest.approx(own, abs=2e-4)
    assert "| automoe |" in (tmp_path / "a.md").read_text()
