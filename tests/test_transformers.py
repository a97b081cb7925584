# SPDX-License-Identifier: Apache-2.0
"""Models of transformers, unmodified, over several ranks and in one process."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")

import torch  # noqa: E402
import transformers_cases as cases  # noqa: E402
from distributed import RankPool  # noqa: E402
from transformers_cases import moe_families, tiny_models  # noqa: E402

from torch_automoe.parallel.transformers_experts import (  # noqa: E402
    register_experts_implementation,
)

_FAMILIES = [
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "llama4",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
]
_FLOAT32 = ["deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe"]
_on_four_ranks = pytest.mark.parametrize("rank_pool", [[4]], indirect=True)


def _worst(results: list[tuple]) -> tuple[float, str]:
    return max((error, where) for error, where, _ in results)


@_on_four_ranks
class TestOnRanks:
    # ep 2 leaves two ranks beside it for FSDP, ep 4 none.
    @pytest.mark.parametrize("ep", [2, 4])
    @pytest.mark.parametrize("family", _FAMILIES)
    def test_equals_one_process(
        self, rank_pool: RankPool, family: str, ep: int
    ) -> None:
        results = rank_pool.run(cases.compare, family, ep)
        assert _worst(results)[0] <= 1, _worst(results)
        assert all(len(lines) >= 1 for _, _, lines in results)

    @pytest.mark.parametrize("family", _FLOAT32)
    def test_equals_one_process_in_float32(
        self, rank_pool: RankPool, family: str
    ) -> None:
        results = rank_pool.run(cases.compare, family, 4, "float32")
        assert _worst(results)[0] <= 1, _worst(results)

    @pytest.mark.parametrize("num_experts", [5, 6])
    def test_experts_that_do_not_divide(
        self, rank_pool: RankPool, num_experts: int
    ) -> None:
        changes = {"num_experts": num_experts}
        results = rank_pool.run(cases.compare, "qwen3_moe", 4, **changes)
        assert _worst(results)[0] <= 1, _worst(results)

    @pytest.mark.parametrize("ep", [2, 4])
    @pytest.mark.parametrize("family", _FLOAT32)
    def test_training_follows_one_process(
        self, rank_pool: RankPool, family: str, ep: int
    ) -> None:
        for found, wanted in rank_pool.run(cases.train, family, ep, 20):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=0)
            assert wanted[-1, 0] < wanted[0, 0]

    @pytest.mark.parametrize("ep", [2, 4])
    def test_generate(self, rank_pool: RankPool, ep: int) -> None:
        results = rank_pool.run(cases.generate, "qwen3_moe", ep)
        assert all(found == wanted for found, wanted in results)
        assert len({tuple(found) for found, _ in results}) == 4

    def test_implementation_over_dtensors(self, rank_pool: RankPool) -> None:
        for error, where in rank_pool.run(cases.sharded_implementation, "gpt_oss"):
            assert error <= 1e-10, where

    @pytest.mark.parametrize(
        "family", ["dbrx", "jetmoe", "nllb_moe", "switch_transformers", "step3p7"]
    )
    def test_unusual_families(self, rank_pool: RankPool, family: str) -> None:
        for result in rank_pool.run(moe_families.run_family, family, 4):
            assert result.works, result

    @pytest.mark.parametrize(
        ("family", "fqn", "reason"),
        [
            ("doge", "model.layers.0.mlp", "rows of two embeddings"),
            ("longcat_flash", "model.layers.0.mlp.experts", "share dimension 0"),
            ("muse_spark", "layers.0.mlp.experts", "that all experts share"),
            ("vitpose_backbone", "encoder.layer.0.mlp.experts", "its forward takes"),
        ],
    )
    def test_refused_families(
        self, rank_pool: RankPool, family: str, fqn: str, reason: str
    ) -> None:
        for text, same in rank_pool.run(cases.refuse_family, family):
            assert f"\n  {fqn} (" in text and reason in text
            assert same

    def test_dbrx_is_refused_where_it_would_be_cut_inside_an_expert(
        self, rank_pool: RankPool
    ) -> None:
        changes = {"ffn_config": {"hidden_size": 32, "moe_num_experts": 6}}
        with pytest.raises(AssertionError, match="cut inside an expert"):
            rank_pool.run(cases.compare, "dbrx", 4, **changes)

    @pytest.mark.slow
    def test_all_families_are_as_the_table_says(self, rank_pool: RankPool) -> None:
        families = tiny_models.moe_families()
        results = rank_pool.run(moe_families.survey, families, deadline=900.0)
        words = {
            line.split("|")[1].strip(): line.split("|")[2].strip()
            for line in moe_families.TABLE.read_text().splitlines()
            if line.startswith("| ")
        }
        for family, result in results[0].items():
            assert result.word == words[family], result


@_on_four_ranks
class TestLists:
    @pytest.mark.parametrize("ep", [2, 4])
    @pytest.mark.parametrize(
        ("weights", "said"),
        [
            (cases.mixtral_weights, "softmax, top-2, renormalised, in float32"),
            (cases.olmoe_weights, "softmax, top-2, in the type of the logits"),
            (cases.late_softmax_weights, "softmax, top-2, renormalised, in the type"),
            (cases.sigmoid_weights, "sigmoid, top-2, renormalised, in the type"),
        ],
    )
    def test_routing_is_found(
        self, rank_pool: RankPool, weights, said: str, ep: int
    ) -> None:
        options = {"weights": weights}
        results = rank_pool.run(cases.compare_lists, ep, **options)
        assert _worst(results)[0] <= 1, _worst(results)
        lines = results[0][2]
        assert len(lines) == 2 and all(said in line for line in lines)
        assert lines[0].startswith("layers.0.experts: ")

    @pytest.mark.parametrize("num_experts", [5, 3])
    def test_shared_expert_and_uneven_experts(
        self, rank_pool: RankPool, num_experts: int
    ) -> None:
        options = {"shared": True, "returns_logits": False, "num_experts": num_experts}
        results = rank_pool.run(cases.compare_lists, 4, **options)
        assert _worst(results)[0] <= 1, _worst(results)
        assert "plus shared_expert, weighted by" in results[0][2][0]

    def test_router_that_chooses_itself(self, rank_pool: RankPool) -> None:
        options = {"own_router": True, "returns_logits": False}
        results = rank_pool.run(cases.compare_lists, 2, **options)
        assert _worst(results)[0] <= 1, _worst(results)
        assert "ids and weights from gate" in results[0][2][0]

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"weights": cases.tanh_weights}, "no known routing gives"),
            ({"weights": cases.detached_weights}, "no known routing gives"),
            ({"jitter": 0.1}, "(in training)"),
            ({"meta": True}, "they are on the meta device"),
        ],
        ids=["tanh", "detached", "jitter", "meta"],
    )
    def test_refused(self, rank_pool: RankPool, options: dict, reason: str) -> None:
        for text, same in rank_pool.run(cases.refuse_lists, **options):
            assert "\n  layers.0.experts (ModuleList): " in text and reason in text
            assert same


class TestOneProcess:
    @pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "qwen3_moe"])
    def test_implementation(self, family: str) -> None:
        register_experts_implementation()
        model = tiny_models.tiny_model(family)
        ids = torch.arange(4, 28).view(2, 12)
        found = []
        for implementation in ("eager", "automoe"):
            model.set_experts_implementation(implementation)
            model.zero_grad()
            out = moe_families.run_model(model, ids)
            moe_families.measure(out).backward()
            found.append((out.detach(), moe_families.gradients_of(model)))
        tolerance = {"rtol": 0, "atol": 1e-5 if out.dtype == torch.float32 else 1e-12}
        torch.testing.assert_close(found[1], found[0], **tolerance)

    @pytest.mark.parametrize(
        ("statements", "registered"),
        [
            ("import torch_automoe.parallel", False),
            ("import transformers.integrations.moe, torch_automoe", False),
            ("import transformers.integrations.moe, torch_automoe.parallel", True),
            (
                "import torch_automoe\ntorch_automoe.register_experts_implementation()",
                True,
            ),
        ],
    )
    def test_registration(self, statements: str, registered: bool) -> None:
        program = (
            f"{statements}\n"
            "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known\n"
            "print('automoe' in known.keys())"
        )
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        assert run.stdout.split()[-1] == str(registered)

    def test_import_does_not_import_transformers(self) -> None:
        program = (
            "import sys, torch_automoe.parallel.apply\n"
            "print('transformers' in sys.modules)"
        )
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        assert run.stdout.strip() == "False"

    def test_lists_of_unlike_experts_are_refused(self) -> None:
        from torch_automoe.parallel.blocks import find_block

        model = cases.list_model()
        block = model.layers[0]
        block.experts[3].w1.weight.requires_grad_(False)
        assert "expert 3 is not like" in find_block(block).why_not()
        block.experts[3] = block.experts[0]
        assert "share parameters" in find_block(block).why_not()
        block = model.layers[1]
        for expert in block.experts:
            torch.nn.init.zeros_(expert.w2.weight)
            torch.nn.init.zeros_(expert.w2.bias)
        assert "are they still zero" in find_block(block).why_not()
