# SPDX-License-Identifier: Apache-2.0
"""The parts of the training example that need no group, and its whole programs."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_automoe.balance.metrics import load_balance_stats
from torch_automoe.lab import Lab
from torch_automoe.train import checkpoint, launch
from torch_automoe.train.cli import add_arguments
from torch_automoe.train.config import TrainConfig, UsageError, config_from_args
from torch_automoe.train.data import (
    held_out_windows,
    load_text,
    training_batch,
    unigram_entropy,
)
from torch_automoe.train.metrics import RunLog


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def read_steps(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    """20 kB of Python source in one file, which ranks read faster than 12 MB."""
    path = tmp_path / "text.py"
    path.write_bytes(Path(argparse.__file__).read_bytes()[:20_000])
    return str(path)


def test_newest_checkpoint_ignores_what_is_incomplete(tmp_path) -> None:
    assert checkpoint.newest_checkpoint(tmp_path) is None
    for name in ("step-000002", "step-000010", "partial-step-000012"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "position.json").write_text("{}")
    (tmp_path / "step-000011").mkdir()
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-000010"


# ------------------------------------------------------------------------ text


def test_standard_library_is_read_alike_and_split_by_files() -> None:
    first, second = load_text("", 129), load_text("", 129)
    assert first.crc32 == second.crc32
    assert len(first.train) > 5_000_000
    assert 0.02 < len(first.held_out) / len(first.train) < 0.15
    assert 4 < unigram_entropy(first.held_out) < 5.2


def test_folder_holds_out_whole_files(tmp_path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text(f"file {number:02d} " * 20)
    (tmp_path / "binary").write_bytes(b"\0" * 999)
    (tmp_path / ".hidden").write_text("hidden " * 99)
    text = load_text(str(tmp_path), 10)
    train, held_out = bytes(text.train.tolist()), bytes(text.held_out.tolist())
    assert b"file 19" in held_out
    assert b"file 39" in held_out
    for number in range(40):
        name = f"file {number:02d}".encode()
        assert (name in train) != (name in held_out), name
    assert b"\0" not in train
    assert b"hidden" not in train


def test_single_file_holds_out_its_end(tmp_path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(200)) * 10)
    text = load_text(str(tmp_path / "text"), 10)
    assert len(text.train) == 1900
    assert text.held_out.tolist() == list(range(100, 200))


def test_text_errors_name_the_option_and_the_size(tmp_path) -> None:
    with pytest.raises(UsageError, match="--data.*missing.*does not exist"):
        load_text(str(tmp_path / "missing"), 10)
    (tmp_path / "short").write_text("abc")
    with pytest.raises(UsageError, match="--data.*has 3 bytes.*at least 129"):
        load_text(str(tmp_path / "short"), 129)


def test_batches_depend_on_seed_and_step_alone() -> None:
    text = torch.arange(256, dtype=torch.uint8).repeat(4)
    draw = {"seed": 1, "batch": 3, "seq_len": 5}
    batch = training_batch(text, 7, **draw)
    assert batch.shape == (3, 6)
    assert torch.equal(batch, training_batch(text, 7, **draw))
    assert not torch.equal(batch, training_batch(text, 8, **draw))
    assert not torch.equal(batch, training_batch(text, 7, **{**draw, "seed": 2}))
    assert torch.equal((batch[:, 1:] - batch[:, :-1]) % 256, torch.ones(3, 5).long())


def test_held_out_windows_span_the_whole_part() -> None:
    windows = held_out_windows(
        torch.arange(100, dtype=torch.uint8), num_windows=4, seq_len=9
    )
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    assert windows[-1, -1].item() == 99


def test_unigram_entropy() -> None:
    assert unigram_entropy(torch.arange(256, dtype=torch.uint8)) == pytest.approx(8)
    assert unigram_entropy(torch.zeros(9, dtype=torch.uint8)) == 0


# --------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "--num-experts is 0, expected at least 1"),
        ({"batch": 6}, "--batch is 6, expected a multiple of the number of ranks, 4"),
        ({"top_k": 9}, "--top-k is 9, expected at most --num-experts 8"),
        ({"ep": 3}, "--ep is 3, expected a divisor of the number of ranks, 4"),
        ({"dim": 30}, "--dim is 30, expected a multiple of 2 [*] --heads = 8"),
        ({"ep": 1, "expert_dim": 6}, "--expert-dim is 6, expected a multiple of"),
        ({"eval_windows": 6}, "--eval-windows is 6, expected a multiple"),
        ({"lr": 0.0}, "--lr is 0.0, expected more than 0"),
        ({"seed": -1}, "--seed is -1, expected at least 0"),
    ],
)
def test_wrong_options_are_named_with_both_values(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**options).check(world_size=4)


def test_configuration_survives_the_command_line() -> None:
    config = TrainConfig(data="-a b", resume=True, lr=1e-5, prompt="x = ", seed=3)
    assert config_from_args(parse(*config.to_argv())) == config
    TrainConfig().check(world_size=4)
    TrainConfig().check(world_size=8)


# --------------------------------------------------------------------- display


def test_log_shows_some_steps_and_keeps_all(tmp_path) -> None:
    stream = io.StringIO()
    log = RunLog(tmp_path, enabled=True, as_json=False, stream=stream)
    balance = load_balance_stats(torch.tensor([[3, 1], [2, 2]]))
    names = ("loss", "bpb", "grad_norm", "memory_gib", "tps", "comm_pct")
    for step in range(1, 6):
        record = {"step": step, **dict.fromkeys(names, 1.0), **balance}
        log.step(record, last=step == 5, every=1e9)
    shown = stream.getvalue().splitlines()
    assert [line.split()[1] for line in shown] == ["1", "5"]
    for name in ("step", "loss", "grad_norm", "memory", "tps", "bpb", "comm"):
        assert f"{name}:" in shown[0]
    assert "\033" not in stream.getvalue()
    assert [record["step"] for record in read_steps(tmp_path)] == [1, 2, 3, 4, 5]


def test_resumed_log_drops_the_steps_that_come_again(tmp_path) -> None:
    lines = [{"step": 1}, {"step": 2}, {"held_out_bpb": 2.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    RunLog(tmp_path, enabled=True, as_json=False, first_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


# ----------------------------------------------------------------- where it runs


@pytest.mark.parametrize(
    ("possible", "arguments", "ranks_per_node"),
    [
        (True, (None, None, None), (2, 2)),
        (True, ("3", 1, "1gbit"), (1, 1, 1)),
        (True, ("3,3,2", None, None), (3, 3, 2)),
        (True, ("1", None, None), (4,)),
        (False, (None, None, None), (4,)),
        (False, (None, 2, None), (2,)),
    ],
)
def test_nodes_are_emulated_where_that_is_possible(
    monkeypatch, possible, arguments, ranks_per_node
) -> None:
    answer = (possible, "" if possible else "no namespaces")
    monkeypatch.setattr(launch, "available", lambda shaped: answer)
    where = launch.choose_nodes(*arguments)
    assert where.spec.ranks_per_node == ranks_per_node
    assert isinstance(where, Lab) == (possible and len(ranks_per_node) > 1)


def test_nodes_that_were_asked_for_are_not_replaced(monkeypatch) -> None:
    monkeypatch.setattr(launch, "available", lambda shaped: (False, "no namespaces"))
    with pytest.raises(UsageError, match="--nodes is 2, but no namespaces"):
        launch.choose_nodes("2", None, None)
    with pytest.raises(UsageError, match="--rate is 1gbit, but no namespaces"):
        launch.choose_nodes(None, None, "1gbit")


# ---------------------------------------------------------------- whole programs

SHORT = [
    *("--steps=2", "--batch=2", "--seq-len=16", "--dim=16", "--heads=2"),
    *("--eval-windows=2", "--sample-bytes=4", "--expert-dim=8"),
]


def run_program(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for name in ("RANK", "WORLD_SIZE"):
        env.pop(name, None)
    return subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_starts_its_own_ranks(text_file, tmp_path) -> None:
    command = ["torch_automoe.cli", "train", "--nodes=1", "--ranks-per-node=2"]
    done = run_program(*command, *SHORT, f"--data={text_file}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 on backend" in done.stdout
    assert "bits per byte (unigram entropy" in done.stdout
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert len(read_steps(run_dir)) == 2

    resumed = [*SHORT, f"--data={text_file}", "--resume", "--steps=3", "--json"]
    done = run_program(*command, *resumed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record.get("step") for record in records] == [3, None]
    assert len(read_steps(run_dir)) == 3


def test_program_runs_under_torchrun(text_file, tmp_path) -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    script = ["torch_automoe.train", *SHORT, f"--data={text_file}", "--run-dir=run"]
    done = run_program(*command, *script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(read_steps(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data=missing"], "--data is missing, expected a file or folder"),
        (["--num-experts=0"], "--num-experts is 0, expected at least 1"),
        (["--nodes=3,x"], "--nodes: got '3,x'"),
        (["--rate=fast"], "--rate: got 'fast'"),
        (["--nodes=1", "--rate=1gbit"], "--rate is 1gbit, but one node has no link"),
    ],
)
def test_wrong_usage_ends_with_code_2(argv, message, tmp_path) -> None:
    done = run_program("torch_automoe.cli", "train", *argv, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("automoe train: error: ")
    assert message in done.stderr
