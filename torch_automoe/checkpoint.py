# SPDX-License-Identifier: Apache-2.0
"""What activation checkpointing saves of an exchange of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

from torch_automoe import _loader

Policy = Callable[..., CheckpointPolicy]


def checkpoint_policy(
    *, save_dispatch: bool = False, others: Policy | None = None
) -> Policy:
    """Return a policy that saves plans, so that recomputation exchanges none.

    The recomputed layer then has the forward's routing even if the ids that it
    recomputes differ. For selective activation checkpointing:

        policy = automoe.checkpoint_policy()
        context_fn = partial(create_selective_checkpoint_contexts, policy)
        checkpoint(layer, x, use_reentrant=False, context_fn=context_fn)

    Plain checkpointing works too: it plans again, and the backward raises ValueError
    where the ids have changed.

    Args:
        save_dispatch: save what ``dispatch`` received, rather than send the rows again:
            more memory, less traffic. The calls with ``async_op=True`` and those of
            ``moe`` in several chunks are always repeated.
        others: the policy of all other operators, with the arguments that torch gives
            to one; default: they are recomputed.
    """
    _loader.load()
    ops = torch.ops.automoe
    saved = {
        ops.plan.default,
        ops.plan_part.default,
        ops.route_facts.default,
        ops.route_reduction_map.default,
    }
    if save_dispatch:
        saved.add(ops.dispatch.default)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in saved:
            return CheckpointPolicy.MUST_SAVE
        if others is not None:
            return others(ctx, op, *args, **kwargs)
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
