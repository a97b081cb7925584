# SPDX-License-Identifier: Apache-2.0
"""What a laboratory looks like: nodes, ranks, addresses and links. Pure values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MASTER_PORT = 29500
MAX_NODES = 250
PLACEMENTS = ("block", "cyclic")

_RATE_UNITS = {
    "bit": 1,
    "kbit": 10**3,
    "mbit": 10**6,
    "gbit": 10**9,
    "tbit": 10**12,
}
_SIZE_UNITS = {"": 1, "b": 1, "k": 2**10, "kb": 2**10, "m": 2**20, "mb": 2**20}
# A GSO packet of 64 kB must fit into the token bucket, or the kernel cuts it up.
_MIN_BURST = 128 * 1024


def parse_rate(text: str) -> int:
    """Turn ``"1gbit"`` into bytes per second, with tc's units.

    Raises:
        ValueError: not a positive number with bit, kbit, mbit, gbit or tbit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", text.strip().lower())
    bits = float(match[1]) * _RATE_UNITS.get(match[2], 0) if match else 0.0
    if bits < 8:
        raise ValueError(
            f"rate: got {text!r}, expected a positive number with one of "
            f"{', '.join(_RATE_UNITS)}, for example 1gbit or 500mbit"
        )
    return int(bits / 8)


