# SPDX-License-Identifier: Apache-2.0
"""Command line of the dispatch/combine benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from options import (
    OneVoiceParser,
    add_line_options,
    add_output_options,
    at_least,
    check_files,
    dtypes,
    names,
    positive_float,
)

CONTENDERS = {
    "automoe": "plan, dispatch and combine of this library",
    "expanded": "rows as stock code sends them, one per pick, on gloo",
    "rank_dedup": "one row per (token, rank), partial sums back, on gloo",
    "two_level": "one row per (token, node), rails then nodes, on subgroups of gloo",
    "level0": "the code of expanded, unchanged, on the backend automoe",
    "stock": "expanded, but the sums in one bmm as torchtitan takes them (not in "
    "the default)",
}
DEFAULT_CONTENDERS = [name for name in CONTENDERS if name != "stock"]
ROUTINGS = ("uniform", "zipf", "zipf_sorted")

_EPILOG = """\
contenders:
{contenders}

examples:
  automoe lab --nodes 4 --ranks-per-node 2 --rate 1gbit -- \\
      benchmarks/dispatch_combine_bench.py --tokens 16,1024 --measure-line
  automoe lab --nodes 4 --ranks-per-node 2 --rate 1gbit -- \\
      benchmarks/dispatch_combine_bench.py --routing uniform,zipf --measure-line
  automoe lab --nodes 4 --ranks-per-node 2 --rate 1gbit -- \\
      benchmarks/dispatch_combine_bench.py --contenders expanded,level0 \\
      --tokens 1,16,256,4096 --hidden 256,1024,7168 --topk 1,2,8 \\
      -n 100 --cell-seconds 30
  torchrun --nproc-per-node 4 benchmarks/dispatch_combine_bench.py

Columns and formulas: benchmarks/README.md. The exit status is 1 if a value was wrong.
"""


def _numbers(text: str) -> list[int]:
    """Parse a comma-separated list of positive whole numbers."""
    return [at_least(1)(part) for part in names(text)] or [at_least(1)(text)]


def _some_of(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Parser of a comma-separated list of different names among ``choices``."""

    def parse(text: str) -> list[str]:
        chosen = names(text)
        if not chosen or not set(chosen) <= set(choices):
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected one or several of {', '.join(choices)}"
            )
        return list(dict.fromkeys(chosen))

    return parse


def _add_cell_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "cells (where several values are given, with commas: every combination)"
    )
    group.add_argument(
        "--tokens", type=_numbers, default=[1024], help="T, per rank (default 1024)"
    )
    group.add_argument(
        "--hidden", type=_numbers, default=[1024], help="H, elements of a row"
    )
    group.add_argument("--topk", type=_numbers, default=[8], help="K, experts a token")
    group.add_argument(
        "--experts", type=at_least(1), default=32, help="E, on all ranks (default 32)"
    )
    group.add_argument(
        "--routing",
        type=_some_of(ROUTINGS),
        default=["uniform"],
        help="popularity of the experts: uniform; zipf, in an order from the seed; "
        "zipf_sorted, where the first rank has the most popular ones",
    )
    group.add_argument(
        "--zipf-alpha",
        type=positive_float,
        default=1.0,
        help="popularity of the i-th expert is i ** -alpha (default 1)",
    )
    group.add_argument(
        "-d",
        "--dtype",
        type=dtypes,
        default=[torch.bfloat16],
        help="float types of torch (default bfloat16)",
    )
    group.add_argument("--seed", type=at_least(0), default=1)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--contenders",
        type=_some_of(tuple(CONTENDERS)),
        default=DEFAULT_CONTENDERS,
        help="whom to time; ratios are to the first (default: "
        f"{','.join(DEFAULT_CONTENDERS)})",
    )
    group.add_argument(
        "-n", "--iters", type=at_least(1), default=20, help="timed iterations"
    )
    group.add_argument("-w", "--warmup", type=at_least(1), default=3)
    group.add_argument(
        "--cell-seconds",
        type=positive_float,
        help="fewer iterations, but at least 3, where a cell would take longer",
    )
    group.add_argument(
        "-c",
        "--check",
        type=at_least(0),
        default=1,
        help="check the results of every N-th timed iteration (0: of none)",
    )
    group.add_argument(
        "--timeout", type=positive_float, default=120.0, help="seconds for one call"
    )


def _check_together(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> None:
    if max(options.topk) > options.experts:
        parser.error(
            f"--topk is {max(options.topk)}, expected at most --experts, "
            f"which is {options.experts}"
        )
    for dtype in options.dtype:
        if not dtype.is_floating_point or dtype.itemsize < 2:
            parser.error(
                f"--dtype is {str(dtype).removeprefix('torch.')}, expected float16, "
                "bfloat16, float32 or float64: rows that can be summed"
            )


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a message if it is wrong."""
    width = max(map(len, CONTENDERS))
    lines = "\n".join(f"  {name:{width}}  {what}" for name, what in CONTENDERS.items())
    parser = OneVoiceParser(
        description="Time dispatch and combine of tokens beside peers in one run.",
        epilog=_EPILOG.format(contenders=lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_cell_options(parser)
    _add_run_options(parser)
    add_line_options(parser)
    add_output_options(parser, plot="time of every contender and phase")
    options = parser.parse_args(argv)
    check_files(parser, options)
    _check_together(parser, options)
    return options
