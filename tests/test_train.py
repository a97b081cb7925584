# SPDX-License-Identifier: Apache-2.0
"""The training example: what it learns, and that parallel and single runs agree."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)

import torch_automoe as automoe
from torch_automoe.train import exchange, parallel
from torch_automoe.train.config import TrainConfig, UsageError
from torch_automoe.train.data import (
    load_text,
    training_batch,
)
from torch_automoe.train.loop import Run

BACKEND = "automoe"
TOLERANCE = 1e-9

# A few exact steps: every option that could differ between numbers of ranks is on,
# the gradient is clipped, and 32 tokens leave some of the experts without any.
EXACT = {
    "dtype": "float64",
    "steps": 4,
    "batch": 4,
    "seq_len": 8,
    "dim": 16,
    "heads": 2,
    "num_experts": 16,
    "top_k": 2,
    "expert_dim": 8,
    "warmup": 2,
    "max_norm": 0.5,
    "bias_update_rate": 0.05,
    "aux_loss_coef": 0.1,
    "eval_windows": 4,
    "sample_bytes": 0,
}


def read_steps(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step" in record]


def read_summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])


def run_training(options: dict) -> dict[str, list] | None:
    """On a rank: a whole run; rank 0 returns the final weights, unsharded."""
    config = TrainConfig(**options)
    config.check(dist.get_world_size())
    run = Run(config, load_text(config.data, config.seq_len + 1))
    run.train()
    state = get_model_state_dict(
        run.model, options=StateDictOptions(full_state_dict=True)
    )
    if dist.get_rank() != 0:
        return None
    return {name: weight.tolist() for name, weight in state.items()}


def largest_difference(ours: dict[str, list], theirs: dict[str, list]) -> float:
    assert ours.keys() == theirs.keys()
    differences = [
        torch.tensor(ours[name], dtype=torch.float64)
        - torch.tensor(theirs[name], dtype=torch.float64)
        for name in ours
    ]
    return max(difference.abs().max().item() for difference in differences)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """80 kB of Python source in one file, so that no rank reads 12 MB."""
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_bytes(Path(argparse.__file__).read_bytes()[:80_000])
    return str(path)


# ------------------------------------------- one rank and many ranks agree


@pytest.fixture(scope="module")
def single_runs(
    make_rank_pool, text_file, tmp_path_factory
) -> dict[int, tuple[dict[str, list], Path]]:
    """Per number of experts: final weights and run folder of one rank on Gloo."""
    pool = make_rank_pool([1], backend="gloo")
    runs = {}
    for num_experts in (16, 6, 5):
        run_dir = tmp_path_factory.mktemp("single")
        options = {"data": text_file, "num_experts": num_experts}
        options["run_dir"] = str(run_dir)
        runs[num_experts] = (pool.run(run_training, {**EXACT, **options})[0], run_dir)
    return runs


@pytest.mark.parametrize(
    ("backend", "nodes", "ep", "num_experts"),
    [
        ("automoe", [2, 2], 4, 16),
        ("automoe", [2, 2], 2, 16),  # FSDP shards each expert over two ranks
        ("automoe", [2, 2], 1, 16),  # no expert parallelism
        ("automoe", [2, 2], 4, 6),  # experts per rank: 2, 2, 2, 0
        ("automoe", [2, 1, 1], 4, 5),  # uneven nodes, experts per rank: 2, 2, 1, 0
        ("gloo", [2, 2], 4, 16),
    ],
)
def test_many_ranks_agree_with_one(
    make_rank_pool, single_runs, text_file, tmp_path, backend, nodes, ep, num_experts
) -> None:
    expected, single_dir = single_runs[num_experts]
    options = {**EXACT, "data": text_file, "num_experts": num_experts, "ep": ep}
    options["run_dir"] = str(tmp_path)
    got = make_rank_pool(nodes, backend=backend).run(run_training, options)[0]

    for ours, theirs in zip(read_steps(tmp_path), read_steps(single_dir), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) <= TOLERANCE
        assert abs(ours["moe/aux_loss"] - theirs["moe/aux_loss"]) <= TOLERANCE
        assert abs(ours["grad_norm"] - theirs["grad_norm"]) <= TOLERANCE
        assert ours["moe/cv_mean"] == theirs["moe/cv_mean"]
        assert theirs["grad_norm"] > EXACT["max_norm"], "clipping was not tested"
    assert largest_difference(got, expected) <= TOLERANCE
    ours, theirs = read_summary(tmp_path), read_summary(single_dir)
    assert abs(ours["held_out_bpb"] - theirs["held_out_bpb"]) <= TOLERANCE
    if num_experts == 16:
        dead = [step["moe/dead_expert_frac_mean"] for step in read_steps(tmp_path)]
        assert max(dead) > 0, "no expert was without tokens"


@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3"])
def test_stock_models_train_alike_on_many_ranks(
    make_rank_pool, text_file, tmp_path, model
) -> None:
    pytest.importorskip("transformers", reason="the model is one of its")
    options = {**EXACT, "data": text_file, "model": model, "bias_update_rate": 0.001}
    one = {**options, "run_dir": str(tmp_path / "one")}
    expected = make_rank_pool([1], backend="gloo").run(run_training, one)[0]
    for ep in (4, 2):
        run_dir = tmp_path / str(ep)
        many = {**options, "ep": ep, "run_dir": str(run_dir)}
        got = make_rank_pool([2, 2], backend=BACKEND).run(run_training, many)[0]
        both = zip(read_steps(run_dir), read_steps(tmp_path / "one"), strict=True)
        for ours, theirs in both:
            # Their routers work in float32, whose sums depend on the batch.
            assert abs(ours["loss"] - theirs["loss"]) <= 1e-6
            assert ours["moe/cv_mean"] == theirs["moe/cv_mean"]
            assert theirs["moe/expert_utilization_max"] > 0
        assert largest_difference(got, expected) <= 1e-4


# ------------------------------------------------------------------- learning


def test_loss_falls_well_below_the_unigram_entropy(make_rank_pool, tmp_path) -> None:
    options = {
        "steps": 160,
        "seq_len": 64,
        "warmup": 10,
        "dim": 64,
        "layers": 1,
        "expert_dim": 64,
        "lr": 1e-2,
        "eval_windows": 64,
        "sample_bytes": 24,
        "run_dir": str(tmp_path),
    }
    make_rank_pool([2, 2], backend=BACKEND).run(run_training, options)
    summary = read_summary(tmp_path)
    steps = read_steps(tmp_path)
    assert 4 < summary["unigram_entropy"] < 5.2
    assert summary["held_out_bpb"] < summary["unigram_entropy"] - 0.9
    assert steps[0]["bpb"] == pytest.approx(8, abs=0.3)
    assert summary["sample"].startswith("def ")
    assert len(summary["sample"].encode()) >= 28
    assert summary["exchange"]


def test_metrics_hold_torchtitans_names_and_the_balance(
    make_rank_pool, text_file, tmp_path
) -> None:
    options = {**EXACT, "data": text_file, "run_dir": str(tmp_path)}
    make_rank_pool([2, 2], backend=BACKEND).run(run_training, options)
    steps = read_steps(tmp_path)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        assert record["bpb"] == pytest.approx(record["loss"] / math.log(2))
        assert record["moe/aux_loss"] > 0.5
        assert record["tps"] > 0
        assert 0 < record["comm_pct"] <= 100
        assert record["comm/all_to_all_pct"] > 0
        assert record["comm/fsdp_pct"] > 0
        assert record["memory_gib"] > 0
        assert record["moe/expert_utilization_min"] <= 1
        assert 1 <= record["moe/expert_utilization_max"] <= 16 / 2
    config = json.loads((tmp_path / "config.json").read_text())
    assert TrainConfig(**config) == TrainConfig(**options)


def test_bfloat16_stays_close_to_float32(make_rank_pool, text_file, tmp_path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        options = {**EXACT, "data": text_file, "dtype": dtype, "ep": 2}
        options["run_dir"] = str(tmp_path / dtype)
        make_rank_pool([2, 2], backend=BACKEND).run(run_training, options)
        losses[dtype] = [record["loss"] for record in read_steps(tmp_path / dtype)]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.05)
    assert losses["bfloat16"] != losses["float32"]


# ------------------------------------------------------- the layer by itself


def moe_against_plain_loop(num_tokens_of_rank: list[int]) -> dict[str, float]:
    """On a rank: compare outputs and all gradients with a loop over tokens."""
    rank, group = dist.get_rank(), dist.group.WORLD
    dim, num_experts, top_k = 6, 5, 2
    torch.manual_seed(1)
    experts = automoe.Experts(num_experts, dim, expert_dim=4)
    moe = automoe.MoE(dim, experts, num_experts=num_experts, top_k=top_k).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    x_of_rank = [torch.randn(1, n, dim).double() for n in num_tokens_of_rank]
    grad_of_rank = [torch.randn(1, n, dim).double() for n in num_tokens_of_rank]

    x = torch.cat(x_of_rank, 1).requires_grad_()
    expected = plain_moe(moe, x[0])
    expected.backward(torch.cat(grad_of_rank, 1)[0])
    expected_grads = {name: p.grad for name, p in moe.named_parameters()}
    moe.zero_grad()

    per_rank = -(-num_experts // dist.get_world_size())
    own = slice(rank * per_rank, (rank + 1) * per_rank)
    for name, weight in list(moe.experts.named_parameters()):
        setattr(moe.experts, name, torch.nn.Parameter(weight.data[own].clone()))
    moe.group = group
    own_x = x_of_rank[rank].requires_grad_()
    out = moe(own_x)
    out.backward(grad_of_rank[rank])

    start = sum(num_tokens_of_rank[:rank])
    tokens = slice(start, start + num_tokens_of_rank[rank])
    pairs = {"out": (out[0], expected[tokens]), "x": (own_x.grad[0], x.grad[0, tokens])}
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient on rank {rank}"
        if name.startswith("experts"):
            pairs[name] = (parameter.grad, expected_grads[name][own])
        else:
            dist.all_reduce(parameter.grad)
            pairs[name] = (parameter.grad, expected_grads[name])
    return {
        name: (ours - theirs).abs().max().item() if ours.numel() else 0.0
        for name, (ours, theirs) in pairs.items()
    }


def plain_moe(moe: automoe.MoE, x: torch.Tensor) -> torch.Tensor:
    """The layer's definition, token by token, without any exchange."""
    rows = []
    for row in x:
        scores = (moe.router.weight @ row).softmax(-1)
        chosen = scores.topk(moe.router.top_k)[1]
        weights = scores[chosen] / scores[chosen].sum()
        out = torch.zeros_like(row)
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            gate, up = (row @ moe.experts.gate_up_proj[expert]).chunk(2)
            out = out + weight * ((F.silu(gate) * up) @ moe.experts.down_proj[expert])
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "num_tokens_of_rank",
    [[5, 3, 7, 1], [0, 6, 0, 1], [1, 0, 0, 0]],
    ids=["uneven", "two ranks without tokens", "one token in all"],
)
def test_moe_layer_equals_a_plain_loop(make_rank_pool, num_tokens_of_rank) -> None:
    pool = make_rank_pool([2, 2], backend=BACKEND)
    for differences in pool.run(moe_against_plain_loop, num_tokens_of_rank):
        assert max(differences.values()) <= 1e-12, differences


