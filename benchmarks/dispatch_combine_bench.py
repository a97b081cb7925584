#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time dispatch and combine of tokens beside peers: same inputs, one run, in turn.

Run it under torchrun or in the laboratory; ``--help`` shows the options and examples,
README.md the columns and formulas.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import header as run_header
import moe_plot
import moe_report as report
import torch
import torch.distributed as dist
from counters import InterfaceCounter, measure_line, node_of_ranks
from header import Output
from moe_cell import MoeCell
from moe_measure import Contender, make_contenders, run_cell
from moe_options import parse_options


def make_header(
    options: argparse.Namespace,
    node_of_rank: list[int],
    contenders: list[Contender],
    counter: InterfaceCounter,
    line_rate: float | None,
) -> dict[str, object]:
    """What must be known to repeat or to doubt the figures."""
    origin = "measured before the run" if options.measure_line else "given"
    order = " ".join([c.label for c in contenders] * 2)
    fewer = options.cell_seconds and f" (fewer beyond {options.cell_seconds:g} s)"
    return {
        "date": run_header.date(),
        "shape": run_header.shape(node_of_rank),
        "command": run_header.command(
            "dispatch_combine_bench.py", options.launch, node_of_rank
        ),
        "machine": run_header.machine(),
        "versions": run_header.versions(),
        "interface": counter.interface if counter.available else None,
        "line rate": line_rate and f"{line_rate:.1f} MB/s per node ({origin})",
        "iterations": f"{options.iters}{fewer or ''}, {options.warmup} warm-up, "
        f"order {order} ...",
        "checked": f"every {options.check}. iteration" if options.check else "nothing",
    }


def cells(options: argparse.Namespace, world_size: int) -> Iterator[MoeCell]:
    """Every combination of what the options list."""
    for tokens, hidden, topk, dtype, routing in itertools.product(
        options.tokens, options.hidden, options.topk, options.dtype, options.routing
    ):
        yield MoeCell(
            tokens_of_rank=(tokens,) * world_size,
            hidden=hidden,
            topk=topk,
            experts=options.experts,
            routing=routing,
            zipf_alpha=options.zipf_alpha,
            dtype=dtype,
            seed=options.seed,
        )


def note_skew(cell: MoeCell, node_of_rank: list[int], output: Output) -> None:
    """Note how far the busiest rank and the busiest link are above the mean."""
    received = cell.received
    busiest = max(received) * len(received) / max(sum(received), 1)
    text = f"{cell.describe()}: busiest rank receives {busiest:.2f} x the mean"
    crossing = cell.crossing_rows(node_of_rank)
    if int(crossing.sum()):
        ends = torch.stack([crossing.sum(dim=0), crossing.sum(dim=1)]).double()
        busiest = float(ends.max() / ends.mean())
        text += f", busiest link carries {busiest:.2f} x the mean"
    output.note(text)


def run(options: argparse.Namespace, output: Output) -> tuple[dict, list[report.Row]]:
    """Run every cell and print its rows. Collective. Returns header and rows."""
    node_of_rank = node_of_ranks()
    counter = InterfaceCounter(node_of_rank, options.interface)
    contenders = make_contenders(options, node_of_rank)
    line_rate = options.line_rate
    if options.measure_line:
        line_rate = measure_line(node_of_rank)
    header = make_header(options, node_of_rank, contenders, counter, line_rate)
    for key, value in header.items():
        if value is not None:
            output.line(f"# {key}: {value}")
    for text in report.table_header():
        output.line(text)
    rows: list[report.Row] = []
    for cell in cells(options, len(node_of_rank)):
        results = run_cell(cell, contenders, options, counter)
        new_rows = report.make_rows(cell, results, node_of_rank, line_rate)
        for row in new_rows:
            output.line(report.table_line(row))
        note_skew(cell, node_of_rank, output)
        rows += new_rows
    for contender in contenders:
        said = contender.explain()
        if said:
            output.note(f"{contender.label}, all cells: {' '.join(said.split())}")
    return header, rows


def write_files(
    options: argparse.Namespace,
    header: dict[str, object],
    output: Output,
    rows: list[report.Row],
) -> None:
    """Write the files that were asked for."""
    if options.json:
        report.write_json(options.json, {**header, "notes": output.notes}, rows)
    if options.report:
        report.append_markdown(options.report, header, output.notes, rows)
    if options.plot:
        why_not = moe_plot.write_plot(options.plot, rows, str(header["shape"]))
        if why_not:
            output.line(f"# {why_not}")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status, 1 if a value was wrong."""
    options = parse_options(argv)
    torch.set_num_threads(1)  # the ranks share the processors
    if "RANK" not in os.environ:
        raise SystemExit(
            "dispatch_combine_bench: got no RANK in the environment; start it with "
            "torchrun or automoe lab (examples: --help)"
        )
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    output = Output()
    header, rows = run(options, output)
    for line in report.footer(rows):
        output.line(line)
    if dist.get_rank() == 0:
        write_files(options, header, output, rows)
    dist.barrier()
    dist.destroy_process_group()
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
