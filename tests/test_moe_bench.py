# SPDX-License-Identifier: Apache-2.0
"""The dispatch/combine benchmark: that its peers are right, and what it reports."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_fresh
from lab_processes import ENVIRONMENT, needs_lab

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import moe_options  # noqa: E402
import moe_plot  # noqa: E402
import moe_report  # noqa: E402
from moe_cell import MoeCell, MoePayload  # noqa: E402
from moe_dedup import RankDedup, TwoLevel  # noqa: E402
from moe_measure import Contender, Measurement, call  # noqa: E402
from moe_peers import Expanded, Stock, sum_rows  # noqa: E402

# Nodes of 5 ranks: uneven, dealt out in turn, all on one, each on its own.
LAYOUTS = [
    [0, 0, 0, 1, 1],
    [0, 0, 1, 1, 2],
    [0, 1, 0, 1, 0],
    [0, 1, 2, 0, 0],
    [0, 0, 0, 0, 0],
    [0, 1, 2, 3, 4],
]

BENCH = """
import sys
sys.path.insert(0, {folder!r})
sys.argv = ["dispatch_combine_bench.py", *{arguments!r}]
import dispatch_combine_bench
{patch}
sys.exit(dispatch_combine_bench.main())
"""

# Stands in for a peer that gets one element of its rows wrong, once, on rank 1.
CORRUPT = """
import moe_peers, torch.distributed as dist
dispatch, calls = moe_peers.Expanded.dispatch, 0

def corrupt(self, *args):
    global calls
    calls += 1
    rows, weights = dispatch(self, *args)
    if dist.get_rank() == 1 and calls == 4:
        rows[-1, -1] *= -1
    return rows, weights

