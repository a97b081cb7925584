# SPDX-License-Identifier: Apache-2.0
"""AdamW over parameters of several meshes, and its learning rate."""

from __future__ import annotations

import math

import torch

from torch_automoe.train.config import TrainConfig
from torch_automoe.train.model import ByteMoE


def build_optimizer(model: ByteMoE, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to a tenth at ``config.steps``."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))
