#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time the kernels on one device beside a copy of as many bytes, torch and Triton.

``--help`` shows the options and examples, ../docs/gpu.md the columns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from types import ModuleType

import header as run_header
import kernels_calls
import kernels_ranks
import kernels_report as report
import torch
import torch.distributed as dist
from kernels_figures import figure_line, make_figures
from kernels_row import Row
from kernels_timing import Timer
from options import at_least

_EPILOG = """\
examples:
  python benchmarks/kernels_bench.py
  python benchmarks/kernels_bench.py --hops --launches --overlap --json kernels.json
  python benchmarks/kernels_bench.py --skip-kernels --hops --overlap --nodes 2
  python benchmarks/kernels_bench.py --device cpu --tokens 64 --hidden 256 --iters 3

What cannot be measured here is a line "not measured: WHAT: needs ...". The figures at
the end are the worst rows of a kind beside what is expected. The exit status is 1 if a
result was wrong, whatever the figures say. Columns and figures: docs/gpu.md.
"""


def whole_numbers(text: str) -> list[int]:
    """Parse a comma-separated list of positive numbers."""
    parse = at_least(1)
    return [parse(part) for part in text.split(",")]


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a message if it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tokens", type=at_least(1), default=4096, help="per rank (4096)")
    add(
        "--hidden",
        type=whole_numbers,
        default=[1024, 2048, 4096, 7168],
        help="elements of a bf16 row, comma-separated (1024,2048,4096,7168)",
    )
    add("--topk", type=at_least(1), default=8)
    add("--experts", type=at_least(1), default=64)
    add("-n", "--iters", type=at_least(1), default=50, help="timed iterations (50)")
    add("-w", "--warmup", type=at_least(1), default=5)
    add(
        "--flush-bytes",
        type=at_least(1),
        help="written between calls (twice the L2 of a GPU, 64 MiB on the CPU)",
    )
    add("--hops", action="store_true", help="dispatch and combine between ranks")
    add("--launches", action="store_true", help="the chain of launches at T=16")
    add("--overlap", action="store_true", help="how much of an exchange is hidden")
    add(
        "--ranks",
        type=at_least(1),
        help="of these parts, which share a device where there are fewer (2 of hops, "
        "1 of launches and overlap, at least one for each node)",
    )
    add("--nodes", type=at_least(1), default=1, help="that the ranks call theirs (1)")
    add("--max-ctas", type=at_least(1), help="as in torch_automoe.Options (no limit)")
    add("--chunks", type=at_least(2), default=4, help="of moe, in overlap (4)")
    add("--product", type=at_least(1), default=2048, help="size of overlap's products")
    add("--skip-kernels", action="store_true", help="only the parts that are named")
    add("--json", metavar="FILE", help="everything, with every time")
    options = parser.parse_args(argv)
    if options.topk > options.experts:
        parser.error(
            f"--topk is {options.topk}, expected at most --experts, "
            f"which is {options.experts}"
        )
    if options.ranks and options.ranks < options.nodes:
        parser.error(
            f"--ranks is {options.ranks}, expected at least --nodes, "
            f"which is {options.nodes}"
        )
    if options.json and not os.access(os.path.dirname(options.json) or ".", os.W_OK):
        parser.error(
            f"--json is {options.json}, expected a file in a folder that can be written"
        )
    return options


def find_triton(device: torch.device) -> tuple[ModuleType | None, str | None]:
    """Our Triton kernels, or why there are none."""
    if device.type != "cuda":
        return None, "triton: needs a CUDA device"
    try:
        import kernels_triton
    except ImportError as error:
        return None, f"triton: needs the package triton ({error})"
    return kernels_triton, None


def describe_device(device: torch.device) -> str:
    """The GPU and its driver, or that there is none."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    text = (
        f"{properties.name}, {properties.multi_processor_count} SMs, "
        f"L2 {properties.L2_cache_size / 2**20:.0f} MiB, CUDA {torch.version.cuda}"
    )
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20)
        return f"{text}, driver {found.stdout.split()[0]}"
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return text


def make_header(options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """What must be known to repeat or to doubt the figures."""
    nccl = None
    if device.type == "cuda":
        nccl = "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "date": run_header.date(),
        "command": run_header.command("kernels_bench.py", None, [0]),
        "machine": run_header.machine(),
        "device": describe_device(device),
        "versions": ", ".join(filter(None, [run_header.versions(), nccl])),
        "shape": f"T={options.tokens} K={options.topk} E={options.experts} bfloat16",
        "max_ctas": options.max_ctas or "no limit",
        "iterations": f"{options.iters}, {options.warmup} warm-up, in turn",
    }


def run_kernels(
    options: argparse.Namespace, device: torch.device, triton: ModuleType | None
) -> list[Row]:
    """Time every job at every size on this rank alone, and print the rows."""
    timer = Timer(device, options.flush_bytes)
    rows = []
    for hidden in options.hidden:
        layer = kernels_calls.draw_layer(
            options.tokens, options.topk, options.experts, hidden, device
        )
        for kernel in kernels_calls.make_kernels(layer, triton):
            calls = kernel.calls
            times = timer.in_turn(list(calls.values()), options.iters, options.warmup)
            medians = {}
            for (name, call), own in zip(calls.items(), times, strict=True):
                copied = name == kernels_calls.COPY
                wrong = 0 if copied else kernels_calls.count_wrong(kernel, call())
                row = report.make_row(
                    "kernels", kernel.name, name, hidden, kernel.bytes, own, wrong=wrong
                )
                medians[name] = row.median_us
                row.of_copy = medians[kernels_calls.COPY] / row.median_us
                print(report.table_line(row), flush=True)
                rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status, 1 if a result was wrong."""
    options = parse_options(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "kernels_bench: there is no CUDA device: torch.cuda.is_available() is "
            "False; --device cpu runs the same rows on the CPU",
            file=sys.stderr,
        )
        return 2
    device = (
        torch.device(options.device, 0)
        if options.device == "cuda"
        else (torch.device("cpu"))
    )
    triton, why = find_triton(device)
    not_measured = [why] if why else []
    header = make_header(options, device)
    for key, value in header.items():
        print(f"# {key}: {value}")
    print("\n".join(report.table_header()), flush=True)
    rows: list[Row] = []
    if not options.skip_kernels:
        kernels_calls.make_group()
        rows = run_kernels(options, device, triton)
        dist.destroy_process_group()
    of_ranks, more = kernels_ranks.measure(options)
    for row in of_ranks:
        print(report.table_line(row))
    rows += of_ranks
    not_measured += more
    figures = make_figures(rows, device.type == "cuda")
    for line in not_measured:
        print(f"# not measured: {line}")
    for figure in figures:
        print(figure_line(figure))
    print(report.footer(rows))
    if options.json:
        report.write_json(options.json, header, rows, figures, not_measured)
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
