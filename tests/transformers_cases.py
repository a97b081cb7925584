# SPDX-License-Identifier: Apache-2.0
"""What tests of transformers' families run on ranks: models beside a single process."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

import torch_automoe as automoe

TOOLS = str(Path(__file__).resolve().parent.parent / "tools")
if TOOLS not in sys.path:  # ranks get the path of the test run
    sys.path.append(TOOLS)

import moe_families  # noqa: E402
import tiny_models  # noqa: E402

_MAX_NORM = 0.05


def compare(family: str, ep: int, dtype: str = "float64", **changes: Any) -> tuple:
    """Largest error of logits and gradients, where it is, and ``explain``'s lines.

    The error is in units of what is allowed in the type of the outputs.
    """
    model = tiny_models.tiny_model(family, getattr(torch, dtype), **changes)
    pair = moe_families.Pair(model, ep)
    error, where = pair.compare()
    return error / moe_families.TOLERANCE[pair.dtype], where, pair.explanation


def train(family: str, ep: int, steps: int) -> tuple[Tensor, Tensor]:
    """Losses and gradient norms (steps, 2): of all ranks, and of one process."""
    pair = moe_families.Pair(tiny_models.tiny_model(family), ep)
    rank, size = dist.get_rank(), dist.get_world_size()
    options = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
    optimizers = [
        torch.optim.AdamW(model.parameters(), **options)
        for model in (pair.parallel, pair.single)
    ]
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 64, (size, 12), generator=generator)
    curves = torch.zeros(2, steps, 2, dtype=torch.float64)
    for step in range(steps):
        own = language_loss(pair.parallel, ids[rank][None])
        own.backward()
        dist.all_reduce(loss := own.detach().double() / size)
        norm = automoe.clip_grad_norm_(pair.parallel, _MAX_NORM)
        curves[0, step] = torch.stack([loss, norm])
        losses = [language_loss(pair.single, row[None]) / size for row in ids]
        sum(losses).backward()
        norm = nn.utils.clip_grad_norm_(pair.single.parameters(), _MAX_NORM)
        curves[1, step] = torch.stack([sum(losses).detach(), norm])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return curves[0], curves[1]


def language_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross entropy of the next token."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def generate(family: str, ep: int) -> tuple[list[int], list[int]]:
    """Tokens that this rank's own prompt gives, and those of one process."""
    rank = dist.get_rank()
    pair = moe_families.Pair(tiny_models.tiny_model(family), ep)
    generator = torch.Generator().manual_seed(rank)
    prompt = torch.randint(4, 64, (1, 3 + 2 * rank), generator=generator)
    # Ranks end at different times, and go on to serve the others.
    options = {"max_new_tokens": 9 - 2 * rank, "do_sample": False, "eos_token_id": None}
    found = []
    for model in (pair.parallel, pair.single):
        synced = model is pair.parallel
        tokens = model.eval().generate(prompt, synced_gpus=synced, **options)
        found.append(tokens[0].tolist())
    return found[0], found[1]


def sharded_implementation(family: str) -> tuple[float, str]:
    """Shard experts by hand; the implementation "automoe" does the rest."""
    model = tiny_models.tiny_model(family)
    single = copy.deepcopy(model)
    single.set_experts_implementation("eager")
    mesh = automoe.init_moe_mesh("cpu", ep=dist.get_world_size()).ep
    for module in model.modules():
        if hasattr(module, "_apply_gate"):
            for name, parameter in list(module.named_parameters()):
                part = distribute_tensor(parameter.data, mesh, [Shard(0)])
                module.register_parameter(name, nn.Parameter(part))
    model.set_experts_implementation("automoe")
    rank, size = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(4, 64, (size, 12), generator=torch.Generator().manual_seed(1))
    outputs = [moe_families.run_model(single, row[None]) for row in ids]
    sum(moe_families.measure(out) for out in outputs).backward()
    out = moe_families.run_model(model, ids[rank][None])
    moe_families.measure(out).backward()
    # Of experts alone: nobody sums the others' gradients over the ranks.
    wanted, got = moe_families.gradients_of(single), moe_families.gradients_of(model)
    errors = {"logits": (out - outputs[rank]).abs().max().item()}
    errors |= {
        name: ((got[name] - grad).abs().max() / grad.abs().max()).item()
        for name, grad in wanted.items()
        if ".experts." in name
    }
    assert len(errors) > 2
    where = max(errors, key=errors.__getitem__)
    return errors[where], where


# ---- blocks with lists of experts ----


class ListExpert(nn.Module):
    """Gate, up and down, as Mixtral's experts were."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(R, H) -> (R, H)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def mixtral_weights(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Float32 softmax of all, the best of them, divided by their sum."""
    weights, ids = logits.softmax(1, dtype=torch.float32).topk(top_k, -1)
    return weights / weights.sum(-1, keepdim=True), ids