def norm_against_full_gradients(options: dict) -> list[float]:
    """On a rank: the clipped norm, and that of the gathered gradients before/after."""
    config = TrainConfig(**options)
    run = Run(config, load_text(config.data, config.seq_len + 1))
    batch = training_batch(
        run.text.train, 1, seed=0, batch=config.batch, seq_len=config.seq_len
    )
    run._loss(batch).backward()

    def full_norm() -> float:
        grads = [p.grad.full_tensor() for p in run.model.parameters()]
        return torch.cat([grad.flatten() for grad in grads]).norm().item()

    before = full_norm()
    return [parallel.clip_grad_norm_(run.model, 0.25), before, full_norm()]


def test_clipping_uses_the_norm_over_both_meshes(
    make_rank_pool, text_file, tmp_path
) -> None:
    options = {**EXACT, "data": text_file, "ep": 2, "run_dir": str(tmp_path)}
    for norm, before, after in make_rank_pool([2, 2], backend=BACKEND).run(
        norm_against_full_gradients, options
    ):
        assert norm == pytest.approx(before, abs=1e-12)
        # As torch has it: a small number keeps it from dividing by 0.
        assert after == pytest.approx(0.25 * before / (before + 1e-6), abs=1e-12)


# ------------------------------------------------------------------ checkpoint


