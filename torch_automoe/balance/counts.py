# SPDX-License-Identifier: Apache-2.0
"""Counts of routed tokens, which activation checkpointing does not double."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# An operator, not two lines of Python: it decides when it runs, so it is right in code
# that torch.compile has traced too; and what selective checkpointing saved of other
# operators is not handed out of step, since forward and recompute call the same ones.
_library = torch.library.Library("automoe", "FRAGMENT")
_library.define("add_once(Tensor(a!) sums, Tensor values) -> ()")


def _add_once(sums: Tensor, values: Tensor) -> None:
    # Outside of a backward the id is -1; a recompute runs inside of one.
    if torch._C._current_graph_task_id() == -1:
        sums.add_(values)


_library.impl("add_once", _add_once, "CompositeExplicitAutograd")
torch.library.register_fake("automoe::add_once", lambda sums, values: None)


def add_once(sums: Tensor, values: Tensor) -> None:
    """Add ``values`` to ``sums`` in place, unless a recompute calls this again.

    What activation checkpointing (reentrant, not reentrant, selective) runs once more
    in the backward is left out.
    """
    torch.ops.automoe.add_once(sums, values.detach())


def count_tokens(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Count the tokens of each expert: (T, K) ids, -1 is none -> (E,) int64."""
    ids = topk_ids.flatten().to(torch.int64) + 1  # -1 goes to a place of its own
    counts = ids.new_zeros(num_experts + 1)
    return counts.scatter_add(0, ids, torch.ones_like(ids))[1:]


@torch.no_grad()
def take_counts(
    counters: Sequence[Tensor], group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """Sum counters over ranks by one all-reduce, and set them to zero.

    Args:
        counters: int64 tensors of one device; the same shapes on all ranks of the
            group.
        group: default: the default group, if there is one, else no communication.

    Returns:
        the sums, in shape and order of ``counters``.
    """
    flat = torch.cat([counter.flatten() for counter in counters])
    for counter in counters:
        counter.zero_()
    if group is not None or dist.is_initialized():
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=group)
    sums = flat.split([counter.numel() for counter in counters])
    return [
        part.view(counter.shape) for part, counter in zip(sums, counters, strict=True)
    ]
