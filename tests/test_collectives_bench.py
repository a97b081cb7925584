# SPDX-License-Identifier: Apache-2.0
"""The benchmark of all collectives: its rows, and that it notices wrong results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_bench import BENCHMARKS, run_ranks, table_rows

from operations import OPERATIONS, least_leaving_bytes  # isort: skip

# Two ranks call themselves two nodes. The second contender delivers a wrong broadcast
# to rank 1 and refuses to scatter.
FAULTY = """
import os, sys
sys.path.insert(0, {folder!r})
os.environ["AUTOMOE_NODE"] = "node" + os.environ["RANK"]
import torch.distributed as dist
import collectives_bench

broadcast, scatter = dist.broadcast, dist.scatter
make = collectives_bench.make_contenders
faulty = None

def make_contenders(options):
    global faulty
    contenders = make(options)
    faulty = contenders[1].group
    return contenders

def wrong_broadcast(tensor, src, group=None):
    broadcast(tensor, src, group=group)
    if group is faulty and dist.get_rank() == 1:
        tensor[-1] += 1

def no_scatter(*args, group=None):
    if group is faulty:
        raise RuntimeError("no scatter here\\nat all")
    scatter(*args, group=group)

dist.broadcast, dist.scatter = wrong_broadcast, no_scatter
collectives_bench.make_contenders = make_contenders
sys.exit(collectives_bench.main())
"""


def test_every_operation_a_wrong_one_and_a_refused_one(tmp_path: Path) -> None:
    program, out = tmp_path / "faulty.py", tmp_path / "out.json"
    markdown = tmp_path / "out.md"
    program.write_text(FAULTY.format(folder=str(BENCHMARKS)))
    codes, text, errors = run_ranks(
        program,
        *("--backend", "gloo", "--against", "gloo", "--sizes", "64"),
        *("--fsdp-size", "256", "-n", "3", "-w", "1", "-m", "2"),
        *("--json", str(out), "--report", str(markdown)),
    )
    assert codes == [1, 1], errors
    rows = json.loads(out.read_text())["rows"]
    assert {row["operation"] for row in rows} == set(OPERATIONS)
    by_key = {(r["operation"], r["size_bytes"], r["backend"]): r for r in rows}
    assert len(by_key) == len(rows) == 2 * (len(OPERATIONS) + 2)
    wrong = {key: row["wrong"] for key, row in by_key.items() if row["wrong"]}
    # One element, in the check before the timed calls and in the one after them.
    assert wrong == {("broadcast", 64, "gloo.2"): 2}

    refused = by_key["scatter", 64, "gloo.2"]
    assert (refused["median_us"], refused["refused"]) == (None, "no scatter here")
    assert "# gloo.2 refuses scatter: no scatter here" in text
    assert "n/a" in [row[3] for row in table_rows(text)]

    gathered = by_key["all_gather_into_tensor", 256, "gloo"]
    assert sorted(gathered["times_us"])[1] == gathered["median_us"]
    assert len(gathered["times_us"]) == 3
    assert (gathered["time_ratio"], gathered["leaving_bytes"]) == (1, 256)
    assert by_key["barrier", 0, "gloo"]["leaving_bytes"] is None
    assert "# Out of bounds values : 2 FAILED" in text
    assert "| broadcast | 64 | gloo.2 |" in markdown.read_text()


@pytest.mark.parametrize(
    ("operation", "leaving"),
    [
        # The node of one rank misses 5 parts of 200, those of two and three 4 and 3.
        ("all_gather_into_tensor", 200 * (5 + 4 + 3)),
        ("reduce_scatter_tensor", 200 * (5 + 4 + 3)),
        ("all_reduce", 2 * 200 * (5 + 4 + 3)),
        ("broadcast", 1200 * 2),
        ("gather", 200 * 4),
        ("all_to_all", 200 * 2 * (2 * 1 + 2 * 3 + 1 * 3)),
        ("send_recv", 1200 * 2),
        ("barrier", None),
    ],
)
def test_what_must_leave_nodes_of_2_1_and_3_ranks(
    operation: str, leaving: int | None
) -> None:
    assert least_leaving_bytes(operation, 1200, [0, 0, 1, 2, 2, 2]) == leaving
