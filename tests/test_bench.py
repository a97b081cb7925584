# SPDX-License-Identifier: Apache-2.0
"""The all-to-all benchmark: its table and JSON, and that it notices wrong results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_automoe.lab import Loopback

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import counters  # noqa: E402
import options as bench_options  # noqa: E402
import report  # noqa: E402
from exchange import Measurement  # noqa: E402
from payload import Payload  # noqa: E402
from routing import Cell, draw_topk_ids, even_cell  # noqa: E402

# Stands in for a backend that delivers one wrong byte in all, on rank 0.
CORRUPT = """
import sys
sys.path.insert(0, {folder!r})
import torch
import torch.distributed as dist
import all_to_all_bench

exchange = dist.all_to_all_single
calls = 0

def corrupt(output, *args, **kwargs):
    global calls
    exchange(output, *args, **kwargs)
    calls += 1
    if dist.get_rank() == 0 and calls == 4:  # after the dtype probe: timed
        output.view(torch.uint8)[-1] ^= 1

dist.all_to_all_single = corrupt
sys.exit(all_to_all_bench.main())
"""

# Two ranks of one machine that call themselves two nodes.
TWO_NODES = """
import os, sys
sys.path.insert(0, {folder!r})
os.environ["AUTOMOE_NODE"] = "node" + os.environ["RANK"]
import all_to_all_bench
sys.exit(all_to_all_bench.main())
"""


def run_ranks(program: Path, *arguments: str, ranks: int = 2):
    """Run ``program`` as torchrun would: exit codes, rank 0's output, all errors."""
    with Loopback([ranks]) as nodes:  # which keeps a port for them
        environment = os.environ | {
            "MASTER_ADDR": nodes.master[0],
            "MASTER_PORT": str(nodes.master[1]),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        processes = [
            subprocess.Popen(
                [sys.executable, str(program), *arguments],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            texts = [process.communicate(timeout=180) for process in processes]
        finally:
            for process in processes:
                process.kill()
    codes = [process.returncode for process in processes]
    return codes, texts[0][0], "\n".join(error for _, error in texts)


def table_rows(text: str) -> list[list[str]]:
    """The fields of the lines that are not comments."""
    return [line.split() for line in text.splitlines() if line and line[0] != "#"]


def test_table_json_and_report(tmp_path):
    out, markdown = tmp_path / "out.json", tmp_path / "out.md"
    codes, text, errors = run_ranks(
        BENCHMARKS / "all_to_all_bench.py",
        *("--backend", "gloo", "--against", "gloo", "--sizes", "64,1001"),
        *("-n", "3", "-w", "1", "-d", "bfloat16,int16"),
        *("--json", str(out), "--report", str(markdown)),
    )
    assert codes == [0, 0], errors
    rows = table_rows(text)
    # size count type backend p50 p99 algbw busbw #wrong ratio sent leave line
    assert [row[:4] for row in rows] == [
        ["64", "32", "bfloat16", "gloo"],
        ["64", "32", "bfloat16", "gloo.2"],
        ["1000", "500", "bfloat16", "gloo"],
        ["1000", "500", "bfloat16", "gloo.2"],
    ]
    assert all(len(row) == 13 and row[8] == "0" for row in rows)
    assert "# gloo: left out for torch.int16" in text
    assert "# Out of bounds values : 0 OK" in text

    document = json.loads(out.read_text())
    assert document["out_of_bounds_values"] == 0
    assert document["header"]["shape"] == "2 ranks on 1 node"
    assert len(document["rows"]) == 4
    for row in document["rows"]:
        times = sorted(row["times_us"])
        assert len(times) == 3
        assert (row["median_us"], row["p99_us"]) == (times[1], times[2])
        assert row["algbw_gbps"] == pytest.approx(row["size_bytes"] / times[1] / 1e3)
        assert row["busbw_gbps"] == pytest.approx(row["algbw_gbps"] / 2)
        assert row["tx_bytes"] is None and row["line_share"] is None
    assert document["rows"][0]["time_ratio"] == 1
    assert str(tmp_path) not in markdown.read_text()
    assert "benchmarks/all_to_all_bench.py --backend gloo" in markdown.read_text()


def test_wrong_results_are_counted_and_fail_the_run(tmp_path):
    program = tmp_path / "corrupt.py"
    program.write_text(CORRUPT.format(folder=str(BENCHMARKS)))
    codes, text, errors = run_ranks(
        program,
        *("--backend", "gloo", "--against", "gloo", "--sizes", "4096"),
        *("-n", "2", "-w", "0", "-d", "float32"),
    )
    assert codes == [1, 1], errors
    # Calls 1 and 2 try the dtype; 3 and 4 are the first iteration of A and of B.
    assert [row[8] for row in table_rows(text)] == ["0", "1"]
    assert "# Out of bounds values : 1 FAILED" in text


def test_moe_cell_on_two_nodes(tmp_path):
    program, out = tmp_path / "two_nodes.py", tmp_path / "out.json"
    program.write_text(TWO_NODES.format(folder=str(BENCHMARKS)))
    codes, text, errors = run_ranks(
        program,
        *("--backend", "gloo", "--tokens", "16", "--hidden", "8", "--topk", "2"),
        *("--experts", "5", "--routing", "zipf", "-n", "2", "-w", "0"),
        *("--line-rate", "100", "--json", str(out)),
    )
    assert codes == [0, 0], errors
    document = json.loads(out.read_text())
    assert document["header"]["shape"] == "2 ranks on 2 nodes (1 each)"
    (row,) = document["rows"]
    ids = [
        draw_topk_ids(
            tokens=16,
            topk=2,
            experts=5,
            routing="zipf",
            zipf_alpha=1.0,
            seed=1,
            rank=rank,
        )
        for rank in (0, 1)
    ]
    # ceil(5 / 2) = 3 experts on rank 0, the other 2 on rank 1; rows of 16 bytes.
    to_0, to_1 = [int((i < 3).sum()) for i in ids], [int((i >= 3).sum()) for i in ids]
    leaving = [to_1[0] * 16, to_0[1] * 16]
    assert row["leaving_bytes_per_node"] == leaving
    assert row["size_bytes"] == 16 * max(32, sum(to_0), sum(to_1))
    assert row["line_share"] == pytest.approx(max(leaving) / row["median_us"] / 100)
    one_copy = int((ids[0] >= 3).any(dim=1).sum() + (ids[1] < 3).any(dim=1).sum())
    assert f"would be {one_copy * 16} B between nodes" in text


def make_cell(dtype: torch.dtype) -> Cell:
    rows = torch.tensor([[1, 2, 3], [0, 5, 1], [3, 2, 0]])
    return Cell(rows=rows, row_elements=3, dtype=dtype, even=False)


def deliver(payloads: list[Payload], cell: Cell) -> None:
    """What a right all-to-all does, in one process."""
    for dest, payload in enumerate(payloads):
        blocks = [source.input.split(source.input_splits)[dest] for source in payloads]
        payload.output.copy_(torch.cat(blocks))


@pytest.mark.parametrize("dtype", bench_options.DTYPES.values())
def test_right_results_pass_and_old_ones_do_not(dtype):
    cell = make_cell(dtype)
    payloads = [Payload(cell, rank) for rank in range(3)]
    for call in range(3):
        for payload in payloads:
            payload.renew(call)
            # Spoilt: nothing that is there counts before it has been delivered.
            assert payload.count_wrong() == payload.output.numel()
        deliver(payloads, cell)
        assert [payload.count_wrong() for payload in payloads] == [0, 0, 0]
    old = payloads[1].output.clone()
    payloads[1].renew(3)
    payloads[1].output.copy_(old)
    assert payloads[1].count_wrong() == old.numel()


def test_wrong_elements_are_counted_singly():
    cell = make_cell(torch.float32)
    payloads = [Payload(cell, rank) for rank in range(3)]
    deliver(payloads, cell)
    payload = payloads[1]
    payload.output.view(torch.uint8)[0, 3] ^= 128  # the sign alone
    payload.output.view(torch.uint8)[8, 8:] ^= 1  # four bytes of one element
    assert payload.count_wrong() == 2
    payload.output.zero_()
    assert payload.count_wrong() == payload.output.numel()


def test_swapped_blocks_are_wrong():
    cell = even_cell(4096, torch.int64, 4)
    payloads = [Payload(cell, rank) for rank in range(4)]
    # Rank 0 gets what rank 1 should have got.
    received = [payload.input.chunk(4)[1] for payload in payloads]
    payloads[0].output.copy_(torch.cat(received))
    assert payloads[0].count_wrong() == payloads[0].output.numel()


def test_leaving_bytes_of_uneven_nodes():
    rows = torch.arange(1, 26).view(5, 5)
    cell = Cell(rows=rows, row_elements=2, dtype=torch.int32, even=False)
    node_of_rank = [0, 1, 0, 2, 1]
    egress, ingress = cell.leaving_bytes(node_of_rank)
    expected = torch.zeros(2, 3, dtype=torch.int64)
    for source, s in enumerate(node_of_rank):
        for dest, d in enumerate(node_of_rank):
            if s != d:
                expected[0, s] += int(rows[source, dest]) * 8
                expected[1, d] += int(rows[source, dest]) * 8
    assert [egress, ingress] == expected.tolist()


def test_rows_of_the_issue_cell():
    # 2 ranks on each of 4 nodes, 16 MiB per rank: 6/8 of it leaves, 119.5 MB/s.
    cell = even_cell(2**24, torch.bfloat16, 8)
    nodes = [0, 0, 1, 1, 2, 2, 3, 3]
    wire_us = 2**24 * 2 * 6 / 8 / 119.5
    ours = Measurement("automoe", times_us=[wire_us] * 3, tx_bytes=[26e6] * 4)
    peer = Measurement("gloo", times_us=[2 * wire_us] * 2 + [9e9], wrong=7)
    rows = report.make_rows(cell, [ours, peer], nodes, 119.5)
    assert rows[0].line_share == pytest.approx(1.0)
    assert rows[1].line_share == pytest.approx(0.5)
    assert (rows[0].time_ratio, rows[1].time_ratio) == (1.0, pytest.approx(2.0))
    assert rows[1].p99_us == 9e9
    assert (rows[0].leaving_bytes, rows[0].tx_bytes) == (6 * 2**24, 104_000_000)
    assert rows[1].tx_bytes is None
    assert report.footer(rows)[0].endswith("7 FAILED")


def test_zipf_crowds_some_experts_and_draws_distinct_ones():
    counts = {}
    for routing in ("uniform", "zipf"):
        ids = draw_topk_ids(
            tokens=2000,
            topk=4,
            experts=16,
            routing=routing,
            zipf_alpha=1.5,
            seed=3,
            rank=0,
        )
        assert ids.shape == (2000, 4)
        assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
        counts[routing] = torch.bincount(ids.flatten(), minlength=16)
    assert counts["uniform"].max() < 1.2 * 500
    assert counts["zipf"].max() > 2 * 500


def test_route_of_an_address():
    # Columns as the kernel prints them; addresses are little-endian words.
    table = "\n".join(
        [
            "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT",
            "eth0 00000000 0100000A 0003 0 0 0 00000000 0 0 0",
            "eth0 0000000A 00000000 0001 0 0 0 00FFFFFF 0 0 0",
            "down 00004D0A 00000000 0000 0 0 0 00FFFFFF 0 0 0",
            "lab0 00004D0A 00000000 0001 0 0 0 00FFFFFF 0 0 0",
        ]
    )
    lab = counters.route_to(table, "10.77.0.9")
    assert (lab.interface, str(lab.network)) == ("lab0", "10.77.0.0/24")
    assert counters.route_to(table, "10.0.0.9").interface == "eth0"
    assert counters.route_to(table, "192.0.2.1").interface == "eth0"
    no_default = table.replace("0003", "0000")
    assert counters.route_to(no_default, "192.0.2.1") is None


def test_sizes_by_range_list_and_unit():
    parse = bench_options.parse_options
    assert parse(["-b", "1K", "-e", "64K", "-f", "4"]).sizes == [
        2**10,
        2**12,
        2**14,
        2**16,
    ]
    assert parse(["--sizes", "8,16K,4M,1G"]).sizes == [8, 2**14, 2**22, 2**30]
    assert parse(["--tokens", "4"]).dtype == [torch.bfloat16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "10,x"], "got size 'x', expected a positive number of bytes"),
        (["-b", "2M", "-e", "1M"], "--min-bytes is 2097152, expected at most"),
        (["-d", "float31"], "got dtype 'float31', expected all or some of"),
        (["-n", "0"], "expected a whole number of at least 1"),
        (["--tokens", "4", "--topk", "40"], "--topk is 40, expected at most --experts"),
        (["--tokens", "4", "--sizes", "1K"], "got --sizes and --tokens"),
        (["--line-rate", "nan"], "got 'nan', expected a positive number"),
        (
            ["--json", "/no/such/folder/x"],
            "--json is /no/such/folder/x, expected a file",
        ),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        bench_options.parse_options(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
