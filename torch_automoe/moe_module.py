# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts as plain modules: router, experts, the exchange between them.

Letters: T tokens, D model width, F expert width, E experts, e experts of this rank,
K experts per token, R rows of this rank's experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from torch_automoe.exchange import permute, unpermute
from torch_automoe.grouped import grouped_mm
from torch_automoe.layer import moe
from torch_automoe.parallel.experts import local_part, parallel_state
from torch_automoe.router import Router

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}


class Experts(nn.Module):
    """Gated experts as stacked parameters: act(x @ gate) * (x @ up) @ down.

    With "silu" that is SwiGLU ("GLU Variants Improve Transformer", 2020). The
    parameters may be DTensors that are sharded over the experts (``Shard(0)``): then
    each rank computes with its own ones.

    Attributes:
        gate_up_proj: (E, D, 2 F) parameter, gate before up.
        down_proj: (E, F, D) parameter.
        num_experts: E, of all ranks.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        expert_dim: int,
        activation: str = "silu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make E experts of width F = ``expert_dim``; activation: silu, gelu or relu.

        Raises:
            ValueError: a size is not positive, or the activation another one.
        """
        super().__init__()
        sizes = {"num_experts": num_experts, "dim": dim, "expert_dim": expert_dim}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation is {activation!r}, expected one of {list(_ACTIVATIONS)}"
            )
        self.num_experts, self.activation = num_experts, activation
        made = {"device": device, "dtype": dtype}
        gate_up = torch.empty(num_experts, dim, 2 * expert_dim, **made)
        self.gate_up_proj = nn.Parameter(gate_up)
        down = torch.empty(num_experts, expert_dim, dim, **made)
        self.down_proj = nn.Parameter(down)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's matrices as ``nn.Linear`` does."""
        for weight in (self.gate_up_proj, self.down_proj):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Apply each expert to its rows.

        An expert without rows gets gradients of zero, not None, which FSDP and
        optimizers need to stay in step over ranks.

        Args:
            rows: (R, D) sorted by expert; R may be 0.
            offsets: (e,) int32, where the rows of each expert of this rank end.

        Returns:
            (R, D), of the type of ``rows``, or of autocast; zeros behind the last
            offset.

        Raises:
            ValueError: there are more or fewer offsets than experts of this rank.
        """
        gate_up = local_part(self.gate_up_proj).to(rows.dtype)
        down = local_part(self.down_proj).to(rows.dtype)
        if offsets.shape[0] != gate_up.shape[0]:
            raise ValueError(
                f"offsets has {offsets.shape[0]} entries, expected "
                f"{gate_up.shape[0]}, the experts of this rank: is the group of the "
                "layer the one that its parameters are sharded over?"
            )
        gate, up = grouped_mm(rows, gate_up, offsets).chunk(2, dim=-1)
        hidden = _ACTIVATIONS[self.activation](gate) * up
        return grouped_mm(hidden, down, offsets)

    def extra_repr(self) -> str:
        """Sizes; under a group those of all ranks."""
        _, dim, both = self.gate_up_proj.shape
        return (
            f"num_experts={self.num_experts}, dim={dim}, expert_dim={both // 2}, "
            f"activation={self.activation!r}"
        )


class MoE(nn.Module):
    """Router, experts and the exchange between them; a plain module.

    Without a group, or with one of size 1, everything happens on this rank, and
    ``torch.distributed`` need not be initialised. ``torch_automoe.parallelize`` puts
    the experts on several ranks. So does a group whose ranks own a part of the experts
    each: forward and backward are collective over it, on each rank's own tokens.

    Attributes:
        router, experts, shared_experts: as given.
        group: the expert-parallel group; may be set later.
        num_chunks: as for ``torch_automoe.moe``.
    """

    def __init__(
        self,
        dim: int,
        experts: nn.Module,
        *,
        num_experts: int,
        top_k: int,
        router: nn.Module | None = None,
        shared_experts: nn.Module | None = None,
        group: dist.ProcessGroup | None = None,
        num_chunks: int | str = "auto",
    ) -> None:
        """Make the layer.

        Args:
            dim: D.
            experts: called with (rows (R, D), offsets (e,) int32), returns (R, D); for
                example ``Experts``. It must treat each row for itself.
            num_experts: E, of all ranks.
            top_k: K; of the router that is made where none is given.
            router: called with tokens (T, D), returns topk_weights (T, K) float and
                topk_ids (T, K) int, -1 is none. Default: ``Router(dim, num_experts,
                top_k)``.
            shared_experts: called with x, gives what is added to the output; it runs
                while tokens travel.
            group: see above.
            num_chunks: as for ``torch_automoe.moe``.
        """
        super().__init__()
        self.num_experts = num_experts
        self.router = Router(dim, num_experts, top_k) if router is None else router
        self.experts = experts
        self.shared_experts = shared_experts
        self.group = group
        self.num_chunks = num_chunks

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D), or (T, D) -> (T, D); B and T may be 0."""
        tokens = x.reshape(-1, x.shape[-1])
        if isinstance(self.router, Router):
            num_sequences = x.shape[0] if x.dim() == 3 else 1
            topk_weights, topk_ids = self.router(tokens, num_sequences)
        else:
            topk_weights, topk_ids = self.router(tokens)
        shared: list[Tensor] = []

        def run_shared() -> None:
            shared.append(self.shared_experts(x))

        overlap = None if self.shared_experts is None else run_shared
        out = self.run_experts(tokens, topk_ids, topk_weights, overlap)
        if overlap is not None and not shared:  # traced, where nothing overlaps
            overlap()
        # Not a view, on which FSDP could lose its hook (see ParallelExperts.forward).
        out = torch.ops.aten._unsafe_view(out, x.shape)
        return out + shared[0] if shared else out

    def run_experts(
        self,
        tokens: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        overlap: Callable[[], None] | None = None,
    ) -> Tensor:
        """Bring tokens to their experts and back; override it for another exchange.

        Args:
            tokens: (T, D).
            topk_ids: (T, K), -1 is none.
            topk_weights: (T, K).
            overlap: to be called while tokens travel, if that is possible.

        Returns:
            (T, D): weighted sums of the experts' rows.
        """
        if parallel_state(self.experts) is not None:
            return self.experts(tokens, topk_ids, topk_weights, overlap=overlap)
        if self.group is not None and self.group.size() > 1:
            return moe(
                tokens,
                topk_ids,
                topk_weights,
                self.experts,
                self.group,
                num_experts=self.num_experts,
                num_chunks=self.num_chunks,
                overlap=overlap,
                experts_need_grad=any(
                    parameter.requires_grad for parameter in self.experts.parameters()
                ),
            )
        rows, how = permute(tokens, topk_ids, num_experts=self.num_experts)
        rows = self.experts(rows, how.offsets)
        return unpermute(rows, how, topk_weights.flatten()[how.index])