moe_peers.Expanded.dispatch = corrupt
"""


def make_cell(**changes) -> MoeCell:
    """A small cell of 5 ranks with uneven tokens, one of them without."""
    values = {
        "tokens_of_rank": (7, 0, 33, 1, 12),
        "hidden": 5,
        "topk": 3,
        "experts": 13,
        "routing": "zipf",
        "zipf_alpha": 1.0,
        "dtype": torch.bfloat16,
        "seed": 1,
    }
    return MoeCell(**(values | changes))


CELLS = {
    "uneven": {},
    "one expert": {"topk": 1, "experts": 1, "dtype": torch.float32},
    "fewer experts than ranks": {"topk": 3, "experts": 3, "hidden": 1},
    "a rank without experts": {"topk": 6, "experts": 6, "dtype": torch.float64},
    "several experts each": {"topk": 8, "experts": 32, "dtype": torch.float16},
    "no tokens": {"tokens_of_rank": (0,) * 5},
    "wide": {"tokens_of_rank": (300,) * 5, "hidden": 64, "routing": "uniform"},
}


def peers_on(layout: list[int], cases: dict[str, dict]) -> dict[str, int]:
    """Wrong elements of each peer in each case, on this rank. Runs on ranks."""
    wrong = {}
    by_experts = sorted(cases, key=lambda name: make_cell(**cases[name]).experts)
    for experts, names in itertools.groupby(
        by_experts, key=lambda name: make_cell(**cases[name]).experts
    ):
        contenders = [
            Contender("expanded", Expanded(dist.group.WORLD, experts)),
            Contender("stock", Stock(dist.group.WORLD, experts)),
            Contender("rank_dedup", RankDedup(dist.group.WORLD, experts)),
            Contender("two_level", TwoLevel(layout, experts)),
        ]
        for name in names:
            payload = MoePayload(make_cell(**cases[name]), dist.get_rank())
            for number, contender in enumerate(contenders):
                payload.renew(number)
                _, outputs = call(contender, payload)
                wrong[f"{name}, {contender.label}"] = payload.count_wrong(*outputs)
    return wrong


def repeated_experts(layout: list[int]) -> list[int]:
    """Every token picks one expert twice. Wrong elements of each peer, on ranks."""
    rank, wrong = dist.get_rank(), []
    cell = make_cell()
    for ids in cell.ids:
        ids[:, 1] = ids[:, 0]
    payload = MoePayload(cell, rank)
    for peer in (
        Expanded(dist.group.WORLD, cell.experts),
        RankDedup(dist.group.WORLD, cell.experts),
        TwoLevel(layout, cell.experts),
    ):
        _, outputs = call(Contender("", peer), payload)
        wrong.append(payload.count_wrong(*outputs))
    return wrong


@pytest.mark.parametrize(
    "rank_pool", [{"nodes": [5], "backend": "gloo"}], indirect=True
)
def test_peers_give_what_they_should(rank_pool):
    for layout in LAYOUTS:
        for rank, wrong in enumerate(rank_pool.run(peers_on, layout, CELLS)):
            assert len(wrong) == 4 * len(CELLS)
            assert not any(wrong.values()), (layout, rank, wrong)
    assert rank_pool.run(repeated_experts, LAYOUTS[0]) == [[0, 0, 0]] * 5


def test_sum_rows_is_a_plain_sum():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(700, 3, generator=generator, dtype=torch.float64)
    target = torch.randint(9, (700,), generator=generator)
    weights = torch.randn(700, generator=generator, dtype=torch.float64)
    expected = torch.zeros(9, 3, dtype=torch.float64)
    for row, to, weight in zip(rows, target, weights, strict=True):
        expected[to] += row * weight
    torch.testing.assert_close(sum_rows(rows, target, 9, weights), expected)
    narrow = sum_rows(rows.bfloat16(), target, 9)
    assert narrow.dtype == torch.bfloat16 and narrow.shape == (9, 3)


class OneRank:
    """What a right peer gives when there is one rank, by plain loops."""

    def plan(self, topk_ids):
        tokens, topk = topk_ids.shape
        picks = itertools.product(range(tokens), range(topk))
        return sorted(picks, key=lambda pick: int(topk_ids[pick]))

    def dispatch(self, x, weights, plan):
        rows = torch.stack([x[token] for token, _ in plan])
        return rows, torch.stack([weights[pick] for pick in plan])

    def combine(self, rows, plan, weights, received_weights):
        sums = torch.zeros(len(weights), rows.shape[1], dtype=weights.dtype)
        for row, weight, (token, _) in zip(rows, received_weights, plan, strict=True):
            sums[token] += row * weight
        return sums.to(rows.dtype)


def one_rank(**changes) -> tuple[MoePayload, tuple]:
    payload = MoePayload(make_cell(tokens_of_rank=(20,), hidden=40, **changes), 0)
    payload.renew(2)
    seconds, outputs = call(Contender("", OneRank()), payload)
    assert len(seconds) == 3
    return payload, outputs


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_right_results_pass_and_old_ones_do_not(dtype):
    payload, (rows, weights, out) = one_rank(dtype=dtype)
    assert payload.count_wrong(rows, weights, out) == 0
    assert payload.count_wrong(rows, None, None) == 0
    for number in range(3, 9):
        payload.renew(number)
        assert payload.count_wrong(rows, None, None) == rows.numel()
        assert payload.count_wrong(rows, None, out) == rows.numel() + out.numel()
        again = call(Contender("", OneRank()), payload)[1]
        assert payload.count_wrong(*again) == 0
        rows, weights, out = again


def test_wrong_elements_are_counted_singly():
    payload, (rows, weights, out) = one_rank()
    rows[3, 39] *= -1
    weights[5] *= 1.0001
    out[0, 0] *= 1.05
    out[1, 39] = torch.nan
    assert payload.count_wrong(rows, weights, out) == 4
    assert payload.count_wrong(rows[1:], weights, out) >= rows.numel()
    assert payload.count_wrong(rows.float(), weights, None) == rows.numel() + 1


def test_a_weight_on_the_wrong_expert_is_wrong():
    payload, (rows, weights, _) = one_rank(dtype=torch.float32)
    operations = OneRank()
    plan = operations.plan(payload.ids)
    first, second = [i for i, (token, _) in enumerate(plan) if token == 4][:2]
    weights[[first, second]] = weights[[second, first]]
    out = operations.combine(rows, plan, payload.weights, weights)
    # Only where the stand-in for the experts told the rows apart.
    assert 1 <= payload.count_wrong(rows, None, out) <= 16


def test_limit_and_bound_are_those_of_one_copy_per_token_and_node():
    cell = make_cell(experts=9)  # two experts each, the last rank has one
    for layout in LAYOUTS:
        num_nodes = max(layout) + 1
        rows = torch.zeros(num_nodes, num_nodes, dtype=torch.int64)
        for rank, ids in enumerate(cell.ids):
            for token in ids.tolist():
                for node in {layout[expert // 2] for expert in token}:
                    if node != layout[rank]:
                        rows[layout[rank], node] += 1
        assert cell.crossing_rows(layout).tolist() == rows.tolist()
        assert cell.bound_bytes(layout) == 2 * int(rows.sum()) * 10
        busiest = max([*rows.sum(dim=0).tolist(), *rows.sum(dim=1).tolist()])
        assert cell.busiest_bytes(layout) == 2 * busiest * 10
    received = [
        sum((ids // 2 == rank).sum().item() for ids in cell.ids) for rank in range(5)
    ]
    assert cell.received == received


def run_bench(*arguments: str, nodes=(1, 1), patch: str = "", check: bool = True):
    """Run the benchmark on fresh ranks; rank 0's lines that are not comments."""
    source = BENCH.format(folder=str(BENCHMARKS), arguments=arguments, patch=patch)
    run = run_fresh(nodes, source, check=check)
    lines = run.stdout[0].splitlines()
    return run, [line.split() for line in lines if line and line[0] != "#"]


