#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time training steps of a transformers MoE beside its peers, in one run, in turn.

Run it under torchrun or in the laboratory; ``--help`` shows the options and examples,
README.md the columns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import header as run_header
import torch
import torch.distributed as dist
from counters import InterfaceCounter, node_of_ranks
from header import Output
from options import OneVoiceParser, at_least, names
from train_peers import CONTENDERS, NO_EXCHANGE, Contender, make_contender

_COLUMNS = (
    "family",
    "contender",
    "step p50 (ms)",
    "min",
    "max",
    "tokens/s",
    "ratio",
    "exposed (ms)",
    "exposed (%)",
    "nodes sent (MB/step)",
    "loss",
)
_EPILOG = """\
example:
  automoe lab --nodes 4 --ranks-per-node 2 --rate 1gbit -- \\
      benchmarks/train_step_bench.py --family qwen3_moe --report steps.md

Columns: benchmarks/README.md.
"""


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; only rank 0 prints."""
    parser = OneVoiceParser(
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", default="qwen3_moe", help="model type of the model")
    for flag, default, text in (
        ("--layers", 2, "blocks"),
        ("--hidden", 512, "width"),
        ("--expert-dim", 128, "width of an expert"),
        ("--experts", 32, "experts a layer, on all ranks"),
        ("--topk", 8, "experts a token"),
        ("--vocab", 512, "size of the vocabulary"),
        ("--seq-len", 512, "tokens of a sequence"),
        ("--batch", 1, "sequences per rank"),
        ("-n", 8, "timed steps"),
        ("-w", 2, "steps before"),
    ):
        parser.add_argument(
            flag, type=at_least(1), default=default, help=f"{text} (default {default})"
        )
    parser.add_argument("--seed", type=at_least(0), default=1)
    parser.add_argument(
        "--contenders",
        type=names,
        default=list(CONTENDERS),
        help=f"some of {', '.join(CONTENDERS)}; ratios are to the first",
    )
    parser.add_argument("--interface", help="of every node (default: to MASTER_ADDR)")
    parser.add_argument("--launch", help="what stands before the program in reports")
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--report", metavar="FILE", help="append to this Markdown file")
    options = parser.parse_args(argv)
    unknown = [name for name in options.contenders if name not in CONTENDERS]
    if unknown or not options.contenders:
        parser.error(f"--contenders: got {unknown}, expected {', '.join(CONTENDERS)}")
    return options


def take_turns(
    contenders: list[Contender], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of the slowest rank, step by step, and the last loss, by contender."""
    generator = torch.Generator().manual_seed(options.seed + dist.get_rank())
    seconds: dict[str, list[float]] = {c.label: [] for c in contenders}
    losses: dict[str, float] = {}
    for step in range(options.w + options.n):
        tokens = torch.randint(
            options.vocab, (options.batch, options.seq_len + 1), generator=generator
        )
        for contender in contenders:
            dist.barrier()
            start = time.perf_counter()
            loss = contender.step(tokens)
            taken = torch.tensor([time.perf_counter() - start, loss])
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            losses[contender.label] = float(taken[1])
            if step >= options.w:
                seconds[contender.label].append(float(taken[0]))
    return seconds, losses


def make_rows(
    options: argparse.Namespace,
    seconds: dict[str, list[float]],
    losses: dict[str, float],
    sent: dict[str, list[float] | None],
) -> list[dict[str, object]]:
    """One row of the table per contender."""
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    first = medians[options.contenders[0]]
    alone = medians[NO_EXCHANGE]
    tokens = options.batch * options.seq_len * dist.get_world_size()
    rows = []
    for label, values in seconds.items():
        median = medians[label]
        exposed = max(median - alone, 0.0)
        bytes_sent = sent[label]
        figures = (
            options.family,
            label,
            round(1e3 * median, 1),
            round(1e3 * min(values), 1),
            round(1e3 * max(values), 1),
            round(tokens / median),
            round(median / first, 2),
            round(1e3 * exposed, 1),
            round(100 * exposed / median, 1),
            round(sum(bytes_sent) / 1e6, 1) if bytes_sent else None,
            round(losses[label], 4),
        )
        rows.append(dict(zip(_COLUMNS, figures, strict=True)))
    return rows


def run(options: argparse.Namespace, output: Output) -> tuple[dict, list[dict]]:
    """Run all contenders; returns the header and the rows. Collective."""
    node_of_rank = node_of_ranks()
    counter = InterfaceCounter(node_of_rank, options.interface)
    labels = [*options.contenders, NO_EXCHANGE]
    contenders = [make_contender(label, options) for label in labels]
    model = contenders[0].model
    header = {
        "date": run_header.date(),
        "shape": run_header.shape(node_of_rank),
        "command": run_header.command(
            "train_step_bench.py", options.launch, node_of_rank
        ),
        "machine": run_header.machine(),
        "versions": f"{run_header.versions()}, transformers {_transformers_version()}",
        "model": f"{options.family}, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, float32, {options.batch} x {options.seq_len} tokens a rank",
        "steps": f"{options.n}, {options.w} before, order {' '.join(labels * 2)} ...",
    }
    for key, value in header.items():
        output.line(f"# {key}: {value}")
    seconds, losses = take_turns(contenders, options)
    tokens = torch.randint(options.vocab, (options.batch, options.seq_len + 1))
    sent = {
        c.label: counter.bytes_per_call(lambda c=c: c.step(tokens), 1)
        for c in contenders
    }
    return header, make_rows(options, seconds, losses, sent)


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse_options(argv)
    torch.set_num_threads(1)  # the ranks share the processors
    if "RANK" not in os.environ:
        raise SystemExit(
            "train_step_bench: got no RANK in the environment; start it with torchrun "
            "or automoe lab (example: --help)"
        )
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    output = Output()
    header, rows = run(options, output)
    output.line("  ".join(_COLUMNS))
    for row in rows:
        output.line("  ".join(f"{value!s:>12}" for value in row.values()))
    if dist.get_rank() == 0:
        if options.json:
            content = {"header": header, "rows": rows}
            Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
        if options.report:
            run_header.append_section(
                options.report,
                "Training steps",
                header,
                output.notes,
                list(_COLUMNS),
                [[str(value) for value in row.values()] for row in rows],
                [],
            )
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
