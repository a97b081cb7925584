# SPDX-License-Identifier: Apache-2.0
"""The README's script before and after: the diff is true, the losses are equal."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BEFORE = ROOT / "examples" / "train_fsdp2.py"
AFTER = ROOT / "examples" / "train_expert_parallel.py"


def run(script: Path) -> list[float]:
    """Losses that a script prints on four ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "4", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]


def test_readme_shows_the_difference_of_the_examples():
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"```diff\n(.*?)\n```", readme, re.DOTALL).group(1).splitlines()
    before, after = (path.read_text().splitlines() for path in (BEFORE, AFTER))
    lines = list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:]
    true = ["@@" if line.startswith("@@") else line for line in lines]
    assert shown == true


def test_examples_lose_alike():
    pytest.importorskip("transformers", reason="the examples train one of its models")
    before, after = run(BEFORE), run(AFTER)
    assert len(before) == 10
    assert after == pytest.approx(before, abs=1e-5)
