# SPDX-License-Identifier: Apache-2.0
"""A reference router: which experts a token goes to, and with which weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_automoe.balance.counts import add_once, count_tokens
from torch_automoe.balance.losses import (
    attach_loss,
    load_balancing_loss,
    router_z_loss,
    sequence_balance_loss,
)

_SCORE_FUNCS = ("softmax", "sigmoid")
_GROUP_SCORES = ("top2", "max")
# The places of Router.balance_loss_sums; the last counts forwards.
_LOSSES = ("aux_loss", "seq_aux_loss", "z_loss")
# These stay at least this wide when a model is cast: small steps add up in them.
_WIDE = ("expert_bias", "balance_loss_sums")


class Router(nn.Module):
    """Top-k router with scores in float32, or wider where its input is.

    Scores are softmax or sigmoid of ``x @ weight.T``. The ``top_k`` experts with the
    highest score plus ``expert_bias`` are chosen; weights are their scores alone
    ("Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024;
    "DeepSeek-V3 Technical Report", 2024, section 2.1.2). ``ExpertBiasUpdate`` sets it.

    In training mode it counts, once where activation checkpointing recomputes, what it
    chose, and brings losses whose coefficient is not 0 (``attach_loss``): nothing has
    to be added to the main loss. ``set_balance_loss_scale`` says how much they count.

    Attributes:
        weight: (E, D) parameter; ``bias`` (E,) parameter or None.
        expert_bias: (E,) float32 buffer, saved with the model; or None.
        num_tokens_per_expert: (E,) int64 buffer, not saved: picks since it was last
            set to zero, those dropped by capacity included.
        num_dropped: () int64 buffer, not saved: picks that capacity dropped.
        loss_scale: factor of all losses.
        capacity_factor, balance_group, coefficients: may be changed at any time.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        score_func: str = "softmax",
        norm_topk_prob: bool = True,
        route_scale: float = 1.0,
        num_groups: int | None = None,
        topk_groups: int | None = None,
        group_score: str = "top2",
        expert_bias: bool = True,
        bias: bool = False,
        capacity_factor: float | None = None,
        aux_loss_coef: float = 0.0,
        seq_aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        balance_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a router.

        Args:
            dim: D, width of a token.
            num_experts: E.
            top_k: K, experts per token.
            score_func: "softmax" over all experts, or "sigmoid" of each.
            norm_topk_prob: divide the K weights of a token by their sum.
            route_scale: multiply the weights by this.
            num_groups: groups of E / num_groups experts in order. As many as nodes
                that hold equally many experts: it bounds the nodes of a token.
            topk_groups: a token goes to experts of at most this many groups: those
                with the highest group score.
            group_score: "top2": sum of a group's two best biased scores (DeepSeek-V3);
                "max": its best (DeepSeek-V2).
            expert_bias: have the bias of the choice.
            bias: have a bias of the linear layer.
            capacity_factor: an expert takes at most ceil(capacity_factor * T * K / E)
                of this rank's T tokens, the highest weights first ("GShard", 2020).
                Dropped ones get id -1 and weight 0; the other weights stay. None:
                nothing is dropped.
            aux_loss_coef: of ``load_balancing_loss``.
            seq_aux_loss_coef: of ``sequence_balance_loss``.
            z_loss_coef: of ``router_z_loss``.
            balance_group: process group for ``load_balancing_loss``.
            device: of parameters and buffers.
            dtype: of parameters.

        Raises:
            ValueError: an argument is not as above.
        """
        super().__init__()
        _check_sizes(dim, num_experts, top_k)
        _check_choice("score_func", score_func, _SCORE_FUNCS)
        _check_choice("group_score", group_score, _GROUP_SCORES)
        _check_groups(num_experts, top_k, num_groups, topk_groups)
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(
                f"capacity_factor is {capacity_factor}, expected more than 0, or None "
                "to drop nothing"
            )
        self.num_experts, self.top_k = num_experts, top_k
        self.score_func, self.norm_topk_prob = score_func, norm_topk_prob
        self.route_scale = route_scale
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.group_score = group_score
        self.capacity_factor = capacity_factor
        self.aux_loss_coef, self.seq_aux_loss_coef = aux_loss_coef, seq_aux_loss_coef
        self.z_loss_coef, self.balance_group = z_loss_coef, balance_group
        self.loss_scale = 1.0
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, dim, **made))
        linear_bias = nn.Parameter(torch.empty(num_experts, **made)) if bias else None
        self.register_parameter("bias", linear_bias)
        self._make_buffers(expert_bias, device)
        self.reset_parameters()

    def _make_buffers(self, expert_bias: bool, device: Any) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        wide, count = torch.float32, torch.int64
        chosen = zeros(self.num_experts, dtype=wide) if expert_bias else None
        self.register_buffer("expert_bias", chosen)
        for name, buffer in {
            "num_tokens_per_expert": zeros(self.num_experts, dtype=count),
            "num_dropped": zeros(dtype=count),
            "balance_loss_sums": zeros(len(_LOSSES) + 1, dtype=wide),
        }.items():
            self.register_buffer(name, buffer, persistent=False)

    def reset_parameters(self) -> None:
        """Draw the parameters as ``nn.Linear`` does, set all buffers to zero."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def forward(self, x: Tensor, num_sequences: int = 1) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            x: (T, D) float; T may be 0.
            num_sequences: of equal length that the tokens are of, for the sequence
                balance loss; 0 where T is 0.

        Returns:
            topk_weights (T, K) float32 or wider; topk_ids (T, K) int64, -1 where
            capacity has dropped the pick.
        """
        with _no_autocast(x.device.type):
            logits = self._logits(x)
            scores = self._scores(logits)
            topk_ids = self._choose(scores.detach())
            topk_weights = scores.gather(1, topk_ids)
            if self.norm_topk_prob:
                tiny = torch.finfo(scores.dtype).tiny
                total = topk_weights.sum(-1, keepdim=True)
                topk_weights = topk_weights / total.clamp(min=tiny)
            topk_weights = topk_weights * self.route_scale
            if self.training:
                add_once(
                    self.num_tokens_per_expert, count_tokens(topk_ids, self.num_experts)
                )
                losses = self._losses(logits, scores, topk_ids, num_sequences)
                topk_weights = self._attach(topk_weights, losses)
            if self.capacity_factor is not None:
                topk_weights, topk_ids = self._drop(topk_weights, topk_ids)
        return topk_weights, topk_ids

    def _logits(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.score_func == "softmax" else logits.sigmoid()

    def _choose(self, scores: Tensor) -> Tensor:
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        if self.num_groups is not None:
            groups = scores.unflatten(1, (self.num_groups, -1))
            best = 1 if self.group_score == "max" else min(2, groups.shape[2])
            group_scores = groups.topk(best, dim=-1)[0].sum(-1)
            chosen = group_scores.topk(self.topk_groups, dim=-1)[1]
            closed = torch.ones_like(group_scores, dtype=torch.bool)
            closed = closed.scatter(1, chosen, False)
            scores = groups.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)
        return scores.topk(self.top_k, dim=-1)[1]

    def _losses(
        self, logits: Tensor, scores: Tensor, topk_ids: Tensor, num_sequences: int
    ) -> list[tuple[float, Tensor] | None]:
        """Coefficient and loss in the order of _LOSSES, None where it is not wanted."""
        probabilities = scores
        if self.score_func == "sigmoid":
            tiny = torch.finfo(scores.dtype).tiny
            probabilities = scores / scores.sum(-1, keepdim=True).clamp(min=tiny)
        losses: list[tuple[float, Callable[[], Tensor]]] = [
            (
                self.aux_loss_coef,
                lambda: load_balancing_loss(
                    probabilities, topk_ids, group=self.balance_group
                ),
            ),
            (
                self.seq_aux_loss_coef,
                lambda: sequence_balance_loss(probabilities, topk_ids, num_sequences),
            ),
            (self.z_loss_coef, lambda: router_z_loss(logits)),
        ]
        return [(coef, loss()) if coef else None for coef, loss in losses]

    def _attach(
        self, topk_weights: Tensor, losses: list[tuple[float, Tensor] | None]
    ) -> Tensor:
        if not any(losses):
            return topk_weights
        zero = topk_weights.new_zeros(())
        values = [zero if pair is None else pair[1].detach() for pair in losses]
        forward = zero + min(topk_weights.shape[0], 1)  # one without tokens has none
        add_once(self.balance_loss_sums, torch.stack([*values, forward]))
        total = sum(coef * loss for coef, loss in filter(None, losses))
        return attach_loss(topk_weights, total, self.loss_scale)

    def _drop(self, topk_weights: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keep for each expert the picks with the highest weights."""
        ids = topk_ids.flatten()
        by_weight = (
            topk_weights.detach().flatten().argsort(descending=True, stable=True)
        )
        order = by_weight[ids[by_weight].argsort(stable=True)]
        counts = count_tokens(topk_ids, self.num_experts)
        first = counts.cumsum(0) - counts
        place = torch.arange(ids.shape[0], device=ids.device) - first[ids[order]]
        # A whole number is below ceil(c) where it is below c.
        capacity = self.capacity_factor * ids.shape[0] / self.num_experts
        over = torch.zeros_like(ids, dtype=torch.bool)
        over = over.scatter(0, order, place.double() >= capacity).view_as(topk_ids)
        if self.training:
            add_once(self.num_dropped, over.sum())
        return topk_weights.masked_fill(over, 0.0), topk_ids.masked_fill(over, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        before = {name: self._buffers[name] for name in _WIDE}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            cast = self._buffers[name]
            if cast is not None and cast.dtype.itemsize < 4:
                self._buffers[name] = buffer.to(cast.device)
        return self

    def extra_repr(self) -> str:
        """Sizes and what differs from the plainest router."""
        text = f"dim={self.weight.shape[1]}, num_experts={self.num_experts}, "
        text += f"top_k={self.top_k}, score_func={self.score_func!r}"
        for name in ("num_groups", "topk_groups", "capacity_factor"):
            value = getattr(self, name)
            text += "" if value is None else f", {name}={value}"
        return text


def set_balance_loss_scale(model: nn.Module, scale: float) -> None:
    """Set the factor of the losses that the routers of a model bring.

    1, the default, is right where the loss is a mean over this rank's tokens and
    gradients are averaged over ranks, as FSDP and DDP do. 1 / M over M accumulated
    batches whose losses are divided by M; 1 / ranks where gradients are summed over
    ranks; times the scale of a gradient scaler.
    """
    for router in _routers(model):
        router.loss_scale = float(scale)


@torch.no_grad()
def balance_losses(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's losses of all routers since the last call, for the log.

    Returns:
        ``moe/aux_loss``, ``moe/seq_aux_loss``, ``moe/z_loss``, as far as they are
        wanted: means over layers and over the forwards in training mode that had
        tokens (0 if none had), without coefficient and scale; scalars.
    """
    found: dict[str, list[Tensor]] = {}
    for router in _routers(model):
        *sums, forwards = router.balance_loss_sums.clone()
        router.balance_loss_sums.zero_()
        for name, value in zip(_LOSSES, sums, strict=True):
            if getattr(router, f"{name}_coef"):
                mean = value / forwards.clamp(min=1)
                found.setdefault(f"moe/{name}", []).append(mean)
    return {name: torch.stack(values).mean() for name, values in found.items()}


def _routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _check_sizes(dim: int, num_experts: int, top_k: int) -> None:
    for name, value in {"dim": dim, "num_experts": num_experts}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"top_k is {top_k}, expected 1 to num_experts, which is {num_experts}"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {choices}")


def _check_groups(
    num_experts: int, top_k: int, num_groups: int | None, topk_groups: int | None
) -> None:
    if (num_groups is None) != (topk_groups is None):
        raise ValueError(
            f"num_groups is {num_groups} and topk_groups {topk_groups}, expected both "
            "or neither"
        )
    if num_groups is None or topk_groups is None:
        return
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(
            f"num_groups is {num_groups}, expected a divisor of num_experts, which is "
            f"{num_experts}"
        )
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(
            f"topk_groups is {topk_groups}, expected 1 to num_groups, which is "
            f"{num_groups}"
        )
    if topk_groups * (num_experts // num_groups) < top_k:
        raise ValueError(
            f"topk_groups is {topk_groups}, of {num_experts // num_groups} experts "
            f"each, expected enough for top_k, which is {top_k}"
        )
