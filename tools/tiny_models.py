# SPDX-License-Identifier: Apache-2.0
"""Tiny models of all families of transformers that have experts."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

# What a class is called that holds experts; "MoE" alone is part of too many names.
_EXPERTS = re.compile(r"^class \w*(Experts?(GLU)?|CDMoE|MoeMLP)\(", re.MULTILINE)
_VOCABULARY = 64
_SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 24,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 4,
    "kv_n_heads": 4,
    "head_dim": 8,
    "d_kv": 8,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 128,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def moe_families() -> list[str]:
    """Names of transformers' families whose code has a class of experts."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    files = sorted(root.glob("*/modeling_*.py"))
    return [
        file.parent.name
        for file in files
        if file.stem == f"modeling_{file.parent.name}"
        and _EXPERTS.search(file.read_text(encoding="utf-8"))
    ]


# What a family needs beside _SMALL, or instead of it (None: its own default).
_GROUPS = {"n_group": 2, "topk_group": 1}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_FULL_ATTENTION = {"layer_types": ["full_attention"] * 2}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _GROUPS,
    "bailing_hybrid": _GROUPS,
    "beam": {**_SPARSE, **_GROUPS},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 24,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
    },
    "deepseek_ocr2": {**_SPARSE, **_GROUPS},
    "deepseek_v3": _GROUPS,
    "deepseek_v32": _GROUPS,
    "doge": {"is_moe": True, "num_experts": 16},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 12],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": _VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "mrope_section": [2, 1, 1],
        },
    },
    "glm5_next": {**_SPARSE, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"mamba_n_heads": 4, **_FULL_ATTENTION},
    "hy_v4_vl": {
        **_SPARSE,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
        },
    },
    "lfm2_moe": _FULL_ATTENTION,
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2, "moe_topk": 2},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["attention", "moe"],
        "moe_shared_expert_intermediate_size": 24,
        "n_groups": 2,
    },
    "nllb_moe": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "moe_token_dropout": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "qwen3_5_moe": _FULL_ATTENTION,
    "qwen3_next": _FULL_ATTENTION,
    "step3p7": {**_SPARSE, "sliding_window": 8},
    "switch_transformers": {
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "dropout_rate": 0.0,
        "router_jitter_noise": 0.0,
    },
    "vitpose_backbone": {"num_experts": 3, "part_features": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def model_class(family: str) -> type[nn.Module]:
    """The class that is tried: a decoder of text with experts, whole if possible."""
    from transformers import PreTrainedModel

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = {
        name: cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
    }
    for ending in (
        "ForCausalLM",
        "TextModel",
        "ForTokenClassification",
        "ForConditionalGeneration",
        "DecoderModel",
        "Backbone",
    ):
        for name, cls in classes.items():
            if name.endswith(ending):
                return cls
    raise ValueError(f"{family} has no known kind of model: {sorted(classes)}")


def tiny_config(family: str, **changes: Any) -> Any:
    """A configuration of two layers and a few experts, with random routing."""
    config_class = model_class(family).config_class
    known = set(inspect.signature(config_class).parameters)
    values = {name: value for name, value in _SMALL.items() if name in known}
    values |= _OVERRIDES.get(family, {})
    values |= changes
    return config_class(**{k: v for k, v in values.items() if v is not None})


def tiny_model(family: str, dtype: torch.dtype = torch.float64, **changes: Any):
    """A model of a family with random parameters, the same in every process."""
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    config._attn_implementation = "eager"
    model = model_class(family)(config).to(dtype)
    for module in model.modules():
        # Routers with a type of their own cast themselves to it, FSDP or not.
        if isinstance(module.__dict__.get("dtype"), torch.dtype):
            module.dtype = dtype
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model
