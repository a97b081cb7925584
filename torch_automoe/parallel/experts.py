# SPDX-License-Identifier: Apache-2.0
"""An experts module whose experts lie on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torch_automoe.balance.counts import add_once, count_tokens
from torch_automoe.exchange import combine
from torch_automoe.layer import dispatch_beside, moe, tie
from torch_automoe.parallel.adapters import (
    Call,
    MoEAdapter,
    ReceivedRows,
    touch,
)
from torch_automoe.parallel.shared import EarlyShared
from torch_automoe.parallel.subclass import subclass
from torch_automoe.routing import plan

_STATE = "_automoe_experts"


@dataclass
class ParallelExperts:
    """What an experts module knows once its experts lie on several ranks.

    Attributes:
        adapter: how this kind of module is read and run.
        ep: mesh of the ranks that share its experts.
        tp: mesh of ranks that all hold the same tokens, so that each sends a part of
            them; None: every rank has tokens of its own.
        num_chunks: as ``automoe.moe`` takes it.
        shared: a shared expert that is run while tokens travel, or None.
        counts: (E,) int64, tokens that this rank has sent to each expert in training;
            None until somebody asks (``count_tokens``).
        deltas: parameter name -> what makes of this rank's part of it what is used.
        notes: what was done, for ``explain``.
    """

    adapter: MoEAdapter
    ep: DeviceMesh
    tp: DeviceMesh | None = None
    num_chunks: int | str = "auto"
    shared: EarlyShared | None = None
    counts: Tensor | None = None
    deltas: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def group(self) -> dist.ProcessGroup:
        """The expert-parallel group."""
        return self.ep.get_group()

    @property
    def local_experts(self) -> slice:
        """Which experts this rank has."""
        return chunk_of(self.adapter.num_experts, self.ep)

    def forward(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Run the module on the tokens of this rank; collective over ``group``."""
        call = self.adapter.read_call(module, args, kwargs)
        num_tokens = call.x.shape[0]
        # Of all tokens that this rank has, as the block will ask for it.
        overlap = call.overlap
        if self.shared is not None and not torch.compiler.is_compiling():
            overlap = self.shared.begin(_as_called(call.x, [*args, *kwargs.values()]))
        if self.tp is not None:
            call = self._own_part(call)
        self._count(module, call.topk_ids)
        out = self._exchange(module, call, overlap)
        if self.tp is not None:
            out = _from_parts(out, self.tp, num_tokens)
        if not torch.compiler.is_compiling() and out._is_view():
            # Blocks add to the result in place, and on a view that would drop the hook
            # by which FSDP knows of the backward.
            out = torch.ops.aten._unsafe_view(out, out.shape)
        return call.finish(out)

    def _exchange(
        self, module: nn.Module, call: Call, overlap: Callable[[], None] | None
    ) -> Tensor:
        compute, train = self._own_experts(module)
        num_experts = self.adapter.num_experts
        if not self.adapter.weighs_rows:
            return moe(
                call.x,
                call.topk_ids,
                call.topk_weights,
                lambda rows, offsets: compute(rows, None, offsets),
                self.group,
                num_experts=num_experts,
                num_chunks=self.num_chunks,
                overlap=overlap,
                experts_need_grad=train,
            )
        whole = plan(call.topk_ids, num_experts=num_experts, group=self.group)
        rows, weights = dispatch_beside(call.x, call.topk_weights, whole, overlap)
        return combine(tie(compute(rows, weights, whole.offsets), rows, train), whole)

    def _own_experts(
        self, module: nn.Module
    ) -> tuple[Callable[[Tensor, Tensor | None, Tensor], Tensor], bool]:
        """What the experts of this rank make of (rows, weights of rows, offsets).

        And whether any of their parameters needs a gradient, as on all ranks.
        """
        parameters = self._local_parameters(module)
        first = self.local_experts.start

        def compute(rows: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
            if offsets.shape[0] == 0:  # no expert is here, so no row either
                return touch(rows, *parameters.values())
            received = ReceivedRows(rows, weights, offsets, first)
            # Ranks have to agree about the type, also those without a row, which do
            # not hear what autocast makes of it.
            return self.adapter.compute(module, received, parameters).to(rows.dtype)

        return compute, any(p.requires_grad for p in parameters.values())

    def _local_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        parameters = {
            name: local_part(parameter)
            for name, parameter in self.adapter.expert_parameters(module).items()
        }
        for name, delta in self.deltas.items():
            parameters[name] = delta(parameters[name])
        return parameters

    def _own_part(self, call: Call) -> Call:
        """Take this rank's share of tokens that all ranks of ``tp`` hold."""
        part = chunk_of(call.x.shape[0], self.tp)
        weights = call.topk_weights
        return Call(
            _own_part(call.x, self.tp),
            call.topk_ids[part],
            None if weights is None else _own_part(weights, self.tp),
            call.finish,
        )

    def _count(self, module: nn.Module, topk_ids: Tensor) -> None:
        if self.counts is not None and module.training:
            add_once(self.counts, count_tokens(topk_ids, self.adapter.num_experts))

    def count_tokens(self) -> Tensor:
        """Begin to count, and return ``counts``."""
        if self.counts is None:
            self.counts = torch.zeros(
                self.adapter.num_experts, dtype=torch.int64, device=self.ep.device_type
            )
        return self.counts


def make_parallel(module: nn.Module, state: ParallelExperts) -> None:
    """Shard the experts of a module over ``state.ep``, and route its calls there."""
    for name, parameter in state.adapter.expert_parameters(module).items():
        if isinstance(parameter, DTensor):
            raise ValueError(f"its parameter {name} is sharded already")
        # src_data_rank=None: every rank has the same whole parameter and keeps its
        # own part, so that nothing is sent.
        part = distribute_tensor(
            parameter.data, state.ep, [Shard(0)], src_data_rank=None
        )
        sharded = nn.Parameter(part, requires_grad=parameter.requires_grad)
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_parameter(leaf, sharded)
    module.__dict__[_STATE] = state
    cls = type(module)
    members = {"forward": _forward, "parametrizations": _REFUSING}
    module.__class__ = subclass(cls, _automoe_original=cls, **members)


def parallel_state(module: nn.Module) -> ParallelExperts | None:
    """Return what ``make_parallel`` has left at a module."""
    return module.__dict__.get(_STATE)


def chunk_of(size: int, mesh: DeviceMesh) -> slice:
    """This rank's part of ``size`` things, as DTensor's ``Shard`` deals them."""
    each = -(-size // mesh.size())
    start = min(mesh.get_local_rank() * each, size)
    return slice(start, min(start + each, size))


def local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter; gradients come back to the parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self.__dict__[_STATE].forward(self, args, kwargs)


def _refuse_parametrization(module: nn.Module) -> None:
    # Asked for by whoever is about to swap a parameter: torch, or PEFT for LoRA.
    raise ValueError(
        f"{type(module).__name__} is parallel already, so its parameters cannot be "
        "wrapped or swapped: apply PEFT, and what else parametrizes them, before "
        "automoe.parallelize"
    )


_REFUSING = property(_refuse_parametrization)


def _as_called(x: Tensor, arguments: list[Any]) -> Tensor:
    """The tokens in the shape that the block has them in, as it matters to hooks."""
    for tensor in arguments:
        same_size = isinstance(tensor, Tensor) and tensor.numel() == x.numel()
        if same_size and tensor.data_ptr() == x.data_ptr():
            return tensor
    return x


def _own_part(tensor: Tensor, tp: DeviceMesh) -> Tensor:
    """This rank's rows of a tensor that all have; the backward gathers all rows."""
    whole = DTensor.from_local(tensor, tp, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(0)]).to_local()


def _from_parts(part: Tensor, tp: DeviceMesh, num_rows: int) -> Tensor:
    """The rows of all ranks on each; the backward takes this rank's rows."""
    shape = torch.Size((num_rows, *part.shape[1:]))
    whole = DTensor.from_local(
        part,
        tp,
        [Shard(0)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    whole = whole.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Replicate()])
