# SPDX-License-Identifier: Apache-2.0
"""The same transformers model, its experts on several ranks in different ways.

All shard the dense part over all ranks by FSDP2 on gloo; they differ in how tokens
reach the experts.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from moe_peers import exchange_rows, inverse, sort_picks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import torch_automoe as automoe
from torch_automoe.parallel.adapters import Call, ReceivedRows
from torch_automoe.parallel.experts import ParallelExperts, parallel_state

CONTENDERS = {
    "automoe": "automoe.parallelize, experts on the backend automoe",
    "transformers": "transformers' own expert parallelism (all_to_all), on gloo",
    "stock": "hand-written all_to_all_single of expanded rows, on gloo",
}
# Not a contender: each rank feeds its tokens to its own experts.
NO_EXCHANGE = "no_exchange"


@dataclass
class Contender:
    """A model of this rank, and what makes a step of it."""

    label: str
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, tokens: Tensor) -> float:
        """Forward, backward and optimizer on ``tokens`` (B, S + 1); the loss."""
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def make_contender(label: str, options: argparse.Namespace) -> Contender:
    """Build the model of one contender, with the same weights as all. Collective."""
    torch.manual_seed(options.seed)
    makers: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
        "automoe": _make_automoe,
        "stock": lambda o: _make_other(o, StockExchange),
        NO_EXCHANGE: lambda o: _make_other(o, NoExchange),
        "transformers": _make_transformers,
    }
    model = makers[label](options)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return Contender(label, model, optimizer)


def model_config(options: argparse.Namespace) -> Any:
    """Configuration of the model, in the names that its family has for things."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(options.family)
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    widths = ("moe_intermediate_size", "intermediate_size")
    values = {
        next(name for name in experts if hasattr(config, name)): options.experts,
        next(name for name in widths if hasattr(config, name)): options.expert_dim,
        "num_experts_per_tok": options.topk,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.hidden // 64,
        "head_dim": 64,
        "vocab_size": options.vocab,
        "max_position_embeddings": options.seq_len,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return AutoConfig.for_model(options.family, **values)


def _new_model(options: argparse.Namespace) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(model_config(options))


def _make_automoe(options: argparse.Namespace) -> nn.Module:
    model = _new_model(options)
    mesh = automoe.init_moe_mesh(
        "cpu", ep=dist.get_world_size(), backend_override={"ep": "automoe"}
    )
    automoe.parallelize(model, mesh)
    return _shard_dense(model, mesh.dense)


def _make_other(
    options: argparse.Namespace, exchange: type[ParallelExperts]
) -> nn.Module:
    model = _new_model(options)
    mesh = automoe.init_moe_mesh("cpu", ep=dist.get_world_size())
    automoe.parallelize(model, mesh)
    for module in model.modules():
        state = parallel_state(module)
        if state is not None:
            state.__class__ = exchange
    return _shard_dense(model, mesh.dense)


def _shard_dense(model: nn.Module, mesh: Any) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _make_transformers(options: argparse.Namespace) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    # It shards while it loads, so the weights go through a folder that all see.
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    path = Path(folder[0])
    try:
        if dist.get_rank() == 0:
            _new_model(options).save_pretrained(path)
        dist.barrier()
        size = dist.get_world_size()
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            distributed_config=DistributedConfig(
                tp_size=1, fsdp_size=size, ep_size=size, ep_implementation="all_to_all"
            ),
        )
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
    return model


class StockExchange(ParallelExperts):
    """Rows expanded per pick through ``all_to_all_single``: what stock code sends."""

    def _exchange(
        self, module: nn.Module, call: Call, overlap: Callable[[], None] | None
    ) -> Tensor:
        # A shared expert is run where the block asks for it: nothing travels beside.
        group, size = self.group, self.ep.size()
        each = -(-self.adapter.num_experts // size)
        picks = sort_picks(call.topk_ids)
        sent = torch.bincount(picks.expert, minlength=size * each).view(size, each)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        splits = received.sum(1).tolist(), sent.sum(1).tolist()
        rows = _AllToAllRows.apply(call.x[picks.token], *splits, group)
        keys = torch.arange(each).repeat(size).repeat_interleave(received.flatten())
        order = keys.argsort(stable=True)
        rows = self._compute(module, rows[order], received.sum(0))
        back = _AllToAllRows.apply(rows[inverse(order)], *reversed(splits), group)
        picked = back[inverse(picks.slot)].view(*call.topk_ids.shape, -1)
        weights = call.topk_weights.to(picked.dtype)
        return torch.bmm(weights[:, None], picked).squeeze(1)

    def _compute(self, module: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
        offsets = counts.cumsum(0).to(torch.int32)
        received = ReceivedRows(rows, None, offsets)
        parameters = self._local_parameters(module)
        return self.adapter.compute(module, received, parameters)


class NoExchange(StockExchange):
    """The experts of this rank work on its own tokens: as much work, no traffic."""

    def _exchange(
        self, module: nn.Module, call: Call, overlap: Callable[[], None] | None
    ) -> Tensor:
        each = -(-self.adapter.num_experts // self.ep.size())
        rows, how = automoe.permute(call.x, call.topk_ids % each, num_experts=each)
        rows = self._compute(module, rows, how.num_tokens_per_expert)
        weights = call.topk_weights.flatten()[how.index.long()]
        return automoe.unpermute(rows, how, weights)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        receive_splits: list[int],
        send_splits: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.back = receive_splits, send_splits, group
        return exchange_rows(rows.contiguous(), send_splits, receive_splits, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        receive_splits, send_splits, group = ctx.back
        back = exchange_rows(grad.contiguous(), receive_splits, send_splits, group)
        return back, None, None, None
