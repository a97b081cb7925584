# SPDX-License-Identifier: Apache-2.0
"""Plans: which rank's experts get which tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from torch_automoe import ops
from torch_automoe.fake_kernels import extension

_ops = torch.ops.automoe


@dataclass(frozen=True)
class Facts:
    """What all ranks know of a plan, and what this rank knows of its own part.

    Attributes:
        fingerprint: hash of what all ranks have planned; equal on all of them.
        total_tokens: of all ranks.
        num_dropped: experts' rows that this rank had no room for; -1 where only a
            device knows (``Plan.num_dropped`` asks it).
        num_send_rows: of this rank, one per token and node; where only a device knows,
            as many as there may be.
        num_nodes: that the group spans.
        sums_per_node: the order of sums lets a node send one sum per token.
    """

    fingerprint: int
    total_tokens: int
    num_dropped: int
    num_send_rows: int
    num_nodes: int
    sums_per_node: bool


@dataclass(frozen=True)
class Plan:
    """Where the rows of every token go; made by ``plan``, as tensors alone.

    It holds no memory but its tensors and what a GPU has for them; it may be used any
    number of times, in any order beside other plans, and dropped at any time. All
    tensors are int32 and on the device of the ids that it was made for, but ``route``
    is always on the CPU. R is the number of rows that this rank receives, e of its
    experts.

    Attributes:
        route: (W,) the lists of the exchange; opaque.
        receive_index: (R,) opaque, -1 for padding.
        num_tokens_per_expert: (e,) rows of each expert of this rank.
        offsets: (e,) where each expert's rows end, as ``grouped_mm`` takes them; they
            begin at a multiple of ``align``.
        num_tokens: T of this rank.
        topk: K.
        num_experts: E, of all ranks.
        align: rows of each expert are padded to a multiple of it.
        group_name: c10d's name of the process group.
    """

    route: Tensor
    receive_index: Tensor
    num_tokens_per_expert: Tensor
    offsets: Tensor
    num_tokens: int
    topk: int
    num_experts: int
    align: int
    group_name: str

    @property
    def num_recv_tokens(self) -> int:
        """R: rows that this rank receives, padding included."""
        return self.receive_index.shape[0]

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group."""
        return _resolve_process_group(self.group_name)

    @property
    def facts(self) -> Facts:
        """Figures that are read from ``route``."""
        words = _ops.route_facts(self.route).tolist()
        return Facts(
            fingerprint=words[0] & (1 << 64) - 1,
            total_tokens=words[2],
            num_dropped=words[7],
            num_send_rows=words[8],
            num_nodes=words[12],
            sums_per_node=bool(words[14]),
        )

    @property
    def fingerprint(self) -> int:
        """Hash of what all ranks have planned; equal on all of them."""
        return self.facts.fingerprint

    @property
    def num_dropped(self) -> int:
        """Experts' rows that did not fit ``max_recv_tokens`` of this rank.

        On a GPU, the host waits for it.
        """
        dropped = self.facts.num_dropped
        if dropped >= 0:
            return dropped
        return _ops.route_facts(extension.route_words(self.route)).tolist()[7]

    @property
    def reduction_map(self) -> list[int]:
        """Label (node) of each group rank in the order of sums; see ``plan``."""
        return _ops.route_reduction_map(self.route).tolist()

    def part(self, index: int, num_parts: int) -> Plan:
        """Return the plan of some of the rows; needs no communication.

        Part 0 has the rows that stay inside their node, the others a piece each of
        the rest. Every row is in exactly one part. Only for packed exchanges, as
        ``moe`` makes them.
        """
        tensors = _ops.plan_part(self.route, self.offsets, index, num_parts)
        return Plan(
            *tensors,
            self.num_tokens,
            self.topk,
            self.num_experts,
            self.align,
            self.group_name,
        )


