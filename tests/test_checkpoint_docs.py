# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/checkpoints.md run as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import state_cases as cases
import torch
import torch.distributed as dist
from distributed import RankPool
from torch.distributed.fsdp import fully_shard

import torch_automoe as automoe

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("transformers", reason="needs transformers")

_DOCS = Path(__file__).parent.parent / "docs" / "checkpoints.md"


def _examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", _DOCS.read_text(), re.M | re.S)


def run_examples(folder: str, examples: list[str]) -> None:
    """Run each with what its text says is there."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    checkpoint, weights, lora = examples
    rank, size = dist.get_rank(), dist.get_world_size()
    ids = cases.tokens(size)[rank : rank + 1]
    base = cases.hf_model("qwen3_moe")
    model = cases.hf_model("qwen3_moe", torch.bfloat16)
    mesh = cases.shard(model, 2, model.model.layers)
    optimizer = cases.adamw(model)
    cases.train(model, optimizer, range(1))
    given = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "LoraConfig": LoraConfig,
        "automoe": automoe,
        "config": cases.hf_config("qwen3_moe"),
        "fully_shard": fully_shard,
        "get_peft_model": get_peft_model,
        "mesh": mesh,
        "torch": torch,
    }

    def run(example: str, name: str, **more: object) -> dict[str, object]:
        names = {**given, "folder": f"{folder}/{name}", **more}
        exec(compile(example, str(_DOCS), "exec"), names)
        dist.barrier()
        return names

    expected = {name: cases.whole(value) for name, value in model.state_dict().items()}
    run(checkpoint, "checkpoint", model=model, optimizer=optimizer)
    other = run(weights, "weights", model=model)["other"]
    for name, value in other.state_dict().items():
        assert torch.equal(cases.whole(value), expected[name]), name
    torch.manual_seed(0)
    names = run(lora, "adapter", model=cases.hf_model("qwen3_moe"))
    alone = PeftModel.from_pretrained(base, names["folder"])
    alone.get_base_model().set_experts_implementation("eager")
    with torch.no_grad():
        found = cases.logits_of(names["model"], ids)
        difference = (found - cases.logits_of(alone, ids)).abs().max().item()
    assert difference <= 1e-10


@pytest.mark.parametrize("rank_pool", [[4]], indirect=True)
def test_examples(rank_pool: RankPool, tmp_path) -> None:
    examples = _examples()
    assert len(examples) == 3
    rank_pool.run(run_examples, str(tmp_path), examples)
