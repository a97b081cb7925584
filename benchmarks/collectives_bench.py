#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time every c10d collective of a backend beside peers: one run, in turn.

Run it under torchrun or in the laboratory; ``--help`` shows the options and examples,
README.md the columns.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import header as run_header
import torch
import torch.distributed as dist
from counters import InterfaceCounter, node_of_ranks
from exchange import Contender, Measurement, make_contenders, reduce_over_ranks
from header import Output
from operations import (
    OF_FSDP,
    OPERATIONS,
    WITHOUT_SIZE,
    Case,
    least_leaving_bytes,
    make_case,
)
from options import OneVoiceParser, at_least, byte_count, byte_counts, names
from report import percentile

_SLOWER = 0.95  # a lower ratio of times counts as slower than that peer
_EPILOG = """\
examples:
  torchrun --nproc-per-node 8 benchmarks/collectives_bench.py
  automoe lab --nodes 4 --ranks-per-node 2 --rate 1gbit -- \\
      benchmarks/collectives_bench.py --json cells.json --report cells.md

Columns: benchmarks/README.md. The exit status is 1 if a value was wrong.
"""


@dataclass
class Row:
    """One contender on one operation and size: bytes, microseconds.

    ``median_us`` None: the backend refuses the operation. The rest is None where there
    is nothing to say: one node, no peer.
    """

    operation: str
    size_bytes: int
    backend: str
    median_us: float | None = None
    p99_us: float | None = None
    wrong: int | None = None
    time_ratio: float | None = None
    tx_bytes: int | None = None
    leaving_bytes: int | None = None
    tx_ratio: float | None = None
    refused: str | None = None
    tx_bytes_per_node: list[int] | None = None
    times_us: list[float] = field(default_factory=list)


