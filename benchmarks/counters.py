# SPDX-License-Identifier: Apache-2.0
"""Nodes, their network interfaces, the bytes these sent, and their line rate."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

_STREAM_BLOCK = 1 << 20
_STREAM_RAMP_S = 0.5  # not counted: slow start, and the burst that a shaper lets pass
_STREAM_COUNTED_S = 2.0


def node_of_ranks() -> list[int]:
    """Node of every rank, numbered by first appearance. Collective.

    A node is what has a name and a network of its own: AUTOMOE_NODE where it is set,
    else host name and network namespace, so the emulated nodes of one machine count.
    """
    namespace = os.readlink("/proc/self/ns/net")
    label = os.environ.get("AUTOMOE_NODE") or f"{socket.gethostname()} {namespace}"
    digest = hashlib.blake2b(label.encode(), digest_size=8).digest()
    own = torch.tensor([int.from_bytes(digest, "little", signed=True)])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    number: dict[int, int] = {}
    return [number.setdefault(int(label), len(number)) for label in gathered]


@dataclass(frozen=True)
class Route:
    """An interface and the network that is reached through it, such as 10.0.0.0/24."""

    interface: str
    network: ipaddress.IPv4Network


def route_to(table: str, address: str) -> Route | None:
    """Route that ``table``, the text of /proc/net/route, gives for an IPv4 address.

    The longest matching prefix wins, then the lowest metric; the default route matches
    every address.
    """
    target = ipaddress.IPv4Address(address)
    best: tuple[int, int] | None = None
    route = None
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8 or not int(fields[3], 16) & 1:  # RTF_UP
            continue
        # Addresses stand there as hexadecimal of the raw, little-endian word.
        destination, mask = (
            int.from_bytes(bytes.fromhex(fields[i]), "little") for i in (1, 7)
        )
        network = ipaddress.IPv4Network((destination, mask.bit_count()))
        key = (network.prefixlen, -int(fields[6]))
        if target in network and (best is None or key > best):
            best, route = key, Route(fields[0], network)
    return route


def find_route() -> Route | None:
    """Route to MASTER_ADDR; None if there is none but loopback's."""
    try:
        address = socket.gethostbyname(os.environ.get("MASTER_ADDR", "127.0.0.1"))
        table = Path("/proc/net/route").read_text()
    except OSError:
        return None
    return route_to(table, address)


class InterfaceCounter:
    """Reads the sent bytes of every node's interface, through one rank of each."""

    def __init__(self, node_of_rank: list[int], interface: str | None) -> None:
        """``interface`` None finds it. Raises ``SystemExit`` where a node has none."""
        rank = dist.get_rank()
        self.num_nodes = max(node_of_rank) + 1
        self._node = node_of_rank[rank]
        self._reads = node_of_rank.index(self._node) == rank
        route = find_route()
        self.interface = interface or (route and route.interface)
        self._file = Path(f"/sys/class/net/{self.interface}/statistics/tx_bytes")
        if interface and not self._file.exists():
            found = ", ".join(sorted(os.listdir("/sys/class/net")))
            raise SystemExit(
                f"benchmark: got --interface {interface}, but the node of rank "
                f"{rank} has {found}; pass one that every node has"
            )
        # Without a counter on each node there is nothing to show on any.
        missing = torch.tensor([int(self._reads and not self._file.exists())])
        dist.all_reduce(missing)
        self.available = self.num_nodes > 1 and int(missing) == 0

    def _read(self) -> torch.Tensor:
        """Sent bytes so far of each node; complete on the ranks that read only."""
        sent = torch.zeros(self.num_nodes, dtype=torch.float64)
        if self._reads:
            sent[self._node] = int(self._file.read_text())
        return sent

    def _count(self, action: Callable[[], None], calls: int) -> torch.Tensor:
        dist.barrier()
        before = self._read()
        dist.barrier()
        for _ in range(calls):
            action()
        dist.barrier()
        sent = self._read() - before
        dist.all_reduce(sent)
        return sent

    def bytes_per_call(
        self, action: Callable[[], None], calls: int
    ) -> list[float] | None:
        """Bytes that each node sent per call of ``action``; None if not available.

        They are what the link carried: payload, headers and acknowledgements. The two
        barriers around the calls are counted apart and taken off. Collective.
        """
        if not self.available:
            return None
        barriers = self._count(lambda: None, 0)
        sent = self._count(action, calls) - barriers
        return (sent.clamp_min(0) / calls).tolist()


def own_address() -> str:
    """IPv4 address of this node on the route to MASTER_ADDR; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 9))
        return probe.getsockname()[0]


def measure_line(node_of_rank: list[int]) -> float:
    """Payload rate of one TCP stream from node 1 to node 0, in MB/s (1 MB = 1e6 B).

    Collective; the other ranks wait. Raises ``SystemExit`` with fewer than two nodes.
    """
    if max(node_of_rank) < 1:
        raise SystemExit(
            "benchmark: --measure-line needs two nodes, got one; leave it out"
        )
    receiver, sender = node_of_rank.index(0), node_of_rank.index(1)
    rank = dist.get_rank()
    place: list[tuple[str, int] | None] = [None]
    with contextlib.ExitStack() as stack:
        listener = None
        if rank == receiver:
            listener = stack.enter_context(socket.create_server((own_address(), 0)))
            listener.settimeout(30)
            place = [listener.getsockname()]
        dist.broadcast_object_list(place, src=receiver)
        rate = torch.zeros(1, dtype=torch.float64)
        if listener is not None:
            rate[0] = _receive_stream(listener)
        elif rank == sender:
            _send_stream(place[0])
        dist.all_reduce(rate)
    return float(rate)


def _send_stream(address: tuple[str, int] | None) -> None:
    block = bytes(_STREAM_BLOCK)
    with (
        contextlib.suppress(ConnectionError),  # how the receiver says: enough
        socket.create_connection(address, timeout=30) as connection,
    ):
        while True:
            connection.sendall(block)


def _receive_stream(listener: socket.socket) -> float:
    buffer = bytearray(_STREAM_BLOCK)
    counted, begin = 0, None
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(30)
        start = time.monotonic()
        while True:
            received = connection.recv_into(buffer)
            now = time.monotonic()
            if received == 0:
                raise ConnectionError("the stream of --measure-line ended early")
            if begin is not None:
                counted += received
                if now - begin >= _STREAM_COUNTED_S:
                    return counted / (now - begin) / 1e6
            elif now - start >= _STREAM_RAMP_S:
                begin = now
