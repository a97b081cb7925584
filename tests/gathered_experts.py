# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism without dispatch, to put the bugs in that it is known for.

Every rank gathers the tokens of its ep group, runs its own experts on all of them, and
the outputs are summed. Without a bug it trains as our exchange does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Partial
from torch.nn.utils.stateless import _reparametrize_module

from torch_automoe.parallel.adapters import Call, original_forward
from torch_automoe.parallel.experts import ParallelExperts


def gathered(bug: str | None) -> AbstractContextManager[object]:
    """Exchange tokens by a gather, with a bug or without."""

    def exchange(
        self: ParallelExperts, module: nn.Module, call: Call, overlap: object
    ) -> Tensor:
        if overlap is not None:
            overlap()
        x = _gather(call.x, self.ep, add=bug != "slice of tokens")
        weights = call.topk_weights
        if bug == "weights without gradient":
            weights = weights.detach()
        weights = _gather(weights, self.ep, add=bug != "slice of weights")
        ids = _gather(call.topk_ids, self.ep, add=True)
        ids, weights = _local_picks(ids, weights, self.local_experts, bug)
        parameters = self._local_parameters(module)
        with _reparametrize_module(module, parameters):
            part = original_forward(module)(module, x, ids, weights)
        return _sum_of_own(part, self.ep, bug)

    return mock.patch.object(ParallelExperts, "_exchange", exchange)


def _gather(part: Tensor, ep: DeviceMesh, *, add: bool) -> Tensor:
    """The rows of all ranks; the backward adds up what each has for a rank's rows."""
    whole = DTensor.from_local(part, ep, [Shard(0)], run_check=False)
    whole = whole.redistribute(placements=[Replicate()])
    placement = Partial() if add else Replicate()
    return whole.to_local(grad_placements=[placement]).clone()


def _local_picks(
    ids: Tensor, weights: Tensor, local: slice, bug: str | None
) -> tuple[Tensor, Tensor]:
    """Number this rank's experts from 0, and take other picks out."""
    num_local = local.stop - local.start
    mine = (ids >= local.start) & (ids < local.stop)
    numbers = (ids - local.start).masked_fill(~mine, -1)
    if bug == "numbers wrap":
        return ids % num_local, weights
    if bug == "weights of other rows":
        return numbers, weights.flip(0)
    if bug == "masked in value":
        # The first expert here stands for those elsewhere.
        others = (weights * ~mine).detach()
        return numbers.clamp(min=0), weights - others
    if bug == "nan":
        return numbers, (weights * mine).log().exp()
    return numbers, weights * mine


def _sum_of_own(part: Tensor, ep: DeviceMesh, bug: str | None) -> Tensor:
    """Sum what the ranks have for the rows of this one."""
    if bug == "no sum of outputs":
        return part.chunk(ep.size())[ep.get_local_rank()].contiguous()
    whole = DTensor.from_local(part, ep, [Partial()], run_check=False)
    own = whole.redistribute(placements=[Shard(0)]).to_local()
    return torch.clone(own)
