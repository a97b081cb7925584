# SPDX-License-Identifier: Apache-2.0
"""Collectives of c10d: how each is called, and what every rank receives then."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from collective_values import (
    DTYPES,
    FLOAT8,
    HUGE,
    LARGE,
    OPS,
    OTHER_INTEGERS,
    SMALL_SIZES,
    Case,
    Tensors,
    combine,
    join,
)
from exchange_cases import Pair, group_pairs

Group = dist.ProcessGroup

# Bytes are bytes: one dtype of each size.
_HUGE_DTYPES = [
    torch.uint8,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex128,
]

# ---- collectives: what this rank receives from a call, and what it should ----


@dataclass(frozen=True)
class Collective:
    """A collective.

    Attributes:
        run: calls it on a group and returns what this rank received.
        expect: the same for a rank of a group of so many ranks, computed.
        reduces: it needs an operation.
    """

    run: Callable[[Case, Group], Tensors]
    expect: Callable[[Case, int, int], Tensors]
    reduces: bool = False


def _everyone(case: Case, size: int, salt: int = 0, numel: int | None = None):
    return [case.values(rank, salt, numel) for rank in range(size)]


def _total(case: Case, size: int, salt: int = 0, numel: int | None = None):
    return combine(case.op, _everyone(case, size, salt, numel))


def _sizes(case: Case) -> list[tuple[int, int]]:
    """Salt and size of each of three tensors that travel together."""
    return [(salt, case.elements + salt) for salt in range(3)]


def _broadcast(case: Case, group: Group) -> Tensors:
    results = []
    for root in range(group.size()):
        tensor = case.values(group.rank())
        dist.broadcast(tensor, group=group, group_src=root)
        results.append(tensor)
    return results


def _gather(case: Case, group: Group) -> Tensors:
    results = []
    for root in range(group.size()):
        outputs = None
        if group.rank() == root:
            outputs = [case.blank() for _ in range(group.size())]
        tensor = case.values(group.rank())
        dist.gather(tensor, outputs, group=group, group_dst=root)
        results += outputs or []
    return results


def _scatter(case: Case, group: Group) -> Tensors:
    results = []
    for root in range(group.size()):
        inputs = None
        if group.rank() == root:
            inputs = [case.values(root, salt) for salt in range(group.size())]
        output = case.blank()
        dist.scatter(output, inputs, group=group, group_src=root)
        results.append(output)
    return results


def _all_gather(case: Case, group: Group) -> Tensors:
    outputs = [case.blank() for _ in range(group.size())]
    dist.all_gather(outputs, case.values(group.rank()), group=group)
    return outputs


def _all_gather_into_tensor(case: Case, group: Group) -> Tensors:
    output = case.blank(group.size() * case.elements)
    dist.all_gather_into_tensor(output, case.values(group.rank()), group=group)
    return [output]


def _all_gather_coalesced(case: Case, group: Group) -> Tensors:
    inputs = [case.values(group.rank(), *it) for it in _sizes(case)]
    outputs = [[case.blank(n) for _, n in _sizes(case)] for _ in range(group.size())]
    dist.all_gather_coalesced(outputs, inputs, group=group)
    return [tensor for output in outputs for tensor in output]


def _coalesced_all_gather(case: Case, group: Group) -> Tensors:
    outputs = [case.blank(group.size() * n) for _, n in _sizes(case)]
    with dist._coalescing_manager(group, async_ops=True) as manager:
        for output, it in zip(outputs, _sizes(case), strict=True):
            tensor = case.values(group.rank(), *it)
            dist.all_gather_into_tensor(output, tensor, group=group)
    manager.wait()
    return outputs


def _all_to_all_single(case: Case, group: Group) -> Tensors:
    output = case.blank(group.size() * case.elements)
    inputs = [case.values(group.rank(), salt) for salt in range(group.size())]
    dist.all_to_all_single(output, case.as_input(join(inputs)), group=group)
    return [output]


def _all_to_all(case: Case, group: Group) -> Tensors:
    outputs = [case.blank() for _ in range(group.size())]
    inputs = [case.values(group.rank(), salt) for salt in range(group.size())]
    dist.all_to_all(outputs, inputs, group=group)
    return outputs


def _ring(case: Case, group: Group) -> Tensors:
    """To the next rank, from the one before; a rank alone has none."""
    rank, size = group.rank(), group.size()
    if size == 1:
        return []
    received = case.blank()
    work = dist.isend(case.values(rank), group=group, group_dst=(rank + 1) % size)
    dist.recv(received, group=group, group_src=(rank - 1) % size)
    work.wait()
    return [received]


def _all_reduce(case: Case, group: Group) -> Tensors:
    tensor = case.values(group.rank())
    work = dist.all_reduce(tensor, case.reduce_op, group=group, async_op=True)
    assert work.wait()
    assert work.is_completed()
    return [tensor]


def _all_reduce_coalesced(case: Case, group: Group) -> Tensors:
    tensors = [case.values(group.rank(), *it) for it in _sizes(case)]
    dist.all_reduce_coalesced(tensors, case.reduce_op, group=group)
    return tensors


def _coalesced_all_reduce(case: Case, group: Group) -> Tensors:
    tensors = [case.values(group.rank(), *it) for it in _sizes(case)]
    with dist._coalescing_manager(group):
        for tensor in tensors:
            dist.all_reduce(tensor, case.reduce_op, group=group)
    return tensors


def _reduce(case: Case, group: Group) -> Tensors:
    results = []
    for root in range(group.size()):
        tensor = case.values(group.rank())
        dist.reduce(tensor, op=case.reduce_op, group=group, group_dst=root)
        if group.rank() == root:  # elsewhere gloo leaves anything
            results.append(tensor)
    return results


def _reduce_scatter(case: Case, group: Group) -> Tensors:
    output = case.blank()
    inputs = [case.values(group.rank(), salt) for salt in range(group.size())]
    dist.reduce_scatter(output, inputs, case.reduce_op, group=group)
    return [output]


def _reduce_scatter_tensor(case: Case, group: Group) -> Tensors:
    output = case.blank()
    inputs = [case.values(group.rank(), salt) for salt in range(group.size())]
    tensor = case.as_input(join(inputs))
    dist.reduce_scatter_tensor(output, tensor, case.reduce_op, group=group)
    return [output]


def _coalesced_reduce_scatter(case: Case, group: Group) -> Tensors:
    outputs = [case.blank(n) for _, n in _sizes(case)]
    with dist._coalescing_manager(group):
        for output, (_, n) in zip(outputs, _sizes(case), strict=True):
            ranks = range(group.size())
            inputs = [case.values(group.rank(), salt, n) for salt in ranks]
            tensor = case.as_input(join(inputs))
            dist.reduce_scatter_tensor(output, tensor, case.reduce_op, group=group)
    return outputs


def _expect_totals(case: Case, rank: int, size: int) -> Tensors:
    return [_total(case, size, *it) for it in _sizes(case)]


def _expect_own_total(case: Case, rank: int, size: int) -> Tensors:
    return [_total(case, size, rank)]


COLLECTIVES = {
    "broadcast": Collective(_broadcast, lambda c, r, n: _everyone(c, n)),
    "gather": Collective(_gather, lambda c, r, n: _everyone(c, n)),
    "scatter": Collective(
        _scatter, lambda c, r, n: [c.values(root, r) for root in range(n)]
    ),
    "all_gather": Collective(_all_gather, lambda c, r, n: _everyone(c, n)),
    "all_gather_into_tensor": Collective(
        _all_gather_into_tensor, lambda c, r, n: [join(_everyone(c, n))]
    ),
    "all_gather_coalesced": Collective(
        _all_gather_coalesced,
        lambda c, r, n: [c.values(i, *it) for i in range(n) for it in _sizes(c)],
    ),
    "coalesced_all_gather": Collective(
        _coalesced_all_gather,
        lambda c, r, n: [join(_everyone(c, n, *it)) for it in _sizes(c)],
    ),
    "all_to_all_single": Collective(
        _all_to_all_single, lambda c, r, n: [join(_everyone(c, n, r))]
    ),
    "all_to_all": Collective(_all_to_all, lambda c, r, n: _everyone(c, n, r)),
    "send_and_recv": Collective(
        _ring, lambda c, r, n: [c.values((r - 1) % n)] if n > 1 else []
    ),
    "all_reduce": Collective(_all_reduce, lambda c, r, n: [_total(c, n)], True),
    "all_reduce_coalesced": Collective(_all_reduce_coalesced, _expect_totals, True),
    "coalesced_all_reduce": Collective(_coalesced_all_reduce, _expect_totals, True),
    "reduce": Collective(_reduce, lambda c, r, n: [_total(c, n)], True),
    "reduce_scatter": Collective(_reduce_scatter, _expect_own_total, True),
    "reduce_scatter_tensor": Collective(
        _reduce_scatter_tensor, _expect_own_total, True
    ),
    "coalesced_reduce_scatter": Collective(
        _coalesced_reduce_scatter,
        lambda c, r, n: [_total(c, n, r, numel) for _, numel in _sizes(c)],
        True,
    ),
}


def rows(name: str) -> list[tuple[torch.dtype, str | None]]:
    """Each dtype with each operation that a collective is defined for."""
    if not COLLECTIVES[name].reduces:
        return [(dtype, None) for dtype in DTYPES]
    return [(dtype, op) for op, dtypes in OPS.items() for dtype in dtypes]


def gloo_lacks(name: str, dtype: torch.dtype, op: str | None) -> bool:
    """Rows that gloo refuses, in torch 2.13 and 2.14."""
    if name == "send_and_recv":
        return False
    if dtype in OTHER_INTEGERS or dtype in FLOAT8 or op == "PREMUL_SUM":
        return True
    if op == "AVG":
        if dtype is torch.complex32:
            return "all_reduce" not in name
        return not (dtype.is_floating_point or dtype.is_complex)
    return name == "gather" and dtype.is_complex


# ---- which cases ----


@functools.cache
def groups() -> list[Pair]:
    """All ranks, all in reverse order, every second one, all but the first, and one."""
    rank = dist.get_rank()
    alone = [
        dist.new_group([rank], backend=backend, use_local_synchronization=True)
        for backend in ("automoe", "gloo")
    ]
    return [*group_pairs(), Pair([rank], *alone)]


def cover_pairs(choices: Iterable[tuple], seed: int = 1) -> list[tuple]:
    """Some of the choices: each pair of values that occurs at all occurs in them."""
    choices = list(choices)
    random.Random(seed).shuffle(choices)
    covered, kept = set(), []
    for choice in choices:
        pairs = set(itertools.combinations(enumerate(choice), 2))
        if not pairs <= covered:
            covered |= pairs
            kept.append(choice)
    return kept


def plan(name: str, num_groups: int, *, every: bool) -> list[tuple[Case, int]]:
    """Cases with the index of a group.

    Of dtypes, operations, sizes and groups each pair; before, with ``every``, each row
    in small sizes over all ranks. Calls that travel together are not huge.
    """
    sizes = [0, 1, LARGE] + ([] if "coalesced" in name else [HUGE])
    small = itertools.product(rows(name), SMALL_SIZES, [0])
    choices = itertools.product(rows(name), sizes, range(num_groups))
    some = cover_pairs(
        (dtype, op, size, group)
        for (dtype, op), size, group in choices
        if size != HUGE or dtype in _HUGE_DTYPES
    )
    first = [(*row, size, group) for row, size, group in small] if every else []
    return [(Case(*row), group) for *row, group in [*first, *some]]
