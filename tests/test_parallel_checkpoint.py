# SPDX-License-Identifier: Apache-2.0
"""Distributed Checkpoint of parallel models: saved at one ep, loaded at another."""

from __future__ import annotations

import pytest
import state_cases as cases
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import RankPool
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from torch_automoe.parallel.experts import parallel_state

_RANKS = 8
_KINDS = {
    "plain": {"num_experts": 8},
    "5 experts": {"num_experts": 5, "tied": True},
}
State = dict[str, dict[str, Tensor]]


def _make(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = cases.plain_model(**_KINDS[kind])
    cases.fill(model, seed)
    return model, cases.adamw(model)


def _make_parallel(
    kind: str, ep: int, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, _ = _make(kind, seed)
    cases.shard(model, ep, model.blocks)
    return model, cases.adamw(model)


def _save(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)


def _load(
    folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, **options: bool
) -> None:
    state, optimizer_state = get_state_dict(model, optimizer)
    whole = {"model": state, "optimizer": optimizer_state}
    dcp.load(whole, checkpoint_id=folder, **options)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state,
        optim_state_dict=optimizer_state,
    )


def _values(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Whole tensors of the model, and of the optimizer by parameter."""
    values = {"model": {n: cases.whole(t) for n, t in model.state_dict().items()}}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        values[name] = {key: cases.whole(value) for key, value in state.items()}
    return values


def _assert_same_bits(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(found[name][key], tensor), (name, key)


# ---- what runs on the ranks ----


def save(folder: str, kind: str, ep: int) -> tuple[State | None, list[float]]:
    """Train, save, train on; what was saved, and the losses afterwards."""
    model, optimizer = _make_parallel(kind, ep, seed=0)
    cases.train(model, optimizer, range(2))
    values = _values(model, optimizer)
    _save(folder, model, optimizer)
    losses = cases.train(model, optimizer, range(2, 5))
    return (values if dist.get_rank() == 0 else None), losses


def load(folder: str, kind: str, ep: int, values: State) -> list[float]:
    """Load into other values, and train on."""
    model, optimizer = _make_parallel(kind, ep, seed=1)
    _load(folder, model, optimizer)
    _assert_same_bits(_values(model, optimizer), values)
    state = parallel_state(model.blocks[1].experts)
    assert state.ep.size() == ep
    return cases.train(model, optimizer, range(2, 5))


# ---- tests ----


@pytest.mark.parametrize("rank_pool", [[_RANKS]], indirect=True)
@pytest.mark.parametrize("kind", list(_KINDS))
def test_any_number_of_expert_parallel_ranks(
    rank_pool: RankPool, tmp_path, kind: str
) -> None:
    folder = str(tmp_path)
    (values, losses), *_ = rank_pool.run(save, folder, kind, 4)
    for ep in (1, 2, 8):
        for found in rank_pool.run(load, folder, kind, ep, values):
            assert found == pytest.approx(losses, abs=1e-10, rel=0)
    # One process: no group, no mesh.
    assert not dist.is_initialized()
    model, optimizer = _make(kind, seed=1)
    _load(folder, model, optimizer, no_dist=True)
    _assert_same_bits(_values(model, optimizer), values)
    found = cases.train_alone(model, optimizer, range(2, 5), _RANKS)
    assert found == pytest.approx(losses, abs=1e-10, rel=0)


@pytest.mark.parametrize("rank_pool", [[4]], indirect=True)
def test_from_one_process(rank_pool: RankPool, tmp_path) -> None:
    folder = str(tmp_path)
    model, optimizer = _make("plain", seed=0)
    cases.train_alone(model, optimizer, range(2), 4)
    values = _values(model, optimizer)
    state, optimizer_state = get_state_dict(model, optimizer)
    whole = {"model": state, "optimizer": optimizer_state}
    dcp.save(whole, checkpoint_id=folder, no_dist=True)
    losses = cases.train_alone(model, optimizer, range(2, 5), 4)
    for found in rank_pool.run(load, folder, "plain", 2, values):
        assert found == pytest.approx(losses, abs=1e-10, rel=0)
