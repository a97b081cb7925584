# SPDX-License-Identifier: Apache-2.0
"""LoRA of PEFT on parallel experts: equal to PEFT in one process."""

from __future__ import annotations

import pytest
import state_cases as cases
import torch
import torch.distributed as dist
from distributed import RankPool
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import torch_automoe as automoe

peft = pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("transformers", reason="needs transformers")

_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_STEPS = range(5)


def _lora_model(kind: str, *, adapters: int = 1, **options: object) -> nn.Module:
    """A tiny model in PEFT, with adapters that are not zero."""
    parameters = list(_EXPERTS)
    if kind == "gpt_oss":
        parameters.append("mlp.experts.gate_up_proj_bias")
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}
    settings |= {"target_parameters": parameters, **options}
    model = cases.hf_model(kind)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for index in range(1, adapters):
        more = peft.LoraConfig(**{**settings, "lora_alpha": 7})
        model.add_adapter(f"more{index}", more)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2, generator=generator)
    return model


def _blocks(model: nn.Module) -> nn.ModuleList:
    return model.get_base_model().model.layers


def _one_process(model: nn.Module) -> nn.Module:
    reference = cases.one_process(model)
    reference.get_base_model().set_experts_implementation("eager")
    return reference


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys() and found
    return max((found[name] - expected[name]).abs().max().item() for name in found)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: cases.whole(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: cases.whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


# ---- what runs on the ranks ----


def compare(kind: str, ep: int, mode: str, **options: object) -> None:
    """Logits, gradients of the first step, and five steps."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = _lora_model(kind, **options)
    reference = _one_process(model)
    _parallelize(model, ep, mode)
    # Before the first forward, which leaves the root's parameters gathered.
    optimizer = cases.adamw(model)
    ids = cases.tokens(size)[rank : rank + 1]
    with torch.no_grad():
        found, expected = cases.logits_of(model, ids), cases.logits_of(reference, ids)
    assert (found - expected).abs().max().item() <= 1e-10
    gradients: dict[str, list[dict[str, Tensor]]] = {"found": [], "expected": []}

    def keep(which: str):
        def on_gradients(model: nn.Module) -> None:
            if mode == "by hand":
                _average(model if which == "found" else None)
            gradients[which].append(_gradients(model))

        return on_gradients

    losses = cases.train(model, optimizer, _STEPS, keep("found"))
    alone = cases.train_alone(
        reference, cases.adamw(reference), _STEPS, size, keep("expected")
    )
    for found, expected in zip(gradients["found"], gradients["expected"], strict=True):
        assert _difference(found, expected) <= 1e-10
    experts = [name for name in gradients["found"][0] if ".experts." in name]
    assert len(experts) == 2 * 2 * (3 if kind == "gpt_oss" else 2)
    assert all(gradients["found"][0][name].abs().max() > 1e-4 for name in experts)
    assert losses == pytest.approx(alone, abs=1e-10, rel=0)
    assert _difference(_trained(model), _trained(reference)) <= 1e-10
    assert "LoRA on down_proj" in automoe.explain(model)


def _parallelize(model: nn.Module, ep: int, mode: str) -> None:
    if mode in ("nested", "per parameter"):
        cases.shard(model, ep, _blocks(model), nested=mode == "nested")
        return
    mesh = automoe.init_moe_mesh("cpu", ep=ep)
    automoe.parallelize(model, mesh, fully_shard_experts=mode != "by hand")
    if mode == "wrapper":
        for block in _blocks(model):
            fully_shard(block.mlp.experts, mesh=mesh.dense)
        fully_shard(model, mesh=mesh.dense)


def _average(model: nn.Module | None) -> None:
    for parameter in model.parameters() if model is not None else ():
        if parameter.requires_grad:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def replicate_tokens() -> None:
    """Tensor parallel ranks have the same tokens and LoRA, but other experts."""
    model = _lora_model("qwen3_moe")
    reference = _one_process(model)
    mesh = automoe.init_moe_mesh("cpu", ep=4, tp=2)
    automoe.parallelize(model, mesh)
    fully_shard(model, mesh=mesh.dense)
    rank, size = mesh.dense.get_local_rank(), mesh.dense.size()
    ids = cases.tokens(size)
    cases.loss_of(model, ids[rank : rank + 1]).backward()
    for index in range(size):
        (cases.loss_of(reference, ids[index : index + 1]) / size).backward()
    assert _difference(_gradients(model), _gradients(reference)) <= 1e-10


def switch_adapters() -> None:
    """Only active adapters count; disabled, none does."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = _lora_model("qwen3_moe", adapters=2)
    reference = _one_process(model)
    cases.shard(model, 2, _blocks(model))
    ids = cases.tokens(size)[rank : rank + 1]
    seen = []

    @torch.no_grad()
    def same() -> None:
        found, expected = cases.logits_of(model, ids), cases.logits_of(reference, ids)
        assert (found - expected).abs().max().item() <= 1e-10
        assert all((found - other).abs().max() > 1e-3 for other in seen)
        seen.append(found)

    same()
    for one in (model, reference):
        one.set_adapter("more1")
    same()
    for one in (model, reference):
        one.base_model.set_adapter(["default", "more1"])
    same()
    with model.disable_adapter(), reference.disable_adapter():
        same()


def refuse_late() -> list[str]:
    """PEFT after parallelize, and merging, are refused."""
    texts = []
    mesh = automoe.init_moe_mesh("cpu", ep=2)
    model = cases.hf_model("qwen3_moe")
    automoe.parallelize(model, mesh)
    config = peft.LoraConfig(target_modules=[], target_parameters=_EXPERTS)
    wrapped = _lora_model("qwen3_moe")
    automoe.parallelize(wrapped, mesh)
    attempts = [
        lambda: peft.get_peft_model(model, config),
        wrapped.merge_adapter,
        wrapped.merge_and_unload,
        wrapped.unload,
    ]
    for attempt in attempts:
        with pytest.raises(ValueError) as error:
            attempt()
        texts.append(str(error.value))
    return texts


def refuse_wrappers() -> list[str]:
    """What cannot be kept is named; the model is as it was."""
    texts = []
    mesh = automoe.init_moe_mesh("cpu", ep=2)
    for change in (_merge, _add_dropout, _add_variant, _lower_precision):
        model = _lora_model("qwen3_moe")
        change(model)
        before = type(_blocks(model)[0].mlp.experts.base_layer)
        with pytest.raises(ValueError) as error:
            automoe.parallelize(model, mesh)
        texts.append(str(error.value))
        assert type(_blocks(model)[0].mlp.experts.base_layer) is before
        assert automoe.explain(model) == "no module of this model is expert parallel"
    return texts


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class _Block(nn.Module):
    """A block with a list of experts, in the way of transformers 4."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(_Expert() for _ in range(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, 1)
        weights, ids = self.gate(x).softmax(-1).topk(self.top_k)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, k = (ids == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, k, None])
        return out.view_as(hidden_states)


def refuse_lists() -> str:
    """LoRA inside experts that would be stacked."""
    model = peft.get_peft_model(
        nn.Sequential(_Block()), peft.LoraConfig(target_modules=["up"])
    )
    with pytest.raises(ValueError) as error:
        automoe.parallelize(model, automoe.init_moe_mesh("cpu", ep=2))
    return str(error.value)


def _merge(model: nn.Module) -> None:
    model.merge_adapter()


def _add_dropout(model: nn.Module) -> None:
    _blocks(model)[0].mlp.experts.lora_dropout["default"] = nn.Dropout(0.1)


def _add_variant(model: nn.Module) -> None:
    _blocks(model)[1].mlp.experts.lora_variant["default"] = object()


def _lower_precision(model: nn.Module) -> None:
    for block in _blocks(model):
        experts = block.mlp.experts.get_base_layer()
        experts.gate_up_proj.data = experts.gate_up_proj.to(torch.float8_e4m3fn)


def save_and_load(folder: str, kind: str) -> None:
    """The adapter of a parallel model loads in one process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = _lora_model(kind)
    base = cases.hf_model(kind)
    base.set_experts_implementation("eager")
    cases.shard(model, 2, _blocks(model))
    cases.train(model, cases.adamw(model), range(2))
    automoe.save_pretrained(model, folder)
    loaded = peft.PeftModel.from_pretrained(base, folder)
    ids = cases.tokens(size)[rank : rank + 1]
    with torch.no_grad():
        found, expected = cases.logits_of(loaded, ids), cases.logits_of(model, ids)
    assert (found - expected).abs().max().item() <= 1e-10


# ---- tests ----

_ON_FOUR = pytest.mark.parametrize("rank_pool", [[4]], indirect=True)


@_ON_FOUR
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("ep", [2, 4])
def test_equal_to_one_process(rank_pool: RankPool, kind: str, ep: int) -> None:
    rank_pool.run(compare, kind, ep, "nested")


@_ON_FOUR
@pytest.mark.parametrize("mode", ["per parameter", "wrapper", "by hand"])
def test_other_ways_to_shard(rank_pool: RankPool, mode: str) -> None:
    rank_pool.run(compare, "qwen3_moe", 4 if mode == "by hand" else 2, mode)


@_ON_FOUR
def test_ranks_with_the_same_tokens(rank_pool: RankPool) -> None:
    rank_pool.run(replicate_tokens)


@_ON_FOUR
def test_scaling_of_rslora(rank_pool: RankPool) -> None:
    rank_pool.run(compare, "qwen3_moe", 4, "nested", use_rslora=True)


@_ON_FOUR
def test_active_adapters(rank_pool: RankPool) -> None:
    rank_pool.run(switch_adapters)


@_ON_FOUR
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_adapter_loads_in_one_process(rank_pool: RankPool, tmp_path, kind: str) -> None:
    rank_pool.run(save_and_load, str(tmp_path), kind)


@_ON_FOUR
def test_what_comes_after_parallelize_is_refused(rank_pool: RankPool) -> None:
    late, *merges = rank_pool.run(refuse_late)[0]
    assert "Qwen3MoeExperts is parallel already" in late
    assert "before automoe.parallelize" in late
    assert len(merges) == 3
    assert all("cannot be merged or taken off" in text for text in merges)


@_ON_FOUR
def test_unsupported_wrappers_are_named(rank_pool: RankPool) -> None:
    merged, dropout, variant, precision = rank_pool.run(refuse_wrappers)[0]
    first = "base_model.model.model.layers.0.mlp.experts"
    assert f"{first}.base_layer.base_layer (Qwen3MoeExperts)" in merged
    assert "is merged into the weights: call unmerge_adapter() first" in merged
    assert f"around it, {first}, has dropout" in dropout
    assert "layers.1.mlp.experts, is a variant of LoRA" in variant
    assert "is for weights in torch.float8_e4m3fn" in precision
    inside = rank_pool.run(refuse_lists)[0]
    assert "base_model.model.0.experts (ModuleList): PEFT has wrapped 0.up" in inside