def test_table_json_and_report_on_two_nodes(tmp_path):
    out, markdown = tmp_path / "out.json", tmp_path / "out.md"
    contenders = ["level0", "expanded", "rank_dedup", "two_level", "stock"]
    run, table = run_bench(
        *("--contenders", ",".join(contenders), "--routing", "uniform,zipf"),
        *("--tokens", "40,3", "--hidden", "24", "--topk", "2", "--experts", "6"),
        *("-n", "3", "-w", "1", "--line-rate", "100"),
        *("--json", str(out), "--report", str(markdown)),
    )
    # T H K routing type contender p50 p99 plan dispatch combine #wrong ratio ...
    expected = itertools.product(["40", "3"], ["uniform", "zipf"], contenders)
    assert [(row[0], row[3], row[5]) for row in table] == list(expected)
    assert all(len(row) == 19 and row[11] == "0" for row in table)
    text = run.stdout[0]
    assert "# Out of bounds values : 0 OK" in text
    assert text.count("# zipf / uniform, ") == 2 * len(contenders)
    assert "# expanded / level0, dispatch: least" in text

    document = json.loads(out.read_text())
    assert document["header"]["shape"] == "2 ranks on 2 nodes (1 each)"
    for row in document["rows"]:
        cell = make_cell(
            tokens_of_rank=(row["tokens"],) * 2,
            hidden=24,
            topk=2,
            experts=6,
            routing=row["routing"],
        )
        times = sorted(row["total_ms"])
        assert (row["median_ms"], row["p99_ms"]) == (times[1], times[2])
        for phase, values in row["phases_ms"].items():
            assert sorted(values)[1] == row[f"{phase}_ms"] > 0
        assert row["bound_bytes"] == cell.bound_bytes([0, 1])
        limit = cell.busiest_bytes([0, 1]) / 100e6 * 1e3
        assert row["limit_ms"] == pytest.approx(limit)
        assert row["limit_share"] == pytest.approx(limit / times[1])
        # The library counts what its own contenders send, and only that.
        counted = row["payload_bytes"] is not None
        assert counted == (row["contender"] == "level0" and row["tx_bytes"] is not None)
    assert document["rows"][0]["time_ratio"] == 1
    assert str(tmp_path) not in markdown.read_text()
    assert "dispatch_combine_bench.py --contenders level0" in markdown.read_text()


def test_wrong_results_are_counted_and_fail_the_run():
    # Calls 1 and 2 warm up, 3 is the whole, 4 the first one in phases: all checked.
    run, table = run_bench(
        *("--contenders", "expanded", "--tokens", "9", "--hidden", "8"),
        *("-n", "1", "-w", "2"),
        patch=CORRUPT,
        check=False,
    )
    assert run.exit_code == 1
    # The row, and the one element of a sum that it is a term of.
    assert [row[11] for row in table] == ["2"]
    assert "# Out of bounds values : 2 FAILED" in run.stdout[0]


