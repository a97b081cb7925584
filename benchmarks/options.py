# SPDX-License-Identifier: Apache-2.0
"""Command line of the all-to-all benchmark: nccl-tests letters, long names."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30}

_EPILOG = """\
examples:
  torchrun --nproc-per-node 8 benchmarks/all_to_all_bench.py --against gloo
  automoe lab --nodes 4 --ranks-per-node 2 --rate 1gbit -- \\
      benchmarks/all_to_all_bench.py --against gloo,mpi --sizes 1K,16K,256K
  automoe lab --nodes 4 --ranks-per-node 2 --rate 1gbit -- \\
      benchmarks/all_to_all_bench.py --against gloo --tokens 1024 --hidden 1024 \\
      --topk 8 --experts 32 --routing uniform --measure-line

Columns and formulas: benchmarks/README.md. The exit status is 1 if a value was wrong.
"""


class OneVoiceParser(argparse.ArgumentParser):
    """Parser of which only rank 0 prints, though every rank parses."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(2)
        super().error(message)


def byte_count(text: str) -> int:
    """Parse ``1024``, ``16K``, ``4M`` or ``1G`` (powers of 1024) into bytes."""
    number = text.upper().rstrip("BKMG")
    unit = text.upper()[len(number) :]
    unit = unit.removesuffix("B") if len(unit) > 1 else unit
    if unit not in _UNITS or not number.isdigit() or int(number) == 0:
        raise argparse.ArgumentTypeError(
            f"got size {text!r}, expected a positive number of bytes: 1024, 16K, 4M"
        )
    return int(number) * _UNITS[unit]


def byte_counts(text: str) -> list[int]:
    """Parse a comma-separated list of sizes."""
    return [byte_count(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Parse a comma-separated list of names; empty parts are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def dtypes(text: str) -> list[torch.dtype]:
    """Parse a comma-separated list of torch's names, or ``all``."""
    chosen = list(DTYPES) if text == "all" else names(text)
    for name in chosen:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(
                f"got dtype {name!r}, expected all or some of {', '.join(DTYPES)}"
            )
    return [DTYPES[name] for name in chosen]


def at_least(least: int) -> Callable[[str], int]:
    """Parser of whole numbers that are not below ``least``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a whole number of at least {least}"
            )
        return value

    return parse


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")
    return value


def _add_size_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sizes (bytes in a rank's send buffer, its own part included)"
    )
    group.add_argument("-b", "--min-bytes", type=byte_count, default=byte_count("1K"))
    group.add_argument("-e", "--max-bytes", type=byte_count, default=byte_count("16M"))
    group.add_argument("-f", "--step-factor", type=at_least(2), default=4)
    group.add_argument(
        "--sizes", type=byte_counts, help="these sizes instead, such as 1024,16K,4M"
    )
    group.add_argument(
        "-d",
        "--dtype",
        type=dtypes,
        help="one or several of torch's names, or all (default float32; MoE bfloat16)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--backend", default="automoe", help="c10d backend under test (default automoe)"
    )
    group.add_argument(
        "--against",
        type=names,
        default=[],
        metavar="PEERS",
        help="c10d backends to compare with in the same run, such as gloo; mpi runs "
        "benchmarks/mpi_alltoallv.c under Open MPI",
    )
    group.add_argument(
        "-n", "--iters", type=at_least(1), default=20, help="timed iterations"
    )
    group.add_argument("-w", "--warmup", type=at_least(0), default=5)
    group.add_argument(
        "-m",
        "--agg-iters",
        type=at_least(1),
        default=1,
        help="calls per timed iteration, back to back after one barrier",
    )
    group.add_argument(
        "-c",
        "--check",
        type=at_least(0),
        default=1,
        help="check the result of every N-th timed iteration (0: of none)",
    )
    group.add_argument("--seed", type=at_least(0), default=1)
    group.add_argument(
        "--timeout", type=positive_float, default=120.0, help="seconds for one call"
    )


def _add_moe_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "MoE cell (instead of sizes): the expanded rows of one dispatch"
    )
    group.add_argument(
        "--tokens", type=at_least(1), help="tokens per rank; turns this mode on"
    )
    group.add_argument("--hidden", type=at_least(1), default=1024)
    group.add_argument("--topk", type=at_least(1), default=8)
    group.add_argument("--experts", type=at_least(1), default=32)
    group.add_argument(
        "--routing",
        choices=("uniform", "zipf"),
        default="uniform",
        help="popularity of the experts",
    )
    group.add_argument(
        "--zipf-alpha",
        type=positive_float,
        default=1.0,
        help="popularity of the i-th expert is i ** -alpha (default 1)",
    )


def add_line_options(parser: argparse.ArgumentParser) -> None:
    """Line rate and interface."""
    group = parser.add_argument_group("network")
    line = group.add_mutually_exclusive_group()
    line.add_argument(
        "--line-rate",
        type=positive_float,
        metavar="MB/S",
        help="payload rate of one TCP stream of a node (1 MB = 1e6 bytes)",
    )
    line.add_argument(
        "--measure-line",
        action="store_true",
        help="measure it before the run, from node 1 to node 0",
    )
    group.add_argument(
        "--interface",
        help="network interface to count (default: the one that leads to MASTER_ADDR)",
    )


def add_output_options(
    parser: argparse.ArgumentParser, plot: str = "time and bus bandwidth"
) -> None:
    """Files that are written; ``plot`` says what the plot shows."""
    group = parser.add_argument_group("output (written by rank 0)")
    group.add_argument("--json", metavar="FILE", help="everything, with every time")
    group.add_argument(
        "--report", metavar="FILE.md", help="append a section to a Markdown report"
    )
    group.add_argument("--plot", metavar="FILE.png", help=f"{plot} (needs matplotlib)")
    group.add_argument(
        "--launch",
        metavar="TEXT",
        help="how the job was started, to stand before the command in the report",
    )


def check_files(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Find out before the run, not after it, that a result could not be written."""
    if os.environ.get("RANK", "0") != "0":
        return
    for name in ("json", "report", "plot"):
        path = getattr(options, name)
        if path and not os.access(os.path.dirname(path) or ".", os.W_OK):
            parser.error(
                f"--{name} is {path}, expected a file in a folder that can be written"
            )


def _check_together(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> None:
    if options.tokens is None:
        if options.sizes is None and options.min_bytes > options.max_bytes:
            parser.error(
                f"--min-bytes is {options.min_bytes}, expected at most --max-bytes, "
                f"which is {options.max_bytes}"
            )
        return
    if options.sizes is not None:
        parser.error("got --sizes and --tokens, expected one of them")
    if options.topk > options.experts:
        parser.error(
            f"--topk is {options.topk}, expected at most --experts, "
            f"which is {options.experts}"
        )


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a message if it is wrong.

    Besides the options themselves, the result has ``sizes`` filled in (bytes, ascending
    as given) and ``dtype`` as a list of ``torch.dtype``.
    """
    parser = OneVoiceParser(
        description="Time all_to_all_single of a c10d backend beside peers in one run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_size_options(parser)
    _add_run_options(parser)
    _add_moe_options(parser)
    add_line_options(parser)
    add_output_options(parser)
    options = parser.parse_args(argv)
    check_files(parser, options)
    _check_together(parser, options)
    if options.sizes is None:
        options.sizes = []
        size = options.min_bytes
        while size <= options.max_bytes:
            options.sizes.append(size)
            size *= options.step_factor
    if options.dtype is None:
        options.dtype = [torch.float32 if options.tokens is None else torch.bfloat16]
    return options
