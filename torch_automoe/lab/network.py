# SPDX-License-Identifier: Apache-2.0
"""The network between the nodes: a bridge, a veth pair per node, a shaper each way."""

from __future__ import annotations

from .netlink import Netlink
from .spec import LabSpec, address, default_burst, hostname

INTERFACE = "eth0"
_BRIDGE = "br0"
_PREFIX = 16


class Network:
    """Lives in the supervisor's network namespace and reaches into those of the nodes.

    node 0 [eth0] === [node0]--+
    node 1 [eth0] === [node1]--+-- br0         each === is one veth pair
    node 2 [eth0] === [node2]--+

    What leaves a node passes the shaper of its eth0; what reaches it passes that of
    the bridge's end, so both directions of a link have the same rate of their own.
    """

    def __init__(self, spec: LabSpec) -> None:
        self._spec = spec
        self._bridge_side = Netlink()
        self._node_side: list[Netlink] = []
        self._bridge_side.add_bridge(_BRIDGE)
        self._bridge_side.set_up(_BRIDGE)

    def join(self, netlink: Netlink, namespace: int) -> None:
        """Connect the next node.

        Args:
            netlink: a socket opened in the node's network namespace; owned from now on.
            namespace: a descriptor of that namespace; the caller closes it.
        """
        node = len(self._node_side)
        self._node_side.append(netlink)
        port = hostname(node)
        self._bridge_side.add_veth(port, _BRIDGE, INTERFACE, namespace)
        netlink.add_address(INTERFACE, address(node), _PREFIX)
        if self._spec.rate is not None:
            self.set_rate(node, self._spec.rate, self._spec.link_burst)
        netlink.set_up(INTERFACE)
        self._bridge_side.set_up(port)

    def set_rate(self, node: int, rate: int | None, burst: int | None = None) -> None:
        """Shape both directions of a node's link to ``rate`` bytes/s; None: unshape."""
        for netlink, name in self._ends(node):
            if rate is None:
                netlink.clear_rate(name)
            else:
                netlink.set_rate(name, rate, burst or default_burst(rate))

    def set_link(self, node: int, up: bool) -> None:
        """Plug a node's cable in or out, at the bridge; the node sees its carrier."""
        self._bridge_side.set_up(hostname(node), up)

    def counters(self) -> list[dict[str, int]]:
        """Bytes and packets that each node's interface sent and received."""
        links = [netlink.link(INTERFACE) for netlink in self._node_side]
        return [
            {
                "tx_bytes": link.tx_bytes,
                "rx_bytes": link.rx_bytes,
                "tx_packets": link.tx_packets,
                "rx_packets": link.rx_packets,
            }
            for link in links
        ]

    def _ends(self, node: int) -> list[tuple[Netlink, str]]:
        return [
            (self._node_side[node], INTERFACE),
            (self._bridge_side, hostname(node)),
        ]
