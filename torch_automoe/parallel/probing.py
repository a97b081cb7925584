# SPDX-License-Identifier: Apache-2.0
"""How a block routes its tokens, found by running it on a few random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from torch_automoe.parallel.expert_lists import experts_of

_TOKENS = (2, 24)
_TOPK_NAMES = (
    "top_k",
    "topk",
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "num_selected",
    "k",
)
_SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")
_ROUTER_NAMES = ("gate", "router")
# Relative to the largest entry. Routings that differ at all differ by far more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_LOW_PRECISION = 3e-2

Picks = tuple[Tensor, Tensor]


def _renormalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Rule:
    """From scores to experts and weights.

    Attributes:
        name: for people.
        scores: "softmax" or "sigmoid".
        renormalise: weights of a token are divided by their sum. A softmax of the
            best logits alone is the same.
        wide: scores are computed in float32, else in the type of the logits.
    """

    name: str
    scores: str
    renormalise: bool
    wide: bool

    def pick(self, logits: Tensor, topk: int, dtype: torch.dtype) -> Picks:
        """Ids and weights (T, K) for logits (T, E)."""
        values = logits.float() if self.wide else logits
        scores = values.softmax(-1) if self.scores == "softmax" else values.sigmoid()
        weights, ids = scores.topk(topk, dim=-1)
        if self.renormalise:
            weights = _renormalised(weights)
        return ids, weights.to(dtype)


RULES = [
    Rule(f"{scores}, top-k" + ", renormalised" * renormalise, scores, renormalise, wide)
    for scores, renormalise, wide in product(
        ("softmax", "sigmoid"), (True, False), (True, False)
    )
]


@dataclass(frozen=True)
class Routing:
    """What a block does beside its experts.

    Attributes:
        router: name of the child that is called on the tokens.
        rule: from its logits; None: it returns ids and weights itself.
        topk: K, or None without ``rule``.
        shared: name of a child whose output is added, or None.
        shared_gate: name of a child whose sigmoid weighs it, or None.
        returns_logits: the block returns (output, logits), not the output alone.
    """

    router: str
    rule: Rule | None
    topk: int | None
    shared: str | None
    shared_gate: str | None
    returns_logits: bool

    def describe(self) -> str:
        """In words."""
        if self.rule is None:
            parts = [f"ids and weights from {self.router}"]
        else:
            kind = "float32" if self.rule.wide else "the type of the logits"
            name = self.rule.name.replace("top-k", f"top-{self.topk}")
            parts = [f"{self.router}, then {name}, in {kind}"]
        if self.shared is not None:
            parts.append(f"plus {self.shared}")
        if self.shared_gate is not None:
            parts.append(f"weighted by the sigmoid of {self.shared_gate}")
        return ", ".join(parts)

    def run(self, block: nn.Module, x: Tensor, experts: Callable[..., Tensor]) -> Any:
        """Stand in for the forward of ``block``.

        Args:
            block: has the router and the shared expert.
            x: (..., H).
            experts: called with tokens (T, H), ids and weights (T, K).
        """
        tokens = x.reshape(-1, x.shape[-1])
        router = getattr(block, self.router)
        if self.rule is None:
            logits = None
            ids, weights = (part.flatten(0, -2) for part in _picks_in(router(x)))
        else:
            logits = router(tokens)
            ids, weights = self.rule.pick(logits, self.topk, x.dtype)
        out = experts(tokens, ids, weights)
        if self.shared is not None:
            extra = getattr(block, self.shared)(tokens)
            if self.shared_gate is not None:
                extra = extra * getattr(block, self.shared_gate)(tokens).sigmoid()
            out = out + extra
        out = out.reshape(x.shape)
        return (out, logits) if self.returns_logits else out


def find_routing(block: nn.Module, child: str) -> Routing | str:
    """Find the one routing with which a block with a list of experts is the same.

    The block runs as it is, in training and in evaluation, on random tokens; so do
    all routings that are known. Outputs and gradients must agree. Nothing is changed.

    Returns:
        the routing, or why there is none.
    """
    experts = list(experts_of(getattr(block, child)).values())
    if any(p.is_meta for p in block.parameters()):
        return (
            "its routing is found by running it, which needs parameters with values, "
            "and they are on the meta device: parallelize before to_empty is not "
            "possible for it, or give it an adapter (automoe.register_moe_adapter)"
        )
    candidates = list(_candidates(block, len(experts)))
    if not candidates:
        return (
            f"expected a router that is a Linear with {len(experts)} outputs (and K as "
            f"one of the attributes {', '.join(_TOPK_NAMES)}), or one called gate or "
            f"router that returns ids and weights; its children are "
            f"{[name for name, _ in block.named_children()]}"
        )
    fitting = dict.fromkeys(candidates, 0.0)
    for training in (False, True):
        with _as_it_was(block, experts, training):
            try:
                found = _compare(block, experts, list(fitting))
            except Exception as error:
                return f"its forward cannot be probed with random tokens: {error}"
        if isinstance(found, str):
            return f"{found} (in {'training' if training else 'evaluation'})"
        fitting = {routing: found[routing] for routing in fitting if routing in found}
    return min(fitting, key=fitting.__getitem__)


def _candidates(block: nn.Module, num_experts: int) -> Iterator[Routing]:
    children = dict(block.named_children())
    linear = [
        name
        for name, child in children.items()
        if isinstance(child, nn.Linear) and child.out_features == num_experts
    ]
    topk = next((getattr(block, n) for n in _TOPK_NAMES if _is_k(block, n)), None)
    if len(linear) == 1 and topk is not None and topk <= num_experts:
        routers = [(linear[0], rule, topk) for rule in RULES]
    else:
        routers = [(n, None, None) for n in _ROUTER_NAMES if n in children]
    shared = next((name for name in _SHARED_NAMES if name in children), None)
    gate = f"{shared}_gate" if f"{shared}_gate" in children else None
    for router, rule, k in routers:
        for logits in (True, False) if rule else (False,):
            yield Routing(router, rule, k, shared, gate, logits)


def _is_k(block: nn.Module, name: str) -> bool:
    value = getattr(block, name, None)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _picks_in(output: Any) -> Picks:
    """Ids and weights in what a router returns; TypeError where there are none."""
    parts = [v for v in output if isinstance(v, Tensor)]
    ids = next((v for v in parts if v.dtype in (torch.int32, torch.int64)), None)
    for part in parts:
        if ids is not None and part.is_floating_point() and part.shape == ids.shape:
            return ids, part
    raise TypeError("expected ids and weights of one shape from the router")


def _compare(
    block: nn.Module, experts: list[nn.Module], candidates: list[Routing]
) -> dict[Routing, float] | str:
    """Routings that give what the block gives, with their errors, or why none does."""
    first = next(block.parameters())
    width = _width(block, candidates[0], experts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*_TOKENS, width, generator=generator).to(first).requires_grad_()
    probe = torch.randn(*_TOKENS, width, generator=generator).to(first)
    own = {id(p) for expert in experts for p in expert.parameters()}
    leaves = [x, *(p for p in block.parameters() if id(p) not in own)]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    wanted = _outcome(type(block).forward(block, x), probe, leaves)
    outputs = torch.stack([e(x.reshape(-1, width)) for e in experts], 1)

    def run_experts(tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        index = ids.long()[..., None].expand(-1, -1, outputs.shape[-1])
        return (outputs.gather(1, index) * weights[..., None]).sum(1)

    tolerance = _TOLERANCE.get(first.dtype, _LOW_PRECISION)
    errors: dict[Routing, float] = {}
    for routing in candidates:
        # One that does not fit the block, as a shared expert of other arguments.
        with suppress(TypeError, RuntimeError, IndexError):
            output = routing.run(block, x, run_experts)
            errors[routing] = _difference(_outcome(output, probe, leaves), wanted)
    fitting = {routing: e for routing, e in errors.items() if e <= tolerance}
    if not fitting:
        closest = min(errors, key=errors.__getitem__, default=None)
        if closest is None:
            return "its forward does not do what a router, experts and a sum do"
        return (
            "no known routing gives the outputs and gradients of its forward; the "
            f"closest, {closest.describe()}, is off by {errors[closest]:.1g} of them"
        )
    if _are_ambiguous(block, x, list(fitting), tolerance):
        names = sorted({routing.describe() for routing in fitting})
        return (
            "its experts give nothing that would tell routings apart (are they still "
            f"zero?): {'; '.join(names)}"
        )
    return fitting


def _width(block: nn.Module, routing: Routing, experts: list[nn.Module]) -> int:
    router = getattr(block, routing.router)
    if isinstance(router, nn.Linear):
        return router.in_features
    weights = [p for p in router.parameters() if p.ndim == 2]
    if not weights:
        raise ValueError("its router has no matrix that shows the width of tokens")
    return weights[0].shape[1]


def _outcome(
    output: Any, probe: Tensor, leaves: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Output, logits if they are returned, and gradients."""
    out, logits = output if isinstance(output, tuple) else (output, None)
    if out.shape != probe.shape:
        raise RuntimeError(f"it returns {tuple(out.shape)} for {tuple(probe.shape)}")
    grads = torch.autograd.grad(
        (out * probe).sum(), leaves, retain_graph=True, allow_unused=True
    )
    grads = [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, grads, strict=True)
    ]
    return out.detach(), None if logits is None else logits.detach(), *grads