def plan(
    topk_ids: Tensor,
    *,
    num_experts: int,
    group: dist.ProcessGroup | str | None = None,
    align: int = 1,
    max_recv_tokens: int | None = None,
    reduction_map: Sequence[int] | None = None,
) -> Plan:
    """Plan an exchange of tokens with experts; collective over the group.

    Experts lie on the ranks as DTensor's ``Shard(0)`` places them: ceil(E / P) on
    each of P ranks in order, fewer or none on the last.

    Args:
        topk_ids: (T, K) int32 or int64, experts of each token; -1 is none. T may
            differ by rank and be 0; K may not.
        num_experts: E, of all ranks.
        group: any group with ``all_to_all_single``, or its name; default: the default
            group. Only the backend "automoe" joins rows that go to one node.
        align: begin the rows of each expert at a multiple of this.
        max_recv_tokens: give exactly that many receive rows (the rest is padding), so
            that shapes do not depend on routing. Rows beyond are dropped: counted in
            ``Plan.num_dropped``, and warned about once (not by compiled code, and not
            on GPUs, where the host does not see them).
        reduction_map: a label of each group rank; default: its node. Sums over the
            experts of one label are rounded to the rows' type, then summed by
            label. It fixes the bits of results: pin the map of another cluster to
            reproduce its run. One that is not the group's own nodes costs more bytes
            between nodes.

    On GPUs that reach each other, the plan is made by them, and ``route`` has only a
    header: pass the tensor itself on, as a copy of it stands for nothing. The hosts
    tell each other their sizes; then each waits once for its GPU, to learn R. With
    ``max_recv_tokens`` it does not: ids outside of [-1, E) then count as -1, and ids
    that a recomputation changes are not noticed. ``align`` and ``max_recv_tokens``
    must be the same on all ranks there. Elsewhere, and with a ``reduction_map``, the
    ids are copied to the host, which is waited for.

    ``torch.compile`` needs ``torch._dynamo.config.capture_dynamic_output_shape_ops``,
    which ``fullgraph=True`` sets by itself.

    Raises:
        ValueError: on every rank: an id is not in [-1, E), ranks disagree about E, K
            or the map, or an argument has another shape or type than above.
        torch.distributed.DistBackendError: the communication failed.
    """
    if max_recv_tokens is not None and max_recv_tokens < 0:
        raise ValueError(
            f"max_recv_tokens is {max_recv_tokens}, expected None or at least 0"
        )
    name = group_name(group)
    tensors = _ops.plan.default(
        topk_ids,
        num_experts,
        name,
        align,
        -1 if max_recv_tokens is None else max_recv_tokens,
        [] if reduction_map is None else list(reduction_map),
    )
    made = Plan(*tensors, *topk_ids.shape, num_experts, align, name)
    if max_recv_tokens is not None and has_values(made):
        _warn_of_dropped(made, made.facts.num_dropped)
    return made


def group_name(group: dist.ProcessGroup | str | None) -> str:
    """Return c10d's name of a group; default: of the default group.

    Raises:
        ValueError: there is no default group, or this rank is not in the group.
    """
    if isinstance(group, str):
        return group
    if group is None:
        if not dist.is_initialized():
            raise ValueError(
                "group is None and there is no default process group: call "
                "torch.distributed.init_process_group first"
            )
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group is {group!r}, expected a ProcessGroup that this rank is in"
        )
    return group.group_name


_warned = False


def _warn_of_dropped(made: Plan, dropped: int) -> None:
    global _warned
    if dropped > 0 and not _warned:
        _warned = True
        warnings.warn(
            f"plan: {dropped} rows for the experts of this rank were dropped, as "
            f"max_recv_tokens is {made.num_recv_tokens}; the weights of these experts "
            "count for nothing (said once; Plan.num_dropped says it for every plan)",
            stacklevel=3,
        )


def has_values(plan: Plan) -> bool:
    """Return whether the plan is one that can be read now, not one that is traced."""
    return not ops.is_traced(plan.route)