# Column: name, width, field of Row, format.
_COLUMNS = (
    ("operation", 22, "operation", "s"),
    ("size (B)", 9, "size_bytes", "d"),
    ("backend", 9, "backend", "s"),
    ("p50 (us)", 10, "median_us", ".1f"),
    ("p99 (us)", 10, "p99_us", ".1f"),
    ("#wrong", 6, "wrong", "d"),
    ("ratio", 6, "time_ratio", ".2f"),
    ("sent (B/call)", 13, "tx_bytes", "d"),
    ("must leave", 11, "leaving_bytes", "d"),
    ("sent/must", 9, "tx_ratio", ".3f"),
)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; only rank 0 prints."""
    parser = OneVoiceParser(
        description="Time every c10d collective of a backend beside peers in one run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", default="automoe", help="the one under test")
    parser.add_argument(
        "--against", type=names, default=["gloo"], help="peers (default gloo)"
    )
    parser.add_argument(
        "--operations",
        type=names,
        default=list(OPERATIONS),
        help=f"some of {', '.join(OPERATIONS)}",
    )
    parser.add_argument(
        "--sizes",
        type=byte_counts,
        default=byte_counts("1K,64K,1M"),
        help="bytes of the larger of a rank's input and output (default 1K,64K,1M)",
    )
    parser.add_argument(
        "--fsdp-size",
        type=byte_count,
        default=byte_count("16M"),
        help=f"one more size of {' and '.join(OF_FSDP)} between nodes (default 16M)",
    )
    for flag, least, default, text in (
        ("-n", 1, 20, "timed iterations of each contender"),
        ("-w", 1, 3, "iterations before"),
        ("-m", 1, 5, "calls in an iteration, one after the other; 1 above 64 kB"),
        ("--timeout", 1, 120, "seconds for one call"),
    ):
        parser.add_argument(
            flag,
            type=at_least(least),
            default=default,
            help=f"{text} (default {default})",
        )
    parser.add_argument("--interface", help="of every node (default: to MASTER_ADDR)")
    parser.add_argument("--launch", help="what stands before the program in reports")
    parser.add_argument("--json", metavar="FILE", help="everything, with every time")
    parser.add_argument("--report", metavar="FILE", help="append to this Markdown file")
    options = parser.parse_args(argv)
    unknown = [name for name in options.operations if name not in OPERATIONS]
    if unknown or not options.operations:
        parser.error(f"--operations: got {unknown}, expected {', '.join(OPERATIONS)}")
    return options


def why_refused(contender: Contender, operation: str) -> str | None:
    """Try a small call, as a refusal comes before any rank has sent something."""
    try:
        make_case(operation, 1).call(contender.group)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return str(error).strip().splitlines()[0]
    return None


def take_turns(
    case: Case, contenders: list[Contender], options: argparse.Namespace
) -> list[Measurement]:
    """Times of the slowest rank, iteration by iteration, and wrong values: A B A B.

    Each contender's result is checked once before and once after. Collective over the
    default group, which stands outside the contest.
    """
    results = [Measurement(contender.label) for contender in contenders]
    turns = list(zip(contenders, results, strict=True))
    calls = options.m if case.size_bytes <= 2**16 else 1

    def check() -> None:
        for contender, result in turns:
            case.renew()
            dist.barrier()
            case.call(contender.group)
            result.wrong += case.count_wrong()

    check()
    gc.collect()
    gc.disable()  # a collection inside one timed call would be blamed on it
    try:
        for iteration in range(options.w + options.n):
            for contender, result in turns:
                case.renew()
                dist.barrier()
                start = time.perf_counter_ns()
                for _ in range(calls):
                    case.call(contender.group)
                elapsed = time.perf_counter_ns() - start
                if iteration >= options.w:
                    result.times_us.append(elapsed / 1e3 / calls)
    finally:
        gc.enable()
    check()
    for result in results:
        reduce_over_ranks(result)
    return results


def run_operation(
    operation: str,
    size: int,
    contenders: list[Contender],
    options: argparse.Namespace,
    counter: InterfaceCounter,
    node_of_rank: list[int],
) -> list[Row]:
    """Rows of one operation at one size, those that refuse it included. Collective."""
    refusals = {c.label: why_refused(c, operation) for c in contenders}
    case = make_case(operation, size)
    able = [c for c in contenders if refusals[c.label] is None]
    results = {r.backend: r for r in take_turns(case, able, options)}
    rows = []
    for contender in contenders:
        row = Row(operation, case.size_bytes, contender.label)
        rows.append(row)
        row.refused = refusals[contender.label]
        if row.refused is not None:
            continue
        result = results[contender.label]
        result.tx_bytes = counter.bytes_per_call(
            lambda group=contender.group: case.call(group),
            calls=2 if case.size_bytes > 2**20 else 10,
        )
        fill_row(row, result, node_of_rank)
    first = rows[0].median_us
    for row in rows:
        if first is not None and row.median_us is not None and len(rows) > 1:
            row.time_ratio = row.median_us / first
    return rows


def fill_row(row: Row, result: Measurement, node_of_rank: list[int]) -> None:
    """Set what follows from one measurement."""
    row.median_us = statistics.median(result.times_us)
    row.p99_us = percentile(result.times_us, 99)
    row.wrong, row.times_us = result.wrong, result.times_us
    if max(node_of_rank) > 0:
        row.leaving_bytes = least_leaving_bytes(
            row.operation, row.size_bytes, node_of_rank
        )
    if result.tx_bytes is not None:
        row.tx_bytes_per_node = [round(sent) for sent in result.tx_bytes]
        row.tx_bytes = sum(row.tx_bytes_per_node)
        if row.leaving_bytes:
            row.tx_ratio = row.tx_bytes / row.leaving_bytes


def cells(options: argparse.Namespace, num_nodes: int) -> list[tuple[str, int]]:
    """Operations and sizes that are run, in this order."""
    found = []
    for operation in options.operations:
        sizes = [0] if operation in WITHOUT_SIZE else [*options.sizes]
        if operation in OF_FSDP and num_nodes > 1:
            sizes.append(options.fsdp_size)
        found += [(operation, size) for size in dict.fromkeys(sizes)]
    return found


def texts(row: Row) -> list[str]:
    """The fields of a row; n/a for what a backend refuses."""
    values = [(getattr(row, name), spec) for _, _, name, spec in _COLUMNS]
    shown = ["-" if value is None else format(value, spec) for value, spec in values]
    if row.refused is not None:
        shown[3] = "n/a"
    return shown


def footer(rows: list[Row]) -> list[str]:
    """Wrong values, and where the first contender is slower than a peer."""
    wrong = sum(row.wrong or 0 for row in rows)
    compared = [row for row in rows if row.time_ratio is not None]
    slow = [row for row in compared if row.time_ratio < _SLOWER]
    lines = [
        f"# {row.backend} / {rows[0].backend}: {row.time_ratio:.2f} in "
        f"{row.operation} of {row.size_bytes} B"
        for row in slow
    ]
    peers = len(compared) - sum(row.backend == rows[0].backend for row in compared)
    lines.append(f"# Ratios below {_SLOWER}: {len(slow)} of {peers}")
    lines.append(f"# Out of bounds values : {wrong} {'FAILED' if wrong else 'OK'}")
    return lines


def run(options: argparse.Namespace, output: Output) -> tuple[dict, list[Row]]:
    """Run every cell and print its rows. Collective. Returns header and rows."""
    node_of_rank = node_of_ranks()
    counter = InterfaceCounter(node_of_rank, options.interface)
    contenders = make_contenders(options)
    order = " ".join([c.label for c in contenders] * 2)
    header = {
        "date": run_header.date(),
        "shape": run_header.shape(node_of_rank),
        "command": run_header.command(
            "collectives_bench.py", options.launch, node_of_rank
        ),
        "machine": run_header.machine(),
        "versions": run_header.versions(),
        "interface": counter.interface if counter.available else None,
        "iterations": f"{options.n} x {options.m} calls (1 above 64 kB), "
        f"{options.w} before, order {order} ...",
    }
    for key, value in header.items():
        if value is not None:
            output.line(f"# {key}: {value}")
    output.line(" ".join(f"{column[0]:>{column[1]}}" for column in _COLUMNS))
    rows: list[Row] = []
    for operation, size in cells(options, counter.num_nodes):
        for row in run_operation(
            operation, size, contenders, options, counter, node_of_rank
        ):
            rows.append(row)
            fields = zip(texts(row), _COLUMNS, strict=True)
            output.line(" ".join(f"{text:>{column[1]}}" for text, column in fields))
            if row.refused is not None:
                output.note(f"{row.backend} refuses {operation}: {row.refused}")
    return header, rows


def write_files(
    options: argparse.Namespace, header: dict, output: Output, rows: list[Row]
) -> None:
    """Write the files that were asked for."""
    if options.json:
        document = {
            "benchmark": "collectives",
            "header": {**header, "notes": output.notes},
            "rows": [asdict(row) for row in rows],
        }
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    if options.report:
        run_header.append_section(
            options.report,
            "collectives_bench",
            header,
            output.notes,
            [column[0] for column in _COLUMNS],
            [texts(row) for row in rows],
            footer(rows),
        )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status, 1 if a value was wrong."""
    options = parse_options(argv)
    torch.set_num_threads(1)  # the ranks share the processors
    # The names that torch 2.13 has by others too are those that people use.
    warnings.filterwarnings("ignore", ".* is deprecated|.* will be deprecated")
    if "RANK" not in os.environ:
        raise SystemExit(
            "collectives_bench: got no RANK in the environment; start it with torchrun "
            "or automoe lab (examples: --help)"
        )
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    output = Output()
    header, rows = run(options, output)
    for line in footer(rows):
        output.line(line)
    if dist.get_rank() == 0:
        write_files(options, header, output, rows)
    dist.barrier()
    dist.destroy_process_group()
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