def _difference(got: tuple, wanted: tuple) -> float:
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if (a is None) != (b is None) or (a is not None and a.numel() != b.numel()):
            return float("inf")
        if a is not None:
            # Logits may come as (T, E) or (B, S, E).
            off, scale = (a - b.view_as(a)).abs().max().item(), b.abs().max().item()
            if off:
                worst = max(worst, off / scale if scale else float("inf"))
    return worst


def _are_ambiguous(
    block: nn.Module, x: Tensor, routings: list[Routing], tolerance: float
) -> bool:
    """Return whether routings that all fit give different weights to experts."""
    seen: list[Tensor] = []

    def keep(tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        dense = weights.new_zeros(ids.shape[0], int(ids.max()) + 1)
        seen.append(dense.scatter_add(1, ids.long(), weights).detach())
        return torch.zeros_like(tokens)

    for routing in routings:
        routing.run(block, x, keep)
    return any((a - seen[0]).abs().max() > 10 * tolerance for a in seen[1:])


@contextmanager
def _as_it_was(
    block: nn.Module, experts: list[nn.Module], training: bool
) -> Iterator[None]:
    """Run in a mode, experts in evaluation; leave modes, buffers, randomness alone."""
    modes = {module: module.training for module in block.modules()}
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    block.train(training)
    for expert in experts:
        # Dropout inside experts is theirs, wherever they run.
        expert.eval()
    try:
        cuda = sorted({p.device.index for p in block.parameters() if p.is_cuda})
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in block.named_buffers():
                buffer.copy_(buffers[name])
