# SPDX-License-Identifier: Apache-2.0
"""Registers the c10d backend "automoe", and says what it does for a group."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch_automoe import _C

BACKEND = "automoe"
_DEVICES = ["cpu", "cuda"]
# How long a process that exits goes on relaying for others of its node.
_EXIT_LIMIT = timedelta(seconds=3)


def autoload() -> None:
    """Register the backend; torch calls this at the end of ``import torch``.

    Cheap, and never fails an import of torch: the C++ extension is loaded when the
    first group is made.
    """
    if not dist.is_available() or BACKEND in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(
        BACKEND, _create, extended_api=True, devices=list(_DEVICES)
    )


def _create(options: Any, pg_options: Any) -> _C.ProcessGroupAutoMoe:
    """Make the backend object of one group; called by c10d on every member.

    ``options`` is c10d's ``_DistributedBackendOptions``.
    """
    from torch_automoe import _loader

    if pg_options is not None:
        raise ValueError(
            f"pg_options is a {type(pg_options).__name__}, expected None: the "
            f"backend {BACKEND!r} has no options of its own yet"
        )
    extension = _loader.load()
    _at_exit(extension.shutdown)
    inner = _make_inner(extension, options)
    return extension.ProcessGroupAutoMoe(
        options.store,
        options.group_rank,
        options.group_size,
        options.timeout,
        options.group_id,
        list(options.global_ranks_in_group),  # empty for the default group
        inner,
    )


def _make_inner(extension: Any, options: Any) -> dist.ProcessGroupGloo:
    """Make the Gloo group that runs the collectives other than all-to-all.

    Over the interface that our own traffic takes, unless GLOO_SOCKET_IFNAME names
    another. It connects all ranks now: with lazy connections Gloo waits without an
    end for a rank that has died before the first message.
    """
    gloo = dist.ProcessGroupGloo
    made = gloo._Options()
    made._timeout = options.timeout
    made._threads = 2
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not interface:
        interface = extension.choose_interface()["name"]
    made._devices = [gloo.create_device(interface=interface, lazy_init=False)]
    # A store may outlive a group and serve its successor of the same name; each rank
    # counts its incarnations, so the counts agree, and no old address is read.
    incarnation = options.store.add(f"automoe-inner/{options.group_rank}", 1)
    store = dist.PrefixStore(f"automoe-inner/{incarnation}", options.store)
    return gloo(store, options.group_rank, options.group_size, made)


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
