# SPDX-License-Identifier: Apache-2.0
"""One call of each c10d collective: its tensors, what must come out, what must leave.

A size is nccl-tests': the larger of what a rank puts in and what it gets: for
all-gather the output, for reduce-scatter the input, for gather and scatter the root's
list, for send and recv the message. Element j of rank r's input is (j % 7 + 1) (r + 1),
in float32, so that sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

ITEM_BYTES = 4
ROOT = 0


@dataclass
class Case:
    """One operation at one size on this rank.

    Attributes:
        call: runs it on a group; returns when this rank's part is complete.
        inputs: pairs of a tensor and what it holds before the call.
        outputs: pairs of a tensor and what it must hold after the call.
        size_bytes: what the size came to, in whole elements and equal parts.
    """

    call: Callable[[dist.ProcessGroup], None]
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    size_bytes: int = 0

    def renew(self) -> None:
        """Fill outputs with wrong values, then inputs, maybe of the same tensors."""
        for tensor, _ in self.outputs:
            tensor.fill_(-1)
        for tensor, values in self.inputs:
            tensor.copy_(values)

    def count_wrong(self) -> int:
        """Elements of the outputs that are not what they must be."""
        return sum(int((t != expected).sum()) for t, expected in self.outputs)


@dataclass(frozen=True)
class Setting:
    """Rank, ranks, and elements of the larger side of an operation."""

    rank: int
    world_size: int
    count: int

    @property
    def part(self) -> int:
        """Elements of one rank's part."""
        return self.count // self.world_size

    @property
    def sum_of_factors(self) -> int:
        """What an element of the base is multiplied with in a sum over ranks."""
        return self.world_size * (self.world_size + 1) // 2

    def values(self, factor: int) -> torch.Tensor:
        """Base values times a factor, such as rank + 1, over the larger side."""
        return (torch.arange(self.count) % 7 + 1).float() * factor

    def parts(self, factor: int) -> list[torch.Tensor]:
        """The same, cut into one part per rank."""
        return list(self.values(factor).split(self.part))

    @property
    def own(self) -> torch.Tensor:
        """This rank's input where it is as large as the larger side."""
        return self.values(self.rank + 1)

    def gathered(self) -> list[torch.Tensor]:
        """The first part as each rank has it."""
        return [self.parts(rank + 1)[0] for rank in range(self.world_size)]


def _in_place(
    setting: Setting,
    expected: torch.Tensor | None,
    call: Callable[[torch.Tensor, dist.ProcessGroup], object],
) -> Case:
    """A case of one tensor; ``expected`` None: this rank's result is not defined."""
    tensor = setting.own
    case = Case(lambda group: call(tensor, group) and None)
    case.inputs = [(tensor, setting.own)]
    if expected is not None:
        case.outputs = [(tensor, expected)]
    return case


def all_reduce(setting: Setting) -> Case:
    """Sum of a tensor over all ranks."""
    total = setting.values(setting.sum_of_factors)
    return _in_place(setting, total, lambda t, g: dist.all_reduce(t, group=g))


def all_reduce_coalesced(setting: Setting) -> Case:
    """Sums of four tensors in one call."""
    total = setting.values(setting.sum_of_factors)
    return _in_place(
        setting,
        total,
        lambda t, g: dist.all_reduce_coalesced(list(t.chunk(4)), group=g),
    )


def reduce(setting: Setting) -> Case:
    """Sum on the first rank."""
    total = setting.values(setting.sum_of_factors) if setting.rank == ROOT else None
    return _in_place(setting, total, lambda t, g: dist.reduce(t, ROOT, group=g))


def broadcast(setting: Setting) -> Case:
    """The first rank's tensor on all ranks."""
    return _in_place(
        setting,
        setting.values(ROOT + 1),
        lambda t, g: dist.broadcast(t, ROOT, group=g),
    )


def all_gather_into_tensor(setting: Setting) -> Case:
    """Every rank's part on all ranks, in one tensor."""
    part, whole = setting.parts(setting.rank + 1)[0], torch.empty(setting.count)
    return Case(
        lambda g: dist.all_gather_into_tensor(whole, part, group=g) and None,
        outputs=[(whole, torch.cat(setting.gathered()))],
    )


def all_gather(setting: Setting) -> Case:
    """Every rank's part on all ranks, in a list."""
    part = setting.parts(setting.rank + 1)[0]
    parts = [torch.empty(setting.part) for _ in range(setting.world_size)]
    return Case(
        lambda g: dist.all_gather(parts, part, group=g) and None,
        outputs=list(zip(parts, setting.gathered(), strict=True)),
    )


def reduce_scatter_tensor(setting: Setting) -> Case:
    """Each rank's part of the sum."""
    whole, part = setting.own, torch.empty(setting.part)
    return Case(
        lambda g: dist.reduce_scatter_tensor(part, whole, group=g) and None,
        outputs=[(part, setting.parts(setting.sum_of_factors)[setting.rank])],
    )


