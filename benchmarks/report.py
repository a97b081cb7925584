# SPDX-License-Identifier: Apache-2.0
"""Rows of the table and what is written from them: text, JSON, Markdown, a plot."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from exchange import Measurement
from header import append_section
from routing import Cell


@dataclass
class Row:
    """One contender on one cell. Bytes, microseconds, GB/s of 1e9 bytes; formulas in
    README.md. None where there is nothing to say: one node, no line rate, no peer."""

    size_bytes: int
    count: int
    dtype: str
    backend: str
    median_us: float
    p99_us: float
    algbw_gbps: float
    busbw_gbps: float
    wrong: int
    time_ratio: float | None = None
    tx_bytes: int | None = None
    leaving_bytes: int | None = None
    line_share: float | None = None
    tx_bytes_per_node: list[int] | None = None
    leaving_bytes_per_node: list[int] | None = None
    times_us: list[float] = field(default_factory=list)


def percentile(values: list[float], percent: float) -> float:
    """Nearest-rank percentile: p99 of fewer than 100 values is the largest."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def make_rows(
    cell: Cell,
    results: list[Measurement],
    node_of_rank: list[int],
    line_rate: float | None,
) -> list[Row]:
    """Rows of one cell; the first result is the one that times are compared with.

    ``line_rate`` in MB/s per node, each way.
    """
    first = statistics.median(results[0].times_us)
    rows = []
    for result in results:
        row = _make_row(cell, result, node_of_rank, line_rate)
        if len(results) > 1:
            row.time_ratio = row.median_us / first
        rows.append(row)
    return rows


def _make_row(
    cell: Cell, result: Measurement, node_of_rank: list[int], line_rate: float | None
) -> Row:
    size, world_size = cell.size_bytes, len(node_of_rank)
    median = statistics.median(result.times_us)
    row = Row(
        size_bytes=size,
        count=size // cell.dtype.itemsize,
        dtype=str(cell.dtype).removeprefix("torch."),
        backend=result.backend,
        median_us=median,
        p99_us=percentile(result.times_us, 99),
        algbw_gbps=size / median / 1e3,
        busbw_gbps=size / median / 1e3 * (world_size - 1) / world_size,
        wrong=result.wrong,
        times_us=result.times_us,
    )
    egress, ingress = cell.leaving_bytes(node_of_rank)
    if len(egress) > 1:
        row.leaving_bytes, row.leaving_bytes_per_node = sum(egress), egress
        if line_rate is not None:
            row.line_share = max(egress + ingress) / median / line_rate
    if result.tx_bytes is not None:
        row.tx_bytes_per_node = [round(sent) for sent in result.tx_bytes]
        row.tx_bytes = sum(row.tx_bytes_per_node)
    return row


# Column: two header lines, width, field of Row, format.
_COLUMNS = (
    ("size", "(B)", 12, "size_bytes", "d"),
    ("count", "(elements)", 11, "count", "d"),
    ("type", "", 14, "dtype", "s"),
    ("backend", "", 9, "backend", "s"),
    ("time p50", "(us)", 11, "median_us", ".1f"),
    ("time p99", "(us)", 11, "p99_us", ".1f"),
    ("algbw", "(GB/s)", 8, "algbw_gbps", ".4f"),
    ("busbw", "(GB/s)", 8, "busbw_gbps", ".4f"),
    ("#wrong", "", 7, "wrong", "d"),
    ("ratio", "(time)", 7, "time_ratio", ".2f"),
    ("nodes sent", "(B/call)", 13, "tx_bytes", "d"),
    ("must leave", "(B/call)", 13, "leaving_bytes", "d"),
    ("line", "(share)", 8, "line_share", ".3f"),
)


def _cells(row: Row) -> list[str]:
    values = [(getattr(row, name), spec) for _, _, _, name, spec in _COLUMNS]
    return ["-" if value is None else format(value, spec) for value, spec in values]


def table_header() -> list[str]:
    """The two header lines of the text table, which start with #."""
    lines = []
    for index in (0, 1):
        text = " ".join(f"{column[index]:>{column[2]}}" for column in _COLUMNS)
        lines.append("#" + text[1:])
    return lines


def table_line(row: Row) -> str:
    """One line of the text table."""
    return " ".join(
        f"{text:>{column[2]}}"
        for text, column in zip(_cells(row), _COLUMNS, strict=True)
    )


def mean_busbw(rows: list[Row]) -> dict[str, float]:
    """Mean bus bandwidth over the rows of each backend, in GB/s."""
    by_backend: dict[str, list[float]] = {}
    for row in rows:
        by_backend.setdefault(row.backend, []).append(row.busbw_gbps)
    return {name: statistics.fmean(values) for name, values in by_backend.items()}


def footer(rows: list[Row]) -> list[str]:
    """nccl-tests' two last lines: values out of bounds, mean bus bandwidth."""
    wrong = sum(row.wrong for row in rows)
    means = ", ".join(f"{name} {gbps:.4f}" for name, gbps in mean_busbw(rows).items())
    return [
        f"# Out of bounds values : {wrong} {'OK' if wrong == 0 else 'FAILED'}",
        f"# Avg bus bandwidth    : {means} (GB/s)",
    ]


def write_json(path: str, header: dict[str, object], rows: list[Row]) -> None:
    """Write header, rows with every time, and the sums of the footer."""
    document = {
        "benchmark": "all_to_all",
        "header": header,
        "rows": [asdict(row) for row in rows],
        "out_of_bounds_values": sum(row.wrong for row in rows),
        "mean_busbw_gbps": mean_busbw(rows),
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n")


def append_markdown(
    path: str, header: dict[str, object], notes: list[str], rows: list[Row]
) -> None:
    """Append one section to a report."""
    append_section(
        path,
        "all_to_all_bench",
        header,
        notes,
        [f"{first} {second}".strip() for first, second, *_ in _COLUMNS],
        [_cells(row) for row in rows],
        footer(rows),
    )


def write_plot(path: str, rows: list[Row], title: str) -> str | None:
    """Draw median time (and p99) and bus bandwidth over size.

    Returns why there is no plot if matplotlib is not installed, else None.
    """
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axes, busbw_axes) = plt.subplots(1, 2, figsize=(11, 4.5))
    for label in dict.fromkeys((row.backend, row.dtype) for row in rows):
        own = [row for row in rows if (row.backend, row.dtype) == label]
        own.sort(key=lambda row: row.size_bytes)
        sizes = [row.size_bytes for row in own]
        (line,) = time_axes.plot(
            sizes, [row.median_us for row in own], "o-", label=" ".join(label)
        )
        time_axes.plot(sizes, [row.p99_us for row in own], ":", color=line.get_color())
        busbw_axes.plot(sizes, [row.busbw_gbps for row in own], "o-")
    for axes, unit in (
        (time_axes, "time (us), dotted p99"),
        (busbw_axes, "busbw (GB/s)"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="bytes per rank", ylabel=unit)
        axes.grid(True, which="both", alpha=0.3)
    time_axes.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return None
