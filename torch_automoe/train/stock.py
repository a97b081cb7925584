# SPDX-License-Identifier: Apache-2.0
"""Models of transformers, trained on bytes as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_automoe.train.config import ModelConfig, TrainConfig, UsageError

# Our name of a size -> what families call it; all that a family has are set.
_NAMES = {
    "dim": ("hidden_size", "d_model"),
    "layers": ("num_hidden_layers", "num_layers"),
    "heads": ("num_attention_heads", "num_key_value_heads", "num_heads"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k"),
    "expert_dim": ("moe_intermediate_size", "intermediate_size"),
}
# Of DeepSeek's attention and its relatives.
_HEAD_PARTS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


class StockModel(nn.Module):
    """A causal language model of transformers: bytes (B, S) -> logits (B, S, V).

    Attributes:
        model: what transformers made of its configuration.
        blocks: its decoder layers.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        try:
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except ValueError as error:
            raise UsageError(f"--model {config.model_type}: {error}") from None
        names = self.model._no_split_modules or []
        self.blocks = [m for m in self.modules() if type(m).__name__ in names]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, S) int64 in [0, 256) -> (B, S, V)."""
        return self.model(input_ids=tokens, use_cache=False).logits


def make_stock_model(config: TrainConfig) -> StockModel:
    """Make the model that ``--model`` or ``--hf`` names, the same on every rank."""
    torch.manual_seed(config.seed)
    return StockModel(stock_config(config))


def stock_config(config: TrainConfig) -> Any:
    """Return transformers' configuration for ``--model`` or ``--hf``.

    Raises:
        UsageError: transformers is not installed, or knows no such model; the file is
            not one of its configurations, or its vocabulary has less than 256 entries.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise UsageError(
            f"--model is {config.model}, which needs transformers; run: "
            "pip install 'transformers>=5'"
        ) from None
    if not config.hf:
        try:
            default = AutoConfig.for_model(config.model)
        except (KeyError, ValueError):
            raise UsageError(
                f"--model is {config.model}, expected byte_moe or a model type of "
                "transformers: qwen3_moe, mixtral, olmoe, deepseek_v3, gpt_oss, ..."
            ) from None
        values = _values(default, config.sizes, config.seq_len)
        return AutoConfig.for_model(config.model, **values)
    try:
        values = json.loads(Path(config.hf).read_text())
        made = AutoConfig.for_model(values.pop("model_type"), **values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--hf is {config.hf}, expected the config.json of a model of "
            f"transformers: {type(error).__name__}: {error}"
        ) from None
    if made.get_text_config().vocab_size < 256:
        raise UsageError(
            f"--hf: {config.hf} has vocab_size {made.get_text_config().vocab_size}, "
            "expected at least 256, for bytes"
        )
    return made


def _values(default: Any, sizes: ModelConfig, seq_len: int) -> dict[str, Any]:
    head_dim = sizes.dim // sizes.heads
    values: dict[str, Any] = {
        "vocab_size": 256,
        "max_position_embeddings": max(seq_len, 16),
        "head_dim": head_dim,
        "first_k_dense_replace": 0,
        "q_lora_rank": head_dim,
        "kv_lora_rank": head_dim,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "shared_expert_intermediate_size": sizes.expert_dim,
        **dict.fromkeys(_HEAD_PARTS, head_dim),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    for name, theirs in _NAMES.items():
        values |= dict.fromkeys(theirs, getattr(sizes, name))
    known = {name: value for name, value in values.items() if hasattr(default, name)}
    if not any(name in known for name in _NAMES["num_experts"]):
        raise UsageError(
            f"--model is {default.model_type}, whose configuration has no number of "
            "experts under a name that is known here; give its config.json with --hf"
        )
    return known