def test_resume_repeats_the_uninterrupted_run(
    make_rank_pool, text_file, tmp_path
) -> None:
    options = {**EXACT, "data": text_file, "steps": 6, "checkpoint_every": 2}
    options = {**options, "dtype": "float32", "run_dir": str(tmp_path)}
    pool = make_rank_pool([2, 2], backend=BACKEND)
    parameters = pool.run(run_training, options)[0]
    whole = read_steps(tmp_path)
    # Two checkpoints are kept, and nothing half-written.
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006"]

    shutil.rmtree(tmp_path / "checkpoints" / "step-000006")
    resumed = pool.run(run_training, {**options, "resume": True})[0]
    assert largest_difference(resumed, parameters) == 0
    for again, before in zip(read_steps(tmp_path), whole, strict=True):
        for name in ("step", "loss", "grad_norm", "moe/cv_mean", "lr"):
            assert again[name] == before[name], (before["step"], name)


@pytest.fixture(scope="module")
def checkpointed_run(
    make_rank_pool, text_file, tmp_path_factory
) -> tuple[dict, dict[str, list], Path]:
    """Options, final weights and folder of a run that kept its second step."""
    run_dir = tmp_path_factory.mktemp("checkpointed")
    options = {**EXACT, "data": text_file, "checkpoint_every": 2}
    pool = make_rank_pool([2, 2], backend=BACKEND)
    weights = pool.run(run_training, {**options, "run_dir": str(run_dir)})[0]
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    return options, weights, run_dir


