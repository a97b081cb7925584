# SPDX-License-Identifier: Apache-2.0
"""Registers the c10d backend "automoe", and says what it does for a group."""

from __future__ import annotations

import atexit
import copy
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from torch_automoe._autoload import BACKEND, autoload

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch_automoe import _C

# Of options that name none: then the group's own holds.
_DEFAULT_TIMEOUT = timedelta(minutes=30)
# How long a process that exits goes on relaying for others of its node.
_EXIT_LIMIT = timedelta(seconds=3)


def create(options: Any, pg_options: Any) -> _C.ProcessGroupAutoMoe:
    """Make the backend object of one group; called by c10d on every member.

    ``options`` is c10d's ``_DistributedBackendOptions``.
    """
    from torch_automoe import _loader

    extension = _loader.load()
    if pg_options is None:
        pg_options = extension.Options()
    if not isinstance(pg_options, extension.Options):
        raise ValueError(
            f"pg_options is a {type(pg_options).__name__}, expected "
            f"torch_automoe.Options or None for the backend {BACKEND!r}"
        )
    _at_exit(extension.shutdown)
    # The user's may be given to several groups.
    pg_options = copy.copy(pg_options)
    if pg_options._timeout == _DEFAULT_TIMEOUT:
        pg_options._timeout = options.timeout
    return extension.ProcessGroupAutoMoe(
        options.store,
        options.group_rank,
        options.group_size,
        options.group_id,
        list(options.global_ranks_in_group),  # empty for the default group
        pg_options,
        _make_inner(options),
    )


def _make_inner(options: Any) -> dist.Backend | None:
    """Make the NCCL group that runs collectives on CUDA tensors; None without a GPU."""
    import torch

    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return None
    nccl = dist.ProcessGroupNCCL
    made = nccl.Options()
    made._timeout = options.timeout
    # A store may outlive a group and serve its successor of the same name; each rank
    # counts its incarnations, so the counts agree, and no old address is read.
    incarnation = options.store.add(f"automoe-inner/{options.group_rank}", 1)
    store = dist.PrefixStore(f"automoe-inner/{incarnation}", options.store)
    return nccl(store, options.group_rank, options.group_size, made)


_exit_registered = False


def _at_exit(shutdown: Callable[[timedelta], None]) -> None:
    global _exit_registered
    if not _exit_registered:
        # Before the interpreter goes: works and futures may still hold tensors.
        atexit.register(shutdown, _EXIT_LIMIT)
        _exit_registered = True


@dataclass(frozen=True)
class Topology:
    """Which ranks of a group share a node.

    Attributes:
        rank: of this process in the group.
        num_nodes: how many nodes the group spans.
        node_of_rank: the node of each group rank, numbered by first appearance.
        local_rank_of_rank: the position of each group rank among those of its node.
    """

    rank: int
    num_nodes: int
    node_of_rank: list[int]
    local_rank_of_rank: list[int]


def topology(group: dist.ProcessGroup | None = None) -> Topology:
    """Return the topology that the group (default: the default group) has found.

    Raises:
        ValueError: the group has no backend "automoe", or there is none.
    """
    return Topology(**_backend_of(group).topology())


def stats(group: dist.ProcessGroup | None = None) -> dict[str, int]:
    """Return counters of a group: operations, blocks by the way they took, bytes.

    Bytes are bytes, ``wait_us`` microseconds. Keys that begin with ``network_`` (but
    for ``network_payload_bytes``), ``wait_us`` and ``node_memory_bytes`` count for the
    whole process, the others for the group.

    Raises:
        ValueError: the group has no backend "automoe", or there is none.
    """
    return _backend_of(group).stats()


def explain_exchange(group: dist.ProcessGroup | None = None) -> str:
    """Return in words which exchange the group's all-to-alls used, and why.

    Raises:
        ValueError: the group has no backend "automoe", or there is none.
    """
    return _backend_of(group).explain_exchange()


def _backend_of(group: dist.ProcessGroup | None) -> _C.ProcessGroupAutoMoe:
    from torch_automoe import _loader

    if group is None:
        if not dist.is_initialized():
            raise ValueError(
                "there is no process group: call torch.distributed."
                f"init_process_group({BACKEND!r}) first"
            )
        group = dist.group.WORLD
    kind = _loader.load().ProcessGroupAutoMoe
    for device in group._device_types:
        backend = group._get_backend(device)
        # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it.
        backend = getattr(backend, "wrapped_pg", backend)
        if isinstance(backend, kind):
            return backend
    raise ValueError(
        f"the group's backend is {dist.get_backend(group)!r}, expected {BACKEND!r}"
    )


# With TORCH_DEVICE_BACKEND_AUTOLOAD=0 an import of this module is enough.
autoload()
