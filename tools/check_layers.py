# SPDX-License-Identifier: Apache-2.0
"""Checks that the C++ sources include only downward.

A file may include its own folder and those of a lower level; folders of one level do
not know each other. torch's headers begin above the core, and the environment is read
in one file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".hpp", ".cpp", ".cu", ".cuh", ".h"}

# Folder of csrc -> its level; "." is csrc itself, which holds bindings.cpp.
LEVELS = {
    "kernels": 0,
    "process_group/common": 1,
    "process_group/topology": 2,
    "process_group/memory": 3,
    "process_group/network": 3,
    "process_group/device": 3,
    "process_group/exchange": 4,
    "process_group": 5,
    "moe_ops": 6,
    ".": 7,
}
FIRST_LEVEL_WITH_TORCH = LEVELS["process_group"]
TORCH_HEADER = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/|(Python|pybind11)\.h")
READS_ENVIRONMENT = "process_group/common/config.cpp"

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
GETENV = re.compile(r"\b(secure_)?getenv\s*\(|\benviron\b")
COMMENT = re.compile(r"//.*$")


def check_include(folder: str, bracket: str, header: str) -> str | None:
    """Return what is wrong with one include of a file in a folder, or None."""
    if TORCH_HEADER.match(header) and LEVELS[folder] < FIRST_LEVEL_WITH_TORCH:
        return f"includes {header}: no torch in kernels and the core"
    if bracket == "<":
        return None
    target = Path(header).parent.as_posix()
    if not (ROOT / "csrc" / header).is_file():
        return f'includes "{header}", which is not a path from csrc'
    if target != folder and LEVELS.get(target, -1) >= LEVELS[folder]:
        return f"includes {header}: {target} is not below {folder}"
    return None


def check_file(path: Path, csrc: Path) -> list[str]:
    """Return the violations in one file as ``path:line: what is wrong``."""
    relative = path.relative_to(csrc)
    folder = relative.parent.as_posix()
    if folder not in LEVELS:
        return [f"{path}:1: folder {folder} has no level in tools/check_layers.py"]
    found = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        include = INCLUDE.match(text)
        wrong = check_include(folder, *include.groups()) if include else None
        code = COMMENT.sub("", text)
        if GETENV.search(code) and relative.as_posix() != READS_ENVIRONMENT:
            wrong = f"reads the environment: only csrc/{READS_ENVIRONMENT} may"
        if wrong:
            found.append(f"{path}:{number}: {wrong}")
    return found


def main() -> int:
    """Check csrc; print the violations and return 1 where there are some."""
    csrc = ROOT / "csrc"
    files = sorted(path for path in csrc.rglob("*") if path.suffix in SUFFIXES)
    found = [line for path in files for line in check_file(path, csrc)]
    print("\n".join(found) if found else f"include levels: {len(files)} files are fine")
    return 1 if found or not files else 0


if __name__ == "__main__":
    sys.exit(main())
