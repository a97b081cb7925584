# SPDX-License-Identifier: Apache-2.0
"""The benchmark of kernels, on the CPU: its table, its JSON, and what it cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import kernels_bench  # noqa: E402
import kernels_calls  # noqa: E402
import kernels_overlap as overlap  # noqa: E402
import kernels_ranks  # noqa: E402
import kernels_report as report  # noqa: E402
from kernels_figures import figure_line, make_figures  # noqa: E402
from kernels_row import Row  # noqa: E402
from kernels_timing import Caches, Contest, Timer  # noqa: E402

SMALL = ("--device", "cpu", "--tokens", "20", "--topk", "3", "--experts", "5")
FEW = ("-n", "3", "-w", "1", "--flush-bytes", "4096", "--product", "32")

# Every job on one rank, and who does it on the CPU.
KERNELS = {
    "plan": [
        "copy",
        "automoe plan",
        "automoe plan, bounded",
        "torch sort, bincount",
    ],
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
        timeout=600,
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
    planned = by_name["kernels", "plan", "automoe plan"]
    # Picks of 8 bytes; receive_index of 60 rows, counts and ends of 5 experts.
    assert planned["bytes"] == 20 * 3 * 8 + (60 + 5 + 5) * 4
    gathered = by_name["kernels", "gather", "automoe permute"]
    assert gathered["bytes"] == 2 * 20 * 3 * 33 * 2
    assert gathered["of_copy"] > 0 and len(gathered["times_us"]) == 3
    reduced = by_name["kernels", "reduce", "automoe combine"]
    assert reduced["bytes"] == (20 * 3 + 20) * 33 * 2
    assert by_name["hops", "dispatch", "automoe"]["bytes"] == 2 * 20 * 3 * 33 * 2
    for job in ("dispatch", "combine"):
        assert ("hops", job, "gloo all_to_all") in by_name
    assert ("hops", "plan", "automoe, bounded") in by_name
    assert by_name["overlap", "dispatch", "both"]["ratio"] is not None
    assert {(row["part"], row["ranks"], row["nodes"]) for row in rows} == {
        ("kernels", 1, 1),
        ("hops", 2, 1),
        ("overlap", 1, 1),
    }
    assert document["wrong"] == 0 and "# Wrong elements: 0 OK" in found.stdout
    assert document["not_measured"] == [
        "triton: needs a CUDA device",
        "hops, NCCL and symmetric memory: needs a CUDA device",
        "launches: needs a CUDA device",
        "overlap of moe's chunks: needs --nodes 2",
    ]
    for line in document["not_measured"]:
        assert f"# not measured: {line}" in found.stdout
    # No row is as wide as the figures want it.
    assert [figure["value"] for figure in document["figures"]] == [None] * 7
    assert found.stdout.count("# figure: ") == 7


def test_nodes(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    found = run_bench(
        *SMALL, *FEW, "--hidden", "2048", "--skip-kernels", "--hops", "--overlap",
        "--nodes", "2", "--chunks", "3", "--json", str(out),
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    document = json.loads(out.read_text())
    rows = document["rows"]
    assert all((row["ranks"], row["nodes"]) == (2, 2) for row in rows)
    chunked = [row for row in rows if row["job"] == "moe"]
    assert [row["contender"] for row in chunked] == [
        "moe in 1 chunk",
        "moe in 3 chunks",
        "chunks one by one",
        "dispatch of 3 chunks",
        "experts of 3 chunks",
        "combine of 3 chunks",
    ]
    assert [row["contender"] for row in chunked if row["ratio"] is not None] == [
        "moe in 3 chunks"
    ]
    assert document["wrong"] == 0
    assert "hops, fp8 wire: needs a CUDA device" in document["not_measured"]
    *_, dispatch, chunks = document["figures"]
    for figure in (dispatch, chunks):
        assert figure["row"] == "H=2048, ranks: 2, nodes: 2"
        assert figure["value"] is not None and figure["holds"] is None
    assert found.stdout.count("says nothing: not on a GPU") == 2


def test_chunks_that_overlap() -> None:
    # One chunk, or steps of which only one kind takes time: nothing can hide.
    assert overlap.pipelined([(3.0, 5.0, 2.0)]) == 10.0
    assert overlap.pipelined([(1.0, 0.0, 2.0)] * 3) == 9.0
    assert overlap.pipelined([(0.0, 4.0, 0.0)] * 3) == 12.0
    # Experts are the longest: only the first dispatch and the last combine show.
    assert overlap.pipelined([(1.0, 4.0, 2.0)] * 3) == 1.0 + 12.0 + 2.0
    # Transfers are: D0 D1 C0 D2 C1 C2, of which C2 waits for the experts.
    assert overlap.pipelined([(3.0, 1.0, 3.0)] * 3) == 18.0
    assert overlap.pipelined([(2.0, 3.0, 1.0)] * 2) == 9.0
    assert overlap.chunks_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [(1, 2, 3), (4, 5, 6)]
    assert overlap.hidden_share(12.0, 9.0, 4.0) == 0.75
    assert overlap.hidden_share(12.0, 9.0, 0.0) is None


def row_of(part: str, job: str, contender: str, time: float, **more) -> Row:
    more = {"hidden": 2048, "ratio": None, "of_copy": None, **more}
    return report.make_row(
        part, job, contender, more.pop("hidden"), None, [time], **more
    )


def test_figures_are_the_worst_rows() -> None:
    rows = [
        row_of("kernels", "gather", "automoe dispatch", 10.0, of_copy=0.9),
        row_of("kernels", "gather", "automoe dispatch", 10.0, of_copy=0.8, hidden=4096),
        row_of("kernels", "gather", "automoe dispatch", 9.0, of_copy=0.1, hidden=1024),
        row_of("kernels", "gather", "torch sort", 30.0, of_copy=0.2),
        row_of("kernels", "gather", "torch index_select", 12.0, of_copy=0.3),
        row_of("kernels", "reduce", "automoe combine", 10.0, of_copy=0.85),
        row_of("launches", "T=16", "automoe", 10.0, ratio=2.5, hidden=8),
        row_of("launches", "T=16", "automoe", 10.0, ratio=3.5, ranks=2),
        row_of("launches", "T=16", "9 empty kernels", 10.0, ratio=9.0),
        row_of("overlap", "dispatch", "both", 10.0, ratio=0.81),
    ]
    found = make_figures(rows, on_gpu=True)
    assert [(it.value, it.bound, it.holds) for it in found] == [
        (0.8, ">= 0.85", False),
        (1.2, ">= 1", True),
        (0.85, ">= 0.85", True),
        (None, ">= 1", None),
        (3.5, "<= 3", False),
        (0.81, ">= 0.8", True),
        (None, ">= 0.8", None),
    ]
    lines = [figure_line(figure) for figure in found]
    assert lines[0] == (
        "# figure: gather at H >= 2048, of the copy's rate: 0.800 "
        "(H=4096, ranks: 1, nodes: 1; expected >= 0.85): MISSED"
    )
    assert lines[1].endswith("holds")
    assert lines[4].endswith(
        "3.500 (H=2048, ranks: 2, nodes: 1; expected <= 3): MISSED"
    )
    assert lines[6].endswith(
        "not measured (expected >= 0.8): needs --overlap --nodes 2 at H >= 2048"
    )
    assert {it.holds for it in make_figures(rows, on_gpu=False)} == {None}


def test_ranks_of_a_part() -> None:
    def count(part: str, *arguments: str) -> int:
        return kernels_ranks.count_ranks(part, kernels_bench.parse_options(arguments))

    assert count("hops") == 2 and count("launches") == count("overlap") == 1
    assert count("hops", "--nodes", "3") == count("overlap", "--nodes", "3") == 3
    assert count("hops", "--ranks", "1") == count("launches", "--ranks", "1") == 1
    assert count("overlap", "--ranks", "4", "--nodes", "2") == 4


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
    assert kernels_ranks.count_off(off, expected) == 1
    off[5] = float("nan")
    assert kernels_calls.count_wrong(close, off) == 2
    assert kernels_ranks.count_off(off, expected) == 2
    row = report.make_row("kernels", "gather", "x", 8, 16, [2.0, 1.0, 9.0], wrong=1)
    assert row.median_us == 2.0 and row.p99_us == 9.0 and row.gbps == 0.008
    assert report.footer([row]) == "# Wrong elements: 1 FAILED"


def test_calls_take_turns(monkeypatch) -> None:
    order: list[str] = []
    calls = [lambda name=name: order.append(name) for name in "AB"]
    monkeypatch.setattr(Caches, "flush", lambda _: order.append("."))
    timer = Timer(torch.device("cpu"), flush_bytes=1)
    times = timer.in_turn(calls, iters=2, warmup=1)
    assert "".join(order) == "AB.A.B.A.B"
    assert [len(own) for own in times] == [2, 2]

    order.clear()
    monkeypatch.setattr(dist, "all_reduce", lambda *_: order.append("|"))
    times = Contest(torch.device("cpu"), 1, 1, flush_bytes=1).in_turn(calls)
    assert "".join(order) == ".|A.|B.|A.|B|"
    assert [len(own) for own in times] == [1, 1]


def test_caches_are_written() -> None:
    caches = Caches(torch.device("cpu"), flush_bytes=3)
    caches._other.fill_(7)
    caches.flush()
    assert caches._other.tolist() == [0, 0, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_device(capsys) -> None:
    assert kernels_bench.main(["--tokens", "4"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--topk", "9", "--experts", "8"], "--topk is 9, expected at most --experts"),
        (["--hidden", "8,0"], "expected a whole number of at least 1"),
        (["--ranks", "0"], "expected a whole number of at least 1"),
        (["--ranks", "2", "--nodes", "3"], "--ranks is 2, expected at least --nodes"),
        (["--chunks", "1"], "expected a whole number of at least 2"),
        (["--json", "/nowhere/x.json"], "expected a file in a folder"),
    ],
)
def test_bad_options(capsys, arguments: list[str], text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        kernels_bench.parse_options(arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
