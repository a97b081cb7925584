# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer: router, experts, and the balance between them.

Shape letters: T tokens, D model width, F expert width, E experts, e experts of
this rank, K experts per token, R rows received.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from torch_automoe.train.exchange import combine, dispatch, plan
from torch_automoe.train.timing import all_reduce


class Experts(nn.Module):
    """All experts of a layer as stacked 3-D parameters (SwiGLU).

    ``parallelize`` turns the parameters into DTensors that are sharded over
    the expert dimension, so each rank computes with its own experts only.
    """

    def __init__(self, num_experts: int, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, dim, 2 * expert_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, expert_dim, dim))

    def forward(
        self, x: torch.Tensor, num_tokens_per_expert: list[int]
    ) -> torch.Tensor:
        """Apply each expert to its rows: (R, D), e counts -> (R, D)."""
        gate_up_proj = _local(self.gate_up_proj).to(x.dtype)
        down_proj = _local(self.down_proj).to(x.dtype)
        if not num_tokens_per_expert:  # E < P: this rank owns no expert
            return x + gate_up_proj.sum() + down_proj.sum()
        out = []
        # An expert without a row still multiplies an empty matrix. That gives
        # its weights a gradient of zero instead of none, which FSDP and the
        # optimizer need to stay in step over the ranks.
        for rows, gate_up, down in zip(
            x.split(num_tokens_per_expert),
            gate_up_proj.unbind(),
            down_proj.unbind(),
            strict=True,
        ):
            gate, up = (rows @ gate_up).chunk(2, dim=-1)
            out.append((F.silu(gate) * up) @ down)
        return torch.cat(out)


class Router(nn.Module):
    """Top-k softmax router, in float32 or wider.

    ``expert_bias`` moves the choice of experts, never the weights: it is the
    balance term of "Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts" (2024), set by ``ExpertBiasUpdate``.
    """

    def __init__(self, num_experts: int, top_k: int, dim: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("expert_bias", torch.zeros(num_experts))
        self.register_buffer(
            "num_tokens_per_expert",
            torch.zeros(num_experts, dtype=torch.int64),
            persistent=False,
        )

    def forward(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(T, D) -> topk_weights (T, K), topk_ids (T, K), scores (T, E)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.to(dtype), self.weight.to(dtype)).softmax(dim=-1)
        topk_ids = (scores.detach() + self.expert_bias).topk(self.top_k, dim=-1)[1]
        topk_weights = scores.gather(1, topk_ids)
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        if self.training:
            self.num_tokens_per_expert += torch.bincount(
                topk_ids.flatten(), minlength=scores.shape[1]
            )
        return topk_weights, topk_ids, scores


class MoE(nn.Module):
    """Router, experts and the exchange between them.

    ``group`` is the expert-parallel group; ``parallelize`` sets it.
    """

    group: dist.ProcessGroup

    def __init__(self, num_experts: int, top_k: int, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.router = Router(num_experts, top_k, dim)
        self.experts = Experts(num_experts, dim, expert_dim)
        self.aux_loss: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, D); B may be 0, the exchange still takes part."""
        batch, seq_len, dim = x.shape
        tokens = x.reshape(-1, dim)
        topk_weights, topk_ids, scores = self.router(tokens)
        self.aux_loss = sequence_balance_loss(scores, topk_ids, batch)

        moe_plan = plan(topk_ids, self.num_experts, self.group)
        recv_x, recv_weights = dispatch(tokens, topk_weights, moe_plan)
        expert_out = self.experts(recv_x, moe_plan.num_tokens_per_expert.tolist())
        out = combine(expert_out, recv_weights, moe_plan)
        return out.view(batch, seq_len, dim)


class ExpertBiasUpdate:
    """Before each optimizer step, lower the bias of busy experts.

    One all-reduce serves all layers. Afterwards ``num_tokens_per_expert``
    holds the counts of the step over all ranks, (layers, E), for the metrics.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, rate: float
    ) -> None:
        self.routers = [m for m in model.modules() if isinstance(m, Router)]
        self.rate = rate
        self.num_tokens_per_expert = self._take_counts()
        optimizer.register_step_pre_hook(lambda *_: self.update())

    def _take_counts(self) -> torch.Tensor:
        counts = torch.stack([r.num_tokens_per_expert for r in self.routers])
        for router in self.routers:
            router.num_tokens_per_expert.zero_()
        return counts

    @torch.no_grad()
    def update(self) -> None:
        """Sum the counts over the ranks and move each bias by ``rate``."""
        counts = all_reduce(self._take_counts(), dist.ReduceOp.SUM)
        self.num_tokens_per_expert = counts
        load = counts.float()
        step = self.rate * torch.sign(load.mean(1, keepdim=True) - load)
        step -= step.mean(1, keepdim=True)  # only differences matter to top-k
        for router, router_step in zip(self.routers, step, strict=True):
            router.expert_bias += router_step


def sequence_balance_loss(
    scores: torch.Tensor, topk_ids: torch.Tensor, num_sequences: int
) -> torch.Tensor:
    """Balance loss summed over the sequences of this rank (1.0 each if even).

    Computed per sequence (DeepSeek-V3, section 2.1.2), it needs no
    communication and sums to the same value however the batch is split.
    """
    num_experts, top_k = scores.shape[1], topk_ids.shape[1]
    if num_sequences == 0:
        return scores.sum()
    chosen = F.one_hot(topk_ids, num_experts).sum(1).to(scores.dtype)
    load = chosen.view(num_sequences, -1, num_experts).mean(1) / top_k
    probability = scores.view(num_sequences, -1, num_experts).mean(1)
    return num_experts * (load * probability).sum()


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
