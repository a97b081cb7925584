# SPDX-License-Identifier: Apache-2.0
"""Rows of the dispatch/combine table, and what follows from them."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from header import append_section
from moe_cell import MoeCell
from moe_measure import PHASES, Measurement
from report import percentile

_MEGA = 1e6
_SAME = 0.97  # a lower ratio of times counts as slower


@dataclass
class Row:
    """One contender on one cell: milliseconds, bytes of one call there and back.

    Formulas are in README.md. None where there is nothing to say: one node, no line
    rate, no counters, no other contender.
    """

    cell: str
    tokens: int
    hidden: int
    topk: int
    experts: int
    routing: str
    dtype: str
    contender: str
    median_ms: float
    p99_ms: float
    plan_ms: float
    dispatch_ms: float
    combine_ms: float
    wrong: int
    time_ratio: float | None = None
    limit_ms: float | None = None
    limit_share: float | None = None
    tx_bytes: int | None = None
    bound_bytes: int | None = None
    tx_ratio: float | None = None
    payload_bytes: int | None = None
    payload_ratio: float | None = None
    tx_bytes_per_node: list[int] | None = None
    counters: dict[str, float] = field(default_factory=dict)
    total_ms: list[float] = field(default_factory=list)
    phases_ms: dict[str, list[float]] = field(default_factory=dict)


def make_rows(
    cell: MoeCell,
    results: list[Measurement],
    node_of_rank: list[int],
    line_rate: float | None,
) -> list[Row]:
    """Rows of one cell; the first result is the one that times are compared with.

    ``line_rate`` in MB/s per node, each way.
    """
    rows = [_make_row(cell, result, node_of_rank, line_rate) for result in results]
    if len(rows) > 1:
        for row in rows:
            row.time_ratio = row.median_ms / rows[0].median_ms
    return rows


def _make_row(
    cell: MoeCell, result: Measurement, node_of_rank: list[int], line_rate: float | None
) -> Row:
    medians = {p: statistics.median(result.phases_ms[p]) for p in PHASES}
    row = Row(
        cell=cell.describe(),
        tokens=max(cell.tokens_of_rank),
        hidden=cell.hidden,
        topk=cell.topk,
        experts=cell.experts,
        routing=cell.routing,
        dtype=str(cell.dtype).removeprefix("torch."),
        contender=result.contender,
        median_ms=statistics.median(result.total_ms),
        p99_ms=percentile(result.total_ms, 99),
        plan_ms=medians["plan"],
        dispatch_ms=medians["dispatch"],
        combine_ms=medians["combine"],
        wrong=result.wrong,
        counters=result.counters,
        total_ms=result.total_ms,
        phases_ms=result.phases_ms,
    )
    if max(node_of_rank) > 0:
        row.bound_bytes = cell.bound_bytes(node_of_rank)
        if line_rate is not None:
            row.limit_ms = cell.busiest_bytes(node_of_rank) / line_rate / 1e3
            row.limit_share = row.limit_ms / row.median_ms
    if result.tx_bytes is not None:
        row.tx_bytes_per_node = [round(sent) for sent in result.tx_bytes]
        row.tx_bytes = sum(row.tx_bytes_per_node)
    if "network_payload_bytes" in result.counters:
        row.payload_bytes = round(result.counters["network_payload_bytes"])
    if row.bound_bytes:
        if row.tx_bytes is not None:
            row.tx_ratio = row.tx_bytes / row.bound_bytes
        if row.payload_bytes is not None:
            row.payload_ratio = row.payload_bytes / row.bound_bytes
    return row


# Column: two header lines, width, field of Row, format, divisor.
_COLUMNS = (
    ("T", "", 6, "tokens", "d", None),
    ("H", "", 5, "hidden", "d", None),
    ("K", "", 3, "topk", "d", None),
    ("routing", "", 11, "routing", "s", None),
    ("type", "", 8, "dtype", "s", None),
    ("contender", "", 10, "contender", "s", None),
    ("time p50", "(ms)", 9, "median_ms", ".2f", None),
    ("time p99", "(ms)", 9, "p99_ms", ".2f", None),
    ("plan", "(ms)", 7, "plan_ms", ".2f", None),
    ("dispatch", "(ms)", 9, "dispatch_ms", ".2f", None),
    ("combine", "(ms)", 9, "combine_ms", ".2f", None),
    ("#wrong", "", 7, "wrong", "d", None),
    ("ratio", "(time)", 7, "time_ratio", ".2f", None),
    ("limit", "(ms)", 8, "limit_ms", ".2f", None),
    ("of limit", "(share)", 8, "limit_share", ".3f", None),
    ("nodes sent", "(MB/call)", 10, "tx_bytes", ".3f", _MEGA),
    ("bound", "(MB/call)", 9, "bound_bytes", ".3f", _MEGA),
    ("sent", "/bound", 7, "tx_ratio", ".3f", None),
    ("payload", "/bound", 8, "payload_ratio", ".4f", None),
)


def _fields(row: Row) -> list[str]:
    texts = []
    for _, _, _, name, spec, divisor in _COLUMNS:
        value = getattr(row, name)
        if value is not None and divisor is not None:
            value /= divisor
        texts.append("-" if value is None else format(value, spec))
    return texts


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
        for text, column in zip(_fields(row), _COLUMNS, strict=True)
    )


def by_cell(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Rows by cell, then by contender."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row.cell, {})[row.contender] = row
    return cells


def level0_lines(rows: list[Row]) -> list[str]:
    """How the same code does on the backend automoe: gloo's time over its own.

    Above 1 automoe is faster. One line per phase: over all cells the least, with its
    cell, the median and the largest.
    """
    pairs = {
        cell: (contenders["expanded"], contenders["level0"])
        for cell, contenders in by_cell(rows).items()
        if {"expanded", "level0"} <= contenders.keys()
    }
    if not pairs:
        return []
    lines = []
    for name, attribute in (
        ("dispatch", "dispatch_ms"),
        ("combine", "combine_ms"),
        ("plan, dispatch and combine", "median_ms"),
    ):
        speedup = {
            cell: getattr(gloo, attribute) / getattr(ours, attribute)
            for cell, (gloo, ours) in pairs.items()
        }
        least = min(speedup, key=speedup.__getitem__)
        line = f"expanded / level0, {name}: least {speedup[least]:.3f} ({least})"
        if len(speedup) > 1:
            line += (
                f", median {statistics.median(speedup.values()):.3f}, "
                f"largest {max(speedup.values()):.3f}, "
                f"{sum(value < _SAME for value in speedup.values())} of "
                f"{len(speedup)} cells below {_SAME}"
            )
        lines.append(line)
    return lines


def skew_lines(rows: list[Row]) -> list[str]:
    """How much more than its limit the time grows from uniform to skewed routing.

    t(zipf) / t(uniform) over the same ratio of the limits: 1 if a contender suffers
    from skew only as much as no exchange could avoid.
    """

    def key(row: Row) -> tuple:
        return row.tokens, row.hidden, row.topk, row.dtype, row.contender

    uniform = {key(row): row for row in rows if row.routing == "uniform"}
    lines = []
    for row in rows:
        even = uniform.get(key(row))
        if row is even or even is None or not even.limit_ms or not row.limit_ms:
            continue
        times = row.median_ms / even.median_ms
        limits = row.limit_ms / even.limit_ms
        lines.append(
            f"{row.routing} / uniform, {row.contender} ({row.cell}): time "
            f"{times:.3f}, limit {limits:.3f}, skew factor {times / limits:.3f}"
        )
    return lines


def footer(rows: list[Row]) -> list[str]:
    """Lines under the table: comparisons between rows, and the wrong values."""
    wrong = sum(row.wrong for row in rows)
    lines = [*level0_lines(rows), *skew_lines(rows)]
    lines.append(f"Out of bounds values : {wrong} {'OK' if wrong == 0 else 'FAILED'}")
    return [f"# {line}" for line in lines]


def write_json(path: str, header: dict[str, object], rows: list[Row]) -> None:
    """Write header, rows with every time, and the lines of the footer."""
    document = {
        "benchmark": "dispatch_combine",
        "header": header,
        "rows": [asdict(row) for row in rows],
        "out_of_bounds_values": sum(row.wrong for row in rows),
        "footer": [line.removeprefix("# ") for line in footer(rows)],
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n")


def append_markdown(
    path: str, header: dict[str, object], notes: list[str], rows: list[Row]
) -> None:
    """Append one section to a report."""
    append_section(
        path,
        "dispatch_combine_bench",
        header,
        notes,
        [f"{column[0]} {column[1]}".strip() for column in _COLUMNS],
        [_fields(row) for row in rows],
        footer(rows),
    )
