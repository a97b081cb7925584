# SPDX-License-Identifier: Apache-2.0
"""Runs callers that PyTorch ships on a group of ours and on one of gloo; on the ranks.

A case is a function of ``Groups``: it uses the groups and meshes of one backend and
returns what came out. ``compare`` runs it with both and compares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_flatten

CPU = torch.device("cpu")
# What float64 leaves of equal sums taken in another order, after a few steps.
ROUNDING = 1e-11
BACKENDS = ("gloo", "automoe")


class Groups:
    """The groups and meshes of one backend; each is made once and kept."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._meshes: dict[tuple[int, ...], DeviceMesh] = {}

    @functools.cached_property
    def world(self) -> dist.ProcessGroup:
        """All ranks; never the default group, so that a caller who forgets shows."""
        return dist.new_group(backend=self.backend, group_desc=f"all by {self.backend}")

    @functools.cached_property
    def halves(self) -> dist.ProcessGroup:
        """The half of the ranks that this rank is in."""
        size = dist.get_world_size() // 2
        mine, _ = dist.new_subgroups(size, backend=self.backend)
        return mine

    def mesh(self, *shape: int) -> DeviceMesh:
        """A mesh over all ranks.

        The names differ by backend: meshes that differ in nothing else are equal, and
        DTensor's caches would take one for the other.
        """
        if shape not in self._meshes:
            names = tuple(f"{self.backend}{index}" for index in range(len(shape)))
            self._meshes[shape] = init_device_mesh(
                "cpu",
                shape,
                mesh_dim_names=names,
                backend_override=dict.fromkeys(names, self.backend),
            )
        return self._meshes[shape]


@functools.cache
def groups_of(backend: str) -> Groups:
    """The Groups of a backend in this process."""
    return Groups(backend)


def calls(backend: str) -> int:
    """Collectives that this process has called on all groups of a backend."""
    return sum(
        group._get_backend(CPU)._get_sequence_number_for_group()
        for group in dist.distributed_c10d._world.pg_map
        if dist.get_backend(group) == backend
    )


@contextmanager
def only_by(backend: str, *, counted: bool = True):
    """Check that what runs here calls collectives of one backend only.

    Args:
        counted: collectives are called; False: perhaps sends and receives only, which
            ours does not number.
    """
    before = {name: calls(name) for name in BACKENDS}
    yield
    grown = {name: calls(name) - before[name] for name in BACKENDS}
    other = BACKENDS[1 - BACKENDS.index(backend)]
    assert grown[other] == 0, f"meant for {backend}, calls by backend: {grown}"
    assert grown[backend] > 0 or not counted, f"nothing called {backend}"


def run_case(case: Callable, backend: str, *args: object, **options: object) -> object:
    """What a case returns with the groups of a backend, from a fixed seed."""
    groups = groups_of(backend)
    counted = getattr(case, "counted", True)
    made = [groups.world, groups.halves]
    assert all(dist.get_backend(group) == backend for group in made)
    torch.manual_seed(5)
    with only_by(backend, counted=counted):
        return case(groups, *args, **options)


def compare(
    case: Callable, *args: object, tolerance: float = 0.0, **options: object
) -> int:
    """Run a case by gloo and by us and compare what comes out.

    Args:
        tolerance: absolute and relative; 0: the same bits.

    Returns:
        how many tensors were compared.
    """
    reference, ours = (run_case(case, name, *args, **options) for name in BACKENDS)
    return check_close(ours, reference, tolerance)


def compare_pair(
    case: Callable, *args: object, tolerance: float = ROUNDING, **options: object
) -> int:
    """Run a case by us alone that returns what it found and what it should find."""
    found, expected = run_case(case, "automoe", *args, **options)
    return check_close(found, expected, tolerance)


def check_close(ours: object, reference: object, tolerance: float) -> int:
    """Compare trees of tensors and values; returns how many tensors they hold."""
    ours_flat, ours_spec = tree_flatten(ours)
    reference_flat, spec = tree_flatten(reference)
    assert ours_spec == spec, (ours_spec, spec)
    tensors = 0
    for index, (mine, expected) in enumerate(
        zip(ours_flat, reference_flat, strict=True)
    ):
        if not isinstance(expected, torch.Tensor):
            assert mine == expected, (index, mine, expected)
            continue
        tensors += 1
        torch.testing.assert_close(
            mine,
            expected,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, index=index: f"result {index}: {text}",
        )
    return tensors
