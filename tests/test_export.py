# SPDX-License-Identifier: Apache-2.0
"""Whole models out of parallel ones and back, in the names that files have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import state_cases as cases
import torch
import torch.distributed as dist
from distributed import RankPool
from torch import Tensor, nn

import torch_automoe as automoe
from torch_automoe.parallel.export import parse_size

safetensors = pytest.importorskip("safetensors", reason="needs safetensors")

_ON_FOUR = pytest.mark.parametrize("rank_pool", [[4]], indirect=True)
# Per-expert names of each family's files, or the stacked ones.
_FILE_NAMES = {
    "qwen3_moe": "model.layers.1.mlp.experts.7.gate_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.7.w3.weight",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj_bias",
    "deepseek_v3": "model.layers.1.mlp.gate.e_score_correction_bias",
}


def _file_names(folder: str | Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found = {}
    for path in Path(folder).glob("*.safetensors"):
        found |= load_file(path)
    return found


def _logits(model: nn.Module) -> Tensor:
    rank, size = dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        return cases.logits_of(model, cases.tokens(size)[rank : rank + 1])


def _from_pretrained(folder: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: cases.whole(value) for name, value in model.state_dict().items()}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        # transformers holds some parameters in float32 whatever it is asked for.
        assert torch.equal(found[name].double(), value.double()), name


@torch.no_grad()
def _round(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.float())


# ---- what runs on the ranks ----


def round_trip(kind: str, folder: str, ep: int) -> None:
    """Train, export, load in one process, and into another parallel model."""
    model = cases.hf_model(kind)
    cases.shard(model, ep, model.model.layers)
    cases.train(model, cases.adamw(model), range(1))
    _round(model)
    trained, expected = _values(model), _logits(model)
    automoe.save_pretrained(model, folder)
    dist.barrier()
    assert type(model).__name__.removeprefix("FSDP") in _config(folder)["architectures"]
    alone = _from_pretrained(folder)
    _assert_equal(dict(alone.state_dict()), trained)
    assert (_logits(alone) - expected).abs().max().item() <= 1e-10
    for meta in (False, True):
        other = _other_model(kind, meta)
        cases.shard(other, 4 if ep == 2 else 2, other.model.layers)
        automoe.load_pretrained(other, folder)
        _assert_equal(_values(other), trained)
        assert (_logits(other) - expected).abs().max().item() <= 1e-10
        # What has been loaded trains.
        cases.train(other, cases.adamw(other), range(1))


def _other_model(kind: str, meta: bool, **changes: object) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if not meta:
        model = cases.hf_model(kind, **changes)
        cases.fill(model, seed=1)
        return model
    config = cases.hf_config(kind, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.double()


def _config(folder: str) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


def load_foreign(folder: str, uneven: bool) -> None:
    """What transformers itself has written; each rank reads its own experts."""
    changes = {"num_local_experts": 5} if uneven else {}
    model = cases.hf_model("mixtral", **changes)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, max_shard_size="20KB")
    dist.barrier()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(list(Path(folder).glob("*.safetensors"))) > 2
    read = _count_reads()
    cases.fill(model, seed=1)
    cases.shard(model, 4, model.model.layers)
    automoe.load_pretrained(model, folder)
    _assert_equal(_values(model), expected)
    experts = 5 if uneven else 8
    own = -(-experts // 4)
    start = min(own * dist.get_rank(), experts)
    wanted = {str(expert) for expert in range(start, min(start + own, experts))}
    found = {name.split(".experts.")[1].split(".")[0] for name in read}
    assert found == wanted


def _count_reads() -> list[str]:
    """Note which experts' tensors are read from now on, in this process."""
    from torch_automoe.parallel import load

    names: list[str] = []
    original = load._Reader.read
    if hasattr(original, "names"):
        original.names.clear()
        return original.names

    def read(self, name, part=None):
        if ".experts." in name:
            names.append(name)
        return original(self, name, part)

    read.names = names
    load._Reader.read = read
    return names


