# SPDX-License-Identifier: Apache-2.0
"""The benchmark of kernels, on the CPU: its table, its JSON, and what it cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import kernels_bench  # noqa: E402
import kernels_calls  # noqa: E402
import kernels_report as report  # noqa: E402
from kernels_timing import Timer  # noqa: E402

SMALL = ("--device", "cpu", "--tokens", "20", "--topk", "3", "--experts", "5")
FEW = ("-n", "3", "-w", "1", "--flush-bytes", "4096", "--product", "32")

# Every job on one rank, and who does it on the CPU.
KERNELS = {
    "gather": [
        "copy",
        "automoe dispatch",
        "automoe permute",
        "torch index_select",
        "torch sort",
    ],
    "pack": ["copy", "automoe pack_rows", "torch index_select"],
    "reduce": [
        "copy",
        "automoe unpermute",
        "automoe combine",
        "torch index_add_",
        "torch select, sum",
    ],
    "partials": ["copy", "automoe reduce_partials"],
    "scale+dot": ["copy", "automoe scale_and_dot", "torch"],
}


def run_bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "kernels_bench.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_all_parts(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    found = run_bench(
        *SMALL, *FEW, "--hidden", "8,33", "--hops", "--launches", "--overlap",
        "--json", str(out),
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    document = json.loads(out.read_text())
    rows = document["rows"]
    table = [line for line in found.stdout.splitlines() if line and line[0] != "#"]
    assert len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        assert line.split()[0] == row["part"] and row["contender"] in line

    for hidden in (8, 33):
        jobs: dict[str, list[str]] = {}
        for row in rows:
            if row["part"] == "kernels" and row["hidden"] == hidden:
                jobs.setdefault(row["job"], []).append(row["contender"])
        assert jobs == KERNELS
    by_name = {
        (row["part"], row["job"], row["contender"]): row
        for row in rows
        if row["hidden"] == 33
    }
    gathered = by_name["kernels", "gather", "automoe permute"]
    assert gathered["bytes"] == 2 * 20 * 3 * 33 * 2
    assert gathered["of_copy"] > 0 and len(gathered["times_us"]) == 3
    reduced = by_name["kernels", "reduce", "automoe combine"]
    assert reduced["bytes"] == (20 * 3 + 20) * 33 * 2
    assert by_name["hops", "dispatch", "automoe"]["bytes"] == 2 * 20 * 3 * 33 * 2
    for job in ("dispatch", "combine"):
        assert ("hops", job, "gloo all_to_all") in by_name
    both = by_name["overlap", "dispatch", "both"]
    assert both["ratio"] <= 1.0
    assert document["wrong"] == 0 and "# Wrong elements: 0 OK" in found.stdout
    assert document["not_measured"] == [
        "triton: needs a CUDA device",
        "hops, NCCL and symmetric memory: needs a CUDA device",
        "launches: needs a CUDA device",
    ]
    for line in document["not_measured"]:
        assert f"# not measured: {line}" in found.stdout


def test_wrong_results_are_counted() -> None:
    expected = torch.arange(8.0).bfloat16()
    exact = kernels_calls.Kernel("gather", 1, expected, exact=True)
    close = kernels_calls.Kernel("reduce", 1, expected, exact=False)
    off = expected.clone()
    off[3] += 0.25
    assert kernels_calls.count_wrong(exact, expected) == 0
    assert kernels_calls.count_wrong(exact, off) == 1
    assert kernels_calls.count_wrong(close, off) == 0
    off[3] += 0.5
    assert kernels_calls.count_wrong(close, off) == 1
    row = report.make_row("kernels", "gather", "x", 8, 16, [2.0, 1.0, 9.0], wrong=1)
    assert row.median_us == 2.0 and row.p99_us == 9.0 and row.gbps == 0.008
    assert report.footer([row]) == "# Wrong elements: 1 FAILED"


def test_calls_take_turns() -> None:
    order: list[str] = []
    timer = Timer(torch.device("cpu"), flush_bytes=1)
    calls = [lambda name=name: order.append(name) for name in "AB"]
    times = timer.in_turn(calls, iters=2, warmup=1)
    assert "".join(order) == "ABABAB"
    assert [len(own) for own in times] == [2, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_device(capsys) -> None:
    assert kernels_bench.main(["--tokens", "4"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--topk", "9", "--experts", "8"], "--topk is 9, expected at most --experts"),
        (["--hidden", "8,0"], "expected a whole number of at least 1"),
        (["--json", "/nowhere/x.json"], "expected a file in a folder"),
    ],
)
def test_bad_options(capsys, arguments: list[str], text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        kernels_bench.parse_options(arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