@pytest.mark.parametrize(("nodes", "ep"), [([2, 2], 2), ([2], 2), ([1], 1)])
def test_checkpoint_loads_at_another_number_of_ranks(
    make_rank_pool, checkpointed_run, tmp_path, nodes, ep
) -> None:
    options, expected, run_dir = checkpointed_run
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    options = {**options, "ep": ep, "resume": True, "run_dir": str(tmp_path)}
    got = make_rank_pool(nodes, backend=BACKEND).run(run_training, options)[0]
    for ours, theirs in zip(read_steps(tmp_path), read_steps(run_dir), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) <= TOLERANCE
    assert largest_difference(got, expected) <= TOLERANCE


def plan_of_rank(topk_ids_of_rank: list[list[list[int]]], num_experts: int) -> list:
    topk_ids = torch.tensor(topk_ids_of_rank[dist.get_rank()]).view(-1, 2)
    plan = exchange.plan(topk_ids, num_experts, dist.group.WORLD)
    x = topk_ids[:, :1].double() * 10 + dist.get_rank()
    rows, weights = exchange.dispatch(x, x.new_ones(topk_ids.shape), plan)
    assert weights.tolist() == [1.0] * len(rows)
    return [plan.num_tokens_per_expert.tolist(), rows.flatten().tolist()]


def test_rows_arrive_by_expert_then_source_rank(make_rank_pool) -> None:
    pool = make_rank_pool([2], backend=BACKEND)
    topk_ids_of_rank = [[[0, 2], [1, 0]], [[2, 1]]]
    got = pool.run(plan_of_rank, topk_ids_of_rank, 3)
    # Rank 0 owns experts 0 and 1, rank 1 owns expert 2. A row is 10 * its token's
    # first expert + its source rank.
    assert got[0] == [[2, 2], [0.0, 10.0, 10.0, 21.0]]
    assert got[1] == [[2], [0.0, 21.0]]


def usage_error(options: dict) -> str:
    config = TrainConfig(**options)
    with pytest.raises(UsageError) as caught:
        Run(config, load_text(config.data, config.seq_len + 1))
    return str(caught.value)


def test_what_a_run_folder_can_refuse(make_rank_pool, text_file, tmp_path) -> None:
    options = {**EXACT, "data": text_file, "run_dir": str(tmp_path)}
    pool = make_rank_pool([2], backend=BACKEND)
    assert "no checkpoint" in pool.run(usage_error, {**options, "resume": True})[0]
    pool.run(run_training, options)
    assert "--resume" in pool.run(usage_error, options)[0]
    other = {**options, "resume": True, "dim": 32}
    message = pool.run(usage_error, other)[0]
    assert "--dim 16" in message
    assert "has 32" in message


def different_text(files: list[str]) -> str:
    return usage_error({**EXACT, "data": files[dist.get_rank()]})


def test_ranks_that_read_different_text_are_found(
    make_rank_pool, text_file, tmp_path
) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(Path(text_file).read_bytes()[::-1])
    pool = make_rank_pool([2], backend=BACKEND)
    for message in pool.run(different_text, [text_file, str(other)]):
        assert "different text" in message
