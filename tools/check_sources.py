# SPDX-License-Identifier: Apache-2.0
"""Checks every source file: at most 500 lines, ASCII only, a licence line on top."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["csrc", "torch_automoe", "tests", "tools", "benchmarks", "examples"]
SUFFIXES = {".py", ".pyi", ".h", ".hpp", ".c", ".cpp", ".cu", ".cuh", ".sh"}
GENERATED = {"_build.py"}
MAX_LINES = 500
LICENCE = "SPDX-License-Identifier: Apache-2.0"


def source_files() -> Iterator[Path]:
    """Yield the files that are checked."""
    yield ROOT / "setup.py"
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.name not in GENERATED:
                yield path


def check_file(path: Path) -> list[str]:
    """Return what is wrong with one file as ``path:line: what is wrong``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    if len(lines) > MAX_LINES:
        found.append(f"{path}:{MAX_LINES}: {len(lines)} lines, at most {MAX_LINES}")
    # The second line, for a script whose first one names its interpreter.
    if lines and not any(LICENCE in line for line in lines[:2]):
        found.append(f"{path}:1: the first line is not '{LICENCE}'")
    for number, line in enumerate(lines, start=1):
        if not line.isascii():
            found.append(f"{path}:{number}: not ASCII")
    return found


def main() -> int:
    """Check all source files; print violations and return 1 where there are some."""
    files = list(source_files())
    found = [line for path in files for line in check_file(path)]
    print("\n".join(found) if found else f"source files: {len(files)} files are fine")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
