#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time all_to_all_single of a c10d backend beside peers: same inputs, one run, in turn.

Run it under torchrun or in the laboratory; ``--help`` shows the options and examples,
README.md the columns and formulas.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import header as run_header
import report
import torch
import torch.distributed as dist
from counters import InterfaceCounter, measure_line, node_of_ranks
from exchange import Contender, Measurement, make_contenders, run_cell, supporting
from header import Output
from mpi import MpiContender
from options import parse_options
from routing import Cell, even_cell, moe_cell


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
    return {
        "date": run_header.date(),
        "shape": run_header.shape(node_of_rank),
        "command": run_header.command(
            "all_to_all_bench.py", options.launch, node_of_rank
        ),
        "machine": run_header.machine(),
        "versions": run_header.versions(),
        "interface": counter.interface if counter.available else None,
        "line rate": line_rate and f"{line_rate:.1f} MB/s per node ({origin})",
        "iterations": f"{options.iters} x {options.agg_iters} calls, "
        f"{options.warmup} warm-up, order {order} ...",
        "checked": f"every {options.check}. iteration" if options.check else "nothing",
    }


def note_moe(cell: Cell, options: argparse.Namespace, output: Output) -> None:
    """Say what the MoE cell is, and how far one copy per node would take it."""
    received = cell.rows.sum(dim=0)
    output.note(
        f"MoE: {options.tokens} tokens per rank, hidden {options.hidden}, "
        f"top-{options.topk} of {options.experts} experts, {options.routing} routing"
        + (f" (alpha {options.zipf_alpha:g})" if options.routing == "zipf" else "")
        + f", seed {options.seed}; busiest rank receives "
        f"{float(received.max() / received.double().mean()):.2f} x the mean"
    )
    if cell.one_copy_bytes:
        output.note(
            "MoE: one copy per token and node, not per expert, would be "
            f"{cell.one_copy_bytes} B between nodes"
        )


def run(options: argparse.Namespace, output: Output) -> tuple[dict, list[report.Row]]:
    """Run every cell and print its rows. Collective. Returns header and rows."""
    node_of_rank = node_of_ranks()
    counter = InterfaceCounter(node_of_rank, options.interface)
    contenders = make_contenders(options)
    line_rate = options.line_rate
    if options.measure_line:
        line_rate = measure_line(node_of_rank)
    header = make_header(options, node_of_rank, contenders, counter, line_rate)
    for key, value in header.items():
        if value is not None:
            output.line(f"# {key}: {value}")
    rows: list[report.Row] = []
    with MpiContender(node_of_rank, options, output.note) as mpi:
        for cell, able in cells_and_contenders(
            options, node_of_rank, contenders, output
        ):
            results = run_beside_mpi(cell, able, mpi, options, counter)
            if not rows:
                for text in report.table_header():
                    output.line(text)
            new_rows = report.make_rows(cell, results, node_of_rank, line_rate)
            for row in new_rows:
                output.line(report.table_line(row))
            note_exchange(able, output)
            rows += new_rows
    if all(row.backend != contenders[0].label for row in rows):
        raise SystemExit(
            f"all_to_all_bench: nothing was measured for {contenders[0].label}: it "
            "takes none of these dtypes; the notes above say why"
        )
    return header, rows


def cells_and_contenders(
    options: argparse.Namespace,
    node_of_rank: list[int],
    contenders: list[Contender],
    output: Output,
) -> Iterator[tuple[Cell, list[Contender]]]:
    """Every cell, with the backends that take its dtype. Collective."""
    for dtype in options.dtype:
        able = supporting(contenders, dtype, output.note)
        if not able:
            continue
        if options.tokens is not None:
            cell = moe_cell(options, dtype, node_of_rank)
            note_moe(cell, options, output)
            yield cell, able
            continue
        for size in options.sizes:
            yield even_cell(size, dtype, len(node_of_rank)), able


def run_beside_mpi(
    cell: Cell,
    contenders: list[Contender],
    mpi: MpiContender,
    options: argparse.Namespace,
    counter: InterfaceCounter,
) -> list[Measurement]:
    """``run_cell`` with half of MPI's iterations before it and half after.

    MPI is a program of its own, so it takes turns in blocks, not call by call.
    """
    before = mpi.run(cell, options.iters - options.iters // 2)
    results = run_cell(cell, contenders, options, counter)
    after = mpi.run(cell, options.iters // 2)
    if before is not None and after is not None:
        before.times_us += after.times_us
        before.wrong += after.wrong
    return results if before is None else [*results, before]


def note_exchange(contenders: list[Contender], output: Output) -> None:
    """Note what the backends say of the exchange that they chose, when it changes."""
    for contender in contenders:
        text = contender.explain()
        if text:
            output.note(f"{contender.label}: {' '.join(text.split())}")


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
        why_not = report.write_plot(options.plot, rows, str(header["shape"]))
        if why_not:
            output.line(f"# {why_not}")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status, 1 if a value was wrong."""
    options = parse_options(argv)
    torch.set_num_threads(1)  # the ranks share the processors
    if "RANK" not in os.environ:
        raise SystemExit(
            "all_to_all_bench: got no RANK in the environment; start it with torchrun "
            "or automoe lab (examples: --help)"
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
