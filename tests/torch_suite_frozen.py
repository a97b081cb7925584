# SPDX-License-Identifier: Apache-2.0
"""Runs torch_suite.py in a process of its own, and knows the frozen lists.

    python tests/torch_suite_frozen.py    # freeze what the installed torch runs

A list, torch_suite_lists/<minor>.json, says of each world size which tests of the
suite are executed, and why each of the others is skipped.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import torch_suite

LISTS = Path(__file__).parent / "torch_suite_lists"
WORLD_SIZES = (2, 3, 4, 8)
# Test -> what its failure must say, and why it cannot pass here.
EXPECTED_FAILURES = {
    "test_ddp_logging_data_cpu": (
        "'custom' != 'automoe'",
        "the logger of DDP calls every backend that is not torch's own 'custom'",
    ),
}
# Keys of a list that say which tests run.
_TESTS = ("count", "executed", "skipped")
# To import torch and the suite, and beyond its own limit for a test.
_PATIENCE = 300.0
_LAST_WORDS = 10.0
_LOG_TAIL = 8000


def problem(result: dict, world_size: int) -> str:
    """Return what is wrong with a test's result; "": it did as it must.

    Args:
        result: as torch_suite.Recorder writes it.
    """
    outcome, text = result["outcome"], result["text"]
    if outcome not in ("passed", "failed"):
        return f"{outcome}, expected to run: {text}"
    if result["groups"] < world_size:
        return f"its ranks made {result['groups']} groups of our backend\n{text}"
    expected, _ = EXPECTED_FAILURES.get(result["test"], ("", ""))
    if expected and outcome == "passed":
        return f"passed, expected to fail with {expected!r}"
    if expected and expected not in text:
        return f"expected to fail with {expected!r}\n{text}"
    return text if outcome == "failed" and not expected else ""


@dataclass
class SuiteRunner:
    """Runs tests of the suite at one world size, one after the other.

    The process starts when it is needed first, and anew after it was lost.

    Attributes:
        substitutions: text of a gate -> how often it was widened; after the start.
    """

    world_size: int
    substitutions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="automoe-suite-")
        self._log = Path(self._folder.name, "log")
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> SuiteRunner:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()
        self._folder.cleanup()

    def run(self, test: str) -> dict:
        """Run one test; return its result, as torch_suite.Recorder writes it.

        Raises:
            AssertionError: the process died or did not answer; with its last words.
        """
        begin = self._log.stat().st_size if self._log.exists() else 0
        result = self._ask(test, _PATIENCE + torch_suite.TEST_SECONDS)
        if result["outcome"] == "failed" and not torch_suite.raised(result["text"]):
            # Of ranks that hang it has where they stand.
            result["text"] += self._said(begin)
        return result

    def list(self) -> dict[str, str]:
        """Test -> why it is skipped, "" where it is executed."""
        return {
            line["test"]: generic(line["text"])
            for line in self._ask(torch_suite.LIST, _PATIENCE)
        }

    def _ask(self, request: str, seconds: float) -> object:
        if self._process is None:
            self._start()
        self._process.stdin.write(f"{request}\n".encode())
        self._process.stdin.flush()
        return self._answer(seconds)

    def _answer(self, seconds: float) -> object:
        """Wait for a line of JSON."""
        deadline = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._answers], [], [], left)
            part = os.read(self._answers, 1 << 16) if ready else b""
            if not part:
                self._lost("has gone" if ready else f"gave no answer in {seconds:g} s")
            line += part
        return json.loads(line)

    def _lost(self, what: str) -> NoReturn:
        # One that ends closes its pipe first, and then says why.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS)
        said = self._said(0)
        self._stop()
        raise AssertionError(f"the process of the suite {what}\n{said}")

    def _said(self, begin: int) -> str:
        return self._log.read_bytes()[begin:].decode(errors="replace")[-_LOG_TAIL:]

    def _start(self) -> None:
        self._answers, answers = os.pipe()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, torch_suite.__file__, str(self.world_size)]
                + ["--serve", str(answers)],
                env=torch_suite.environment(self.world_size),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[answers],
            )
        os.close(answers)
        self.substitutions = self._answer(_PATIENCE)

    def _stop(self) -> None:
        if self._process is None:
            return
        # Its ranks die with it.
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        os.close(self._answers)
        self._process = None


# ---- the lists ----


def generic(reason: str) -> str:
    """Return why a test is skipped without the number of GPUs: often world size."""
    return re.sub(r"\d+ CUDA devices?", "N CUDA devices", reason)


def torch_minor() -> str:
    """The installed torch's version without its last number."""
    return ".".join(torch.__version__.split(".")[:2])


def load_frozen(minor: str) -> dict | None:
    """Read the list of a minor version of torch; None: there is none."""
    path = LISTS / f"{minor}.json"
    if not path.exists():
        return None
    frozen = json.loads(path.read_text())
    if "tests_of" in frozen:
        frozen = {**load_frozen(frozen["tests_of"]), **frozen}
    return frozen


def newest_frozen() -> dict:
    """Read the list of the newest torch that has one."""
    minors = [path.stem for path in LISTS.glob("*.json")]
    return load_frozen(max(minors, key=lambda minor: [*map(int, minor.split("."))]))


def save_frozen(minor: str, frozen: dict) -> None:
    """Write it; where another minor version has the same tests, refer to that."""
    for path in sorted(LISTS.glob("*.json")):
        other = load_frozen(path.stem)
        if path.stem != minor and all(other[key] == frozen[key] for key in _TESTS):
            frozen = {
                "tests_of": path.stem,
                "substitutions": frozen["substitutions"],
            }
            break
    (LISTS / f"{minor}.json").write_text(json.dumps(frozen, indent=1) + "\n")


def frozen_reasons(frozen: dict, world_size: int) -> dict[str, str]:
    """What SuiteRunner.list gave when the list was frozen."""
    reasons = {}
    for group in [*frozen["executed"], *frozen["skipped"]]:
        if str(world_size) in group["world_sizes"].split():
            reasons |= dict.fromkeys(group["tests"], group.get("reason", ""))
    return reasons


def freeze(reasons: dict[int, dict[str, str]], substitutions: dict[str, int]) -> dict:
    """Make a list; tests that differ nowhere share a group.

    Args:
        reasons: world size -> what SuiteRunner.list gives.
    """
    sizes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for world_size, tests in reasons.items():
        for name, reason in tests.items():
            sizes[name, reason].append(world_size)
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (name, reason), where in sizes.items():
        groups[reason, tuple(where)].append(name)
    frozen: dict = {
        "substitutions": substitutions,
        "count": {
            str(world_size): list(tests.values()).count("")
            for world_size, tests in reasons.items()
        },
        "executed": [],
        "skipped": [],
    }
    for (reason, where), names in sorted(groups.items()):
        group = {"world_sizes": " ".join(map(str, where)), "tests": sorted(names)}
        if reason:
            frozen["skipped"].append({"reason": reason, **group})
        else:
            frozen["executed"].append(group)
    return frozen


def main() -> None:
    """Write the installed torch's list."""
    reasons = {}
    for world_size in WORLD_SIZES:
        with SuiteRunner(world_size) as runner:
            reasons[world_size] = runner.list()
    frozen = freeze(reasons, runner.substitutions)
    save_frozen(torch_minor(), frozen)
    print(f"torch {torch_minor()}: {frozen['count']}")


if __name__ == "__main__":
    main()
