# SPDX-License-Identifier: Apache-2.0
"""Rows of kernels_bench.py, and what is written from them: text and JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path

from kernels_figures import Figure
from kernels_row import Row
from report import percentile


def make_row(
    part: str,
    job: str,
    contender: str,
    hidden: int,
    moved: int | None,
    times_us: list[float],
    **more: object,
) -> Row:
    """Make a row from the times of one contender."""
    median = statistics.median(times_us)
    gbps = moved / median / 1e3 if moved else None
    p99 = percentile(times_us, 99)
    return Row(
        part, job, contender, hidden, moved, median, p99, gbps,
        times_us=times_us, **more,
    )  # fmt: skip


# Column: two header lines, width, field of Row, format.
_COLUMNS = (
    ("part", "", 9, "part", "s"),
    ("job", "", 11, "job", "s"),
    ("contender", "", 24, "contender", "s"),
    ("ranks", "", 5, "ranks", "d"),
    ("nodes", "", 5, "nodes", "d"),
    ("H", "", 6, "hidden", "d"),
    ("bytes", "(B)", 12, "bytes", "d"),
    ("time p50", "(us)", 11, "median_us", ".1f"),
    ("time p99", "(us)", 11, "p99_us", ".1f"),
    ("rate", "(GB/s)", 9, "gbps", ".2f"),
    ("of copy", "(share)", 8, "of_copy", ".3f"),
    ("ratio", "", 7, "ratio", ".3f"),
    ("#wrong", "", 7, "wrong", "d"),
)


def table_header() -> list[str]:
    """The two header lines of the table, which start with #."""
    lines = []
    for index in (0, 1):
        text = " ".join(f"{column[index]:<{column[2]}}" for column in _COLUMNS)
        lines.append("# " + text.rstrip())
    return lines


def table_line(row: Row) -> str:
    """One line of the table."""
    cells = []
    for _, _, width, name, spec in _COLUMNS:
        value = getattr(row, name)
        text = "-" if value is None else format(value, spec)
        cells.append(f"{text:<{width}}")
    return "  " + " ".join(cells).rstrip()


def footer(rows: list[Row]) -> str:
    """Whether all results were right."""
    wrong = sum(row.wrong for row in rows)
    return f"# Wrong elements: {wrong} {'OK' if wrong == 0 else 'FAILED'}"


def write_json(
    path: str,
    header: dict[str, object],
    rows: list[Row],
    figures: list[Figure],
    not_measured: list[str],
) -> None:
    """Write header, rows with every time, figures, and what was not measured."""
    document = {
        "benchmark": "kernels",
        "header": header,
        "rows": [asdict(row) for row in rows],
        "figures": [asdict(figure) for figure in figures],
        "not_measured": not_measured,
        "wrong": sum(row.wrong for row in rows),
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