def olmoe_weights(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best of a softmax."""
    return logits.softmax(1).topk(top_k, -1)


def late_softmax_weights(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """A softmax of the best logits."""
    best, ids = logits.topk(top_k, -1)
    return best.softmax(-1), ids


def sigmoid_weights(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best sigmoids, divided by their sum."""
    weights, ids = logits.sigmoid().topk(top_k, -1)
    return weights / weights.sum(-1, keepdim=True), ids


def tanh_weights(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Something that nobody has heard of."""
    best, ids = logits.topk(top_k, -1)
    return best.tanh(), ids


def detached_weights(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Values as of olmoe, without a gradient."""
    weights, ids = olmoe_weights(logits, top_k)
    return weights.detach(), ids


class OwnRouter(nn.Module):
    """Returns ids and weights itself, as blocks after DeepSeek's have it."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        """(B, S, H) -> ids and weights (B * S, 2)."""
        scores = F.linear(x.flatten(0, -2), self.weight).sigmoid()
        weights, ids = scores.topk(2, -1)
        return ids, 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20), None


class ListBlock(nn.Module):
    """Router, top-k and the loop over a list of experts in one forward."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        weights: Callable[[Tensor, int], tuple[Tensor, Tensor]] = mixtral_weights,
        *,
        shared: bool = False,
        returns_logits: bool = True,
        jitter: float = 0.0,
        own_router: bool = False,
    ) -> None:
        super().__init__()
        if own_router:
            self.gate = OwnRouter(dim, num_experts)
        else:
            self.gate = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(ListExpert(dim, 12) for _ in range(num_experts))
        self.top_k = 2
        self.weights = weights
        self.returns_logits = returns_logits
        self.jitter = jitter
        if shared:
            self.shared_expert = ListExpert(dim, 12)
            self.shared_expert_gate = nn.Linear(dim, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Any:
        """(B, S, H) -> (B, S, H), and the router's logits if asked for."""
        x = hidden_states.view(-1, hidden_states.shape[-1])
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        if isinstance(self.gate, OwnRouter):
            ids, weights, logits = self.gate(hidden_states)
        else:
            logits = self.gate(x)
            weights, ids = self.weights(logits, self.top_k)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, len(self.experts)).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            pick, token = torch.where(mask[number])
            rows = expert(x[token]) * weights[token, pick, None]
            out = out.index_add(0, token, rows)
        if hasattr(self, "shared_expert"):
            gate = self.shared_expert_gate(x).sigmoid()
            out = out + gate * self.shared_expert(x)
        out = out.view(hidden_states.shape)
        return (out, logits) if self.returns_logits else out


class ListModel(nn.Module):
    """Two blocks with lists of experts, between an embedding and a head."""

    def __init__(self, num_experts: int = 6, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(ListBlock(16, num_experts, **options) for _ in "ab")
        self.head = nn.Linear(16, 64)
        # What moe_families.run_model looks for.
        self.config = type("Config", (), {"is_encoder_decoder": False})

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        """(B, S) -> an object with logits (B, S, 64)."""
        del use_cache
        x = self.embed(input_ids)
        for layer in self.layers:
            out = layer(x)
            x = x + (out[0] if isinstance(out, tuple) else out)
        return type("Output", (), {"logits": self.head(x)})


def list_model(**options: Any) -> ListModel:
    """The same model in every process, float64."""
    torch.manual_seed(0)
    return ListModel(**options).double()


def compare_lists(ep: int, **options: Any) -> tuple:
    """As ``compare``, for blocks with lists."""
    pair = moe_families.Pair(list_model(**options), ep)
    error, where = pair.compare()
    return error / moe_families.TOLERANCE[pair.dtype], where, pair.explanation


def refuse_lists(**options: Any) -> tuple[str, bool]:
    """Why a model with lists is refused, and whether it is as it was."""
    meta = options.pop("meta", False)
    model = list_model(**options)
    model = model.to("meta") if meta else model
    return refuse(model)


def refuse_family(family: str) -> tuple[str, bool]:
    """As ``refuse_lists``, of a family."""
    return refuse(tiny_models.tiny_model(family))


def refuse(model: nn.Module) -> tuple[str, bool]:
    """Why a model is refused, and whether it is as it was."""
    before = _picture(model)
    mesh = automoe.init_moe_mesh("cpu", ep=dist.get_world_size())
    try:
        automoe.parallelize(model, mesh)
    except ValueError as error:
        return str(error), _picture(model) == before
    return "", False


def _picture(model: nn.Module) -> tuple:
    modules = [(name, type(m), m.training) for name, m in model.named_modules()]
    tensors = [
        (name, id(tensor), tensor._version)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    grads = [p.grad is None for p in model.parameters()]
    return modules, tensors, grads, torch.get_rng_state().tolist()