def parse_size(text: str) -> int:
    """Turn ``"128kb"`` into bytes; kb and mb are powers of two, as in tc.

    Raises:
        ValueError: not a positive number with b, k, kb, m or mb.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", text.strip().lower())
    size = int(float(match[1]) * _SIZE_UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise ValueError(
            f"size: got {text!r}, expected a positive number with b, kb or mb, "
            f"for example 128kb"
        )
    return size


def parse_nodes(nodes: str, ranks_per_node: int | None = None) -> tuple[int, ...]:
    """Turn ``--nodes`` and ``--ranks-per-node`` into ranks per node.

    ``"4"`` with 2 is ``(2, 2, 2, 2)``; ``"3,3,2"`` names each node's ranks.

    Raises:
        ValueError: not whole positive numbers, or both forms at once.
    """
    well_formed = re.fullmatch(r"\d+(,\d+)*", nodes.strip())
    counts = tuple(int(part) for part in nodes.split(",")) if well_formed else (0,)
    if 0 in counts:
        raise ValueError(
            f"nodes: got {nodes!r}, expected a number of nodes (4) or the ranks "
            f"of each node (3,3,2)"
        )
    if len(counts) > 1:
        if ranks_per_node is not None:
            raise ValueError(
                f"ranks-per-node: got {ranks_per_node} beside nodes {nodes!r}, which "
                f"already names the ranks of each node; give only one of the two"
            )
        return counts
    return (2 if ranks_per_node is None else ranks_per_node,) * counts[0]


@dataclass(frozen=True)
class LabSpec:
    """The shape of a laboratory.

    Attributes:
        ranks_per_node: one entry per node, each at least 1.
        rate: bytes per second of each node's link in each direction; None: unshaped.
        burst: bytes that may leave a link at once; None: 128 KiB, or 1 ms of the rate
            where that is more.
        threads: OMP_NUM_THREADS of every rank; None: as in the environment, else 1.
        placement: "block" fills node after node, "cyclic" deals ranks out in turn.
    """

    ranks_per_node: tuple[int, ...]
    rate: int | None = None
    burst: int | None = None
    threads: int | None = None
    placement: str = "block"

    def __post_init__(self) -> None:
        counts = self.ranks_per_node
        if not 1 <= len(counts) <= MAX_NODES or any(count < 1 for count in counts):
            raise ValueError(
                f"nodes: got {list(counts)}, expected 1 to {MAX_NODES} nodes with at "
                f"least one rank each"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: got {self.threads}, expected at least 1")
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"placement: got {self.placement!r}, expected one of {PLACEMENTS}"
            )
        if self.burst is not None and self.rate is None:
            raise ValueError(
                "burst: given without a rate; a link without a rate is not shaped, so "
                "give a rate as well"
            )
        if self.burst is not None and self.burst < 64 * 1024:
            raise ValueError(
                f"burst: got {self.burst} bytes, expected at least 64kb: a smaller "
                f"bucket cannot hold one segmentation-offload packet and the link "
                f"would not reach its rate"
            )

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.ranks_per_node)

    @property
    def world_size(self) -> int:
        """Number of ranks of all nodes."""
        return sum(self.ranks_per_node)

    @property
    def node_of_rank(self) -> tuple[int, ...]:
        """The node of each rank."""
        if self.placement == "block":
            counts = enumerate(self.ranks_per_node)
            return tuple(node for node, count in counts for _ in range(count))
        turns = range(max(self.ranks_per_node))
        return tuple(
            node
            for turn in turns
            for node, count in enumerate(self.ranks_per_node)
            if turn < count
        )

    @property
    def local_rank_of_rank(self) -> tuple[int, ...]:
        """The place of each rank among the ranks of its node."""
        node_of_rank = self.node_of_rank
        return tuple(
            node_of_rank[:rank].count(node) for rank, node in enumerate(node_of_rank)
        )

    @property
    def master(self) -> tuple[str, int]:
        """Where rank 0's store listens."""
        return address(self.node_of_rank[0]), MASTER_PORT

    @property
    def link_burst(self) -> int:
        """Bytes of the token bucket in use."""
        return self.burst or default_burst(self.rate or 0)

    def describe(self) -> str:
        """One line for people: nodes, ranks, link."""
        counts = self.ranks_per_node
        if len(set(counts)) == 1:
            shape = f"{len(counts)} nodes x {counts[0]} ranks"
        else:
            shape = f"{len(counts)} nodes with {'+'.join(map(str, counts))} ranks"
        if self.rate is None:
            return f"{shape}, links unshaped"
        bits = self.rate * 8
        names = sorted(_RATE_UNITS.items(), key=lambda item: -item[1])
        name, unit = next((n, u) for n, u in names if bits >= u)
        return f"{shape}, links {bits / unit:g}{name} both ways"

    def hosts_file(self, node: int) -> str:
        """The text of ``/etc/hosts`` on a node."""
        lines = ["127.0.0.1 localhost", "::1 ip6-localhost ip6-loopback"]
        own_first = [node, *(n for n in range(self.num_nodes) if n != node)]
        lines += [f"{address(n)} {hostname(n)}" for n in own_first]
        # What a dual-stack socket shows for an IPv4 peer; a name of its own, so that
        # looking up a host name never yields this form.
        lines += [f"::ffff:{address(n)} {hostname(n)}-mapped" for n in own_first]
        return "\n".join(lines) + "\n"

    def rank_environment(self, rank: int) -> dict[str, str]:
        """The variables that torchrun would set for this rank.

        All of torchrun's contract except TORCHELASTIC_*: no elastic agent stands
        behind the ranks, so nothing may look for one.
        """
        node_of_rank = self.node_of_rank
        node = node_of_rank[rank]
        world_size = str(self.world_size)
        return {
            "RANK": str(rank),
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": str(self.local_rank_of_rank[rank]),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node[node]),
            "NODE_RANK": str(node),
            "GROUP_RANK": str(node),
            "GROUP_WORLD_SIZE": str(self.num_nodes),
            "ROLE_NAME": "default",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": world_size,
            "MASTER_ADDR": self.master[0],
            "MASTER_PORT": str(self.master[1]),
        }


def make_spec(
    nodes: Sequence[int],
    rate: str | None = None,
    burst: str | None = None,
    threads: int | None = None,
    placement: str = "block",
) -> LabSpec:
    """Build a LabSpec from ranks per node and tc-style texts.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """
    return LabSpec(
        ranks_per_node=tuple(nodes),
        rate=None if rate is None else parse_rate(rate),
        burst=None if burst is None else parse_size(burst),
        threads=threads,
        placement=placement,
    )


def default_burst(rate: int) -> int:
    """Token bucket for a rate: one large packet, or what 1 ms carries."""
    return max(_MIN_BURST, rate // 1000)


def hostname(node: int) -> str:
    """The host name of a node."""
    return f"node{node}"


def address(node: int) -> str:
    """The IPv4 address of a node, inside the laboratory's own network."""
    return f"10.77.0.{node + 1}"