def tied(folder: str) -> None:
    """Tied embeddings are in the files once, and tied when they are back."""
    model = cases.hf_model("qwen3_moe", tie_word_embeddings=True)
    cases.shard(model, 2, model.model.layers)
    expected = _logits(model)
    automoe.save_pretrained(model, folder)
    dist.barrier()
    assert "lm_head.weight" not in _file_names(folder)
    assert (_logits(_from_pretrained(folder)) - expected).abs().max() <= 1e-10
    for meta in (False, True):
        other = _other_model("qwen3_moe", meta, tie_word_embeddings=True)
        cases.shard(other, 4, other.model.layers)
        automoe.load_pretrained(other, folder)
        assert (_logits(other) - expected).abs().max() <= 1e-10
        cases.train(other, cases.adamw(other), range(2))
        values = _values(other)
        assert torch.equal(
            values["lm_head.weight"], values["model.embed_tokens.weight"]
        )


def plain(folder: str, is_tied: bool) -> None:
    """A model that transformers does not know: its own names."""
    model = cases.plain_model(tied=is_tied)
    model.steps += 7
    names = set(model.state_dict()) - ({"head.weight"} if is_tied else set())
    cases.shard(model, 2, model.blocks)
    cases.train(model, cases.adamw(model), range(2))
    trained, expected = _values(model), _logits(model)
    automoe.save_pretrained(model, folder)
    dist.barrier()
    written = _file_names(folder)
    assert written.keys() == names and "scale" not in written
    _assert_equal(written, {name: trained[name] for name in names})
    for device in ("cpu", "meta", "emptied"):
        with torch.device("cpu" if device == "cpu" else "meta"):
            other = cases.PlainModel(tied=is_tied).double()
        cases.shard(other, 4, other.blocks)
        if device == "emptied":
            other.to_empty(device="cpu")
        automoe.load_pretrained(other, folder)
        _assert_equal(_values(other), trained)
        assert (_logits(other) - expected).abs().max() <= 1e-10
        assert other.steps.item() == 7


def lists_of_experts(folder: str) -> None:
    """Experts of a list go into files one by one, as the model had them."""
    import transformers_cases

    model = transformers_cases.list_model()
    names = set(model.state_dict())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    cases.shard(model, 2, model.layers)
    automoe.save_pretrained(model, folder)
    dist.barrier()
    written = _file_names(folder)
    assert written.keys() == names
    _assert_equal(written, values)
    other = transformers_cases.list_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    cases.shard(other, 4, other.layers)
    automoe.load_pretrained(other, folder)
    _assert_equal(_values(other), _values(model))


def shards_and_types(folder: str) -> None:
    """Small files, then one in another type in their place."""
    model = cases.hf_model("qwen3_moe")
    cases.shard(model, 4, model.model.layers)
    automoe.save_pretrained(model, folder, max_shard_size="100KB")
    dist.barrier()
    expected = _logits(model)
    paths = list(Path(folder).glob("*.safetensors"))
    assert len(paths) > 3 and max(path.stat().st_size for path in paths) < 120_000
    assert (_logits(_from_pretrained(folder)) - expected).abs().max() <= 1e-10
    dist.barrier()
    automoe.save_pretrained(model, folder, dtype=torch.bfloat16)
    dist.barrier()
    assert [path.name for path in Path(folder).glob("*.safetensors*")] == [
        "model.safetensors"
    ]
    assert _config(folder)["dtype"] == "bfloat16"
    alone = _from_pretrained(folder, "auto")
    assert alone.dtype == torch.bfloat16
    whole = {name: value.bfloat16() for name, value in _values(model).items()}
    _assert_equal(dict(alone.state_dict()), whole)