def make_rows() -> list[moe_report.Row]:
    """Two cells of 8 ranks with invented times, first uniform, then skewed."""
    rows = []
    for routing, factor in (("uniform", 1.0), ("zipf", 1.5)):
        cell = make_cell(tokens_of_rank=(64,) * 8, experts=16, routing=routing)
        results = []
        for name, ms in (("automoe", 2.0), ("expanded", 6.0), ("level0", 5.0)):
            phases = {"plan": [0.1], "dispatch": [ms / 3], "combine": [ms / 2]}
            if name == "level0":
                phases["dispatch"] = [1.0 / factor]
            results.append(Measurement(name, [ms * factor], phases, wrong=1))
        results[0].tx_bytes = [3e4] * 4
        results[0].counters = {"network_payload_bytes": 9e4, "operations": 3.0}
        rows += moe_report.make_rows(cell, results, [0, 0, 1, 1, 2, 2, 3, 3], 50.0)
    return rows


def test_rows_and_what_follows_from_them():
    rows = make_rows()
    first = rows[0]
    assert [row.time_ratio for row in rows[:3]] == [1.0, 3.0, 2.5]
    assert first.tx_bytes == 120_000
    assert first.tx_ratio == pytest.approx(120_000 / first.bound_bytes)
    assert first.payload_ratio == pytest.approx(90_000 / first.bound_bytes)
    assert rows[1].tx_ratio is None and rows[1].payload_ratio is None
    dispatch, combine, whole = moe_report.level0_lines(rows)
    assert "dispatch: least 2.000 (T=64 H=5 K=3 E=16 bfloat16 uniform)" in dispatch
    assert "median 2.500, largest 3.000, 0 of 2 cells below 0.97" in dispatch
    assert "combine: least 1.200" in combine and "least 1.200" in whole
    limits = rows[3].limit_ms / first.limit_ms
    (line, *_), count = moe_report.skew_lines(rows), len(moe_report.skew_lines(rows))
    assert count == 3
    assert line.endswith(
        f"time 1.500, limit {limits:.3f}, skew factor {1.5 / limits:.3f}"
    )
    assert moe_report.footer(rows)[-1].endswith(": 6 FAILED")


@needs_lab
def test_interfaces_carry_what_the_formula_says(tmp_path):
    arguments = ["--tokens=256", "--contenders=automoe", "--iters=3"]
    json_file = tmp_path / "run.json"
    launch = [sys.executable, "-m", "torch_automoe.cli", "lab", "--nodes=2"]
    program = str(BENCHMARKS / "dispatch_combine_bench.py")
    done = subprocess.run(
        [*launch, "--ranks-per-node=2", "--", program, *arguments, "--json", json_file],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(json_file.read_text())["rows"]
    # Weights and the plan come on top of the rows, then the headers of TCP.
    assert 1 <= row["payload_ratio"] <= row["tx_ratio"] <= 1.02, row


@pytest.mark.parametrize("cells", [2, 8])
def test_plot(tmp_path, cells):
    pytest.importorskip("matplotlib")
    rows = [
        moe_report.Row(**{**vars(row), "cell": f"{row.cell} {number}"})
        for number in range(cells // 2)
        for row in make_rows()
    ]
    assert moe_plot.write_plot(str(tmp_path / "plot.png"), rows, "title") is None
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1,x"], "got 'x', expected a whole number of at least 1"),
        (["--tokens", ","], "got ',', expected a whole number of at least 1"),
        (["--contenders", "gloo"], "got 'gloo', expected one or several of automoe,"),
        (["--routing", ""], "got '', expected one or several of uniform, zipf"),
        (["--topk", "1,40"], "--topk is 40, expected at most --experts, which is 32"),
        (["-d", "int32"], "--dtype is int32, expected float16"),
        (["-d", "float8_e5m2"], "--dtype is float8_e5m2, expected float16"),
        (["--json", "/no/such/folder/x"], "--json is /no/such/folder/x, expected"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        moe_options.parse_options(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