def gather(setting: Setting) -> Case:
    """Every rank's part on the first rank."""
    part = setting.parts(setting.rank + 1)[0]
    if setting.rank != ROOT:
        return Case(lambda g: dist.gather(part, None, ROOT, group=g) and None)
    parts = [torch.empty(setting.part) for _ in range(setting.world_size)]
    return Case(
        lambda g: dist.gather(part, parts, ROOT, group=g) and None,
        outputs=list(zip(parts, setting.gathered(), strict=True)),
    )


def scatter(setting: Setting) -> Case:
    """The first rank's parts, one to each rank."""
    part = torch.empty(setting.part)
    parts = setting.parts(ROOT + 1) if setting.rank == ROOT else None
    return Case(
        lambda g: dist.scatter(part, parts, ROOT, group=g) and None,
        outputs=[(part, setting.parts(ROOT + 1)[setting.rank])],
    )


def _exchanged(setting: Setting) -> list[torch.Tensor]:
    return [
        setting.parts(source + 1)[setting.rank] for source in range(setting.world_size)
    ]


def all_to_all_single(setting: Setting) -> Case:
    """A part from every rank to every rank, in one tensor."""
    sent, received = setting.own, torch.empty(setting.count)
    return Case(
        lambda g: dist.all_to_all_single(received, sent, group=g) and None,
        outputs=[(received, torch.cat(_exchanged(setting)))],
    )


def all_to_all(setting: Setting) -> Case:
    """A part from every rank to every rank, in lists."""
    sent = setting.parts(setting.rank + 1)
    received = [torch.empty_like(part) for part in sent]
    return Case(
        lambda g: dist.all_to_all(received, sent, group=g) and None,
        outputs=list(zip(received, _exchanged(setting), strict=True)),
    )


def send_recv(setting: Setting) -> Case:
    """A message from the first rank to the last, and back."""
    first, last = 0, setting.world_size - 1
    if setting.rank not in (first, last) or first == last:
        return Case(lambda group: None)
    tensor = torch.empty(setting.count)

    def call(group: dist.ProcessGroup) -> None:
        if setting.rank == first:
            dist.send(tensor, last, group=group)
            dist.recv(tensor, last, group=group)
        else:
            dist.recv(tensor, first, group=group)
            dist.send(tensor, first, group=group)

    expected = setting.values(first + 1)
    inputs = [(tensor, expected)] if setting.rank == first else []
    return Case(call, inputs=inputs, outputs=[(tensor, expected)])


def barrier(setting: Setting) -> Case:
    """No data."""
    return Case(lambda group: dist.barrier(group=group) and None)


OPERATIONS: dict[str, Callable[[Setting], Case]] = {
    make.__name__: make
    for make in (
        *(all_reduce, all_gather_into_tensor, reduce_scatter_tensor, broadcast),
        *(reduce, gather, scatter, all_to_all_single, all_to_all, send_recv, barrier),
        *(all_gather, all_reduce_coalesced),
    )
}
WITHOUT_SIZE = {"barrier"}
# What FSDP calls, with sizes of a layer.
OF_FSDP = ("all_gather_into_tensor", "reduce_scatter_tensor")


def make_case(operation: str, size_bytes: int) -> Case:
    """Make an operation for this rank of the default group.

    Args:
        operation: one of OPERATIONS.
        size_bytes: rounded down to equal parts of at least 4 elements.
    """
    world_size = dist.get_world_size()
    step = 4 * world_size
    count = max(1, size_bytes // ITEM_BYTES // step) * step
    case = OPERATIONS[operation](Setting(dist.get_rank(), world_size, count))
    case.size_bytes = 0 if operation in WITHOUT_SIZE else count * ITEM_BYTES
    return case


def least_leaving_bytes(
    operation: str, size_bytes: int, node_of_rank: list[int]
) -> int | None:
    """Bytes that must cross the network per call, where each crosses once per node.

    Every node needs what the others have, or their partial sum of what it has: for
    all-gather and reduce-scatter each node misses ``size - own part``, which is
    ``size * (nodes - 1)`` over all nodes. None where no data moves.
    """
    nodes, world_size = max(node_of_rank) + 1, len(node_of_rank)
    part = size_bytes // world_size
    once = size_bytes * (nodes - 1)
    if operation in WITHOUT_SIZE:
        return None
    if operation.startswith("all_reduce"):
        return 2 * once
    if operation in ("gather", "scatter"):
        return part * sum(node != node_of_rank[ROOT] for node in node_of_rank)
    if operation.startswith("all_to_all"):
        return part * sum(a != b for a in node_of_rank for b in node_of_rank)
    if operation == "send_recv":
        return 2 * size_bytes * (node_of_rank[0] != node_of_rank[-1])
    return once