def refuse(folder: str) -> list[str]:
    """Errors of all ranks, and none of them hangs."""
    rank = dist.get_rank()
    texts = []
    model = cases.plain_model()
    cases.shard(model, 2, model.blocks)
    blocked = Path(folder) / "file"
    if rank == 0:
        blocked.write_text("")
    automoe.save_pretrained(model, Path(folder) / "good")
    dist.barrier()
    odd = nn.Linear(2, 2, bias=rank == 1)
    larger = cases.plain_model(num_experts=12)
    fewer = nn.ModuleDict({"embed": nn.Embedding(cases.VOCABULARY, 16).double()})
    more = cases.plain_model()
    more.register_parameter("extra", nn.Parameter(torch.zeros(2)))
    quantised = Path(folder) / "quantised"
    if rank == 0:
        quantised.mkdir()
        (quantised / "config.json").write_text('{"quantization_config": {}}')
    dist.barrier()
    attempts = [
        lambda: automoe.save_pretrained(model, blocked / "below"),
        lambda: automoe.save_pretrained(odd, folder),
        lambda: automoe.save_pretrained(model, folder, max_shard_size="5 apples"),
        lambda: automoe.load_pretrained(model, Path(folder) / "nothing"),
        lambda: automoe.load_pretrained(larger, Path(folder) / "good"),
        lambda: automoe.load_pretrained(more, Path(folder) / "good"),
        lambda: automoe.load_pretrained(model, quantised),
    ]
    for attempt in attempts:
        with pytest.raises((ValueError, OSError, RuntimeError)) as error:
            attempt()
        texts.append(f"{error.type.__name__}: {error.value}")
    with pytest.warns(UserWarning, match="which the model has not"):
        automoe.load_pretrained(fewer, Path(folder) / "good")
    return texts


# ---- tests ----


@_ON_FOUR
@pytest.mark.parametrize("kind", list(_FILE_NAMES))
def test_families_of_transformers(rank_pool: RankPool, tmp_path, kind: str) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    rank_pool.run(round_trip, kind, str(tmp_path), 2)
    assert _FILE_NAMES[kind] in _file_names(tmp_path)


@_ON_FOUR
@pytest.mark.parametrize("uneven", [False, True])
def test_files_that_transformers_wrote(
    rank_pool: RankPool, tmp_path, uneven: bool
) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    rank_pool.run(load_foreign, str(tmp_path), uneven)


@_ON_FOUR
def test_tied_embeddings(rank_pool: RankPool, tmp_path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    rank_pool.run(tied, str(tmp_path))


@_ON_FOUR
@pytest.mark.parametrize("is_tied", [False, True])
def test_models_of_plain_torch(rank_pool: RankPool, tmp_path, is_tied: bool) -> None:
    rank_pool.run(plain, str(tmp_path), is_tied)


@_ON_FOUR
def test_lists_of_experts(rank_pool: RankPool, tmp_path) -> None:
    pytest.importorskip("transformers", reason="the model's test cases import it")
    rank_pool.run(lists_of_experts, str(tmp_path))


@_ON_FOUR
def test_shards_and_types(rank_pool: RankPool, tmp_path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    rank_pool.run(shards_and_types, str(tmp_path))


@_ON_FOUR
def test_errors_reach_all_ranks(rank_pool: RankPool, tmp_path) -> None:
    texts = rank_pool.run(refuse, str(tmp_path))
    assert texts[0][0].startswith("NotADirectoryError")
    for other in texts[1:]:
        assert other[0].startswith("RuntimeError: rank 0 could not write")
        assert other[1:] == texts[0][1:]
    _, odd, size, nothing, larger, more, quantised = texts[0]
    assert "has other tensors on rank 1 than on rank 0 (['bias'])" in odd
    assert "max_shard_size is '5 apples'" in size
    assert "has no files *.safetensors" in nothing
    assert "(8, 32, 16) in the files, expected (12, 32, 16)" in larger
    assert "no values for extra, expected all parameters" in more
    assert "holds quantised weights" in quantised


def test_one_process_without_a_group(tmp_path) -> None:
    model = cases.plain_model()
    automoe.save_pretrained(model, tmp_path, max_shard_size="10KB")
    other = cases.plain_model()
    cases.fill(other, seed=1)
    automoe.load_pretrained(other, tmp_path)
    _assert_equal(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("size", "expected"), [(7, 7), ("5GB", 5 * 10**9), ("2 MiB", 2 * 2**20)]
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", [0, -1, "0MB", "GB", "5", None, 1.5])
def test_sizes_that_are_none(size: object) -> None:
    with pytest.raises(ValueError, match="max_shard_size is"):
        parse_size(size)
