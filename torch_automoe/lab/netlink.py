# SPDX-License-Identifier: Apache-2.0
"""The little of rtnetlink that the laboratory needs, so that it needs no iproute2.

A netlink socket belongs to the network namespace in which it was opened, wherever its
holder goes later: the supervisor configures every node through such sockets.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass

_RTM_NEWLINK, _RTM_GETLINK = 16, 18
_RTM_NEWADDR, _RTM_NEWQDISC, _RTM_DELQDISC = 20, 36, 37
_NLMSG_ERROR = 2
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_REPLACE = 0x1, 0x4, 0x100
_NLM_F_EXCL, _NLM_F_CREATE = 0x200, 0x400
_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_NLMSGERR_ATTR_MSG = 1

_IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO = 3, 10, 18
_IFLA_STATS64, _IFLA_NET_NS_FD = 23, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_VETH_INFO_PEER = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFF_UP = 1

_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_TBF_PARMS, _TCA_TBF_RATE64, _TCA_TBF_BURST = 1, 4, 6
_TC_H_ROOT, _TC_LINKLAYER_ETHERNET = 0xFFFFFFFF, 1
# Packets that wait longer than this in front of a shaped link are dropped.
_TBF_QUEUE_SECONDS = 0.05


@dataclass(frozen=True)
class Link:
    """One interface: its index and how many bytes it sent and received."""

    index: int
    tx_bytes: int
    rx_bytes: int
    tx_packets: int
    rx_packets: int


class Netlink:
    """A netlink socket of the network namespace it was opened in.

    Every method blocks until the kernel has answered (microseconds) and raises OSError
    with the kernel's own explanation. Not thread-safe.
    """

    def __init__(self, fd: int | None = None) -> None:
        """Open a socket here, or take over one that was opened in another namespace."""
        if fd is None:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self._socket.bind((0, 0))
        else:
            self._socket = socket.socket(fileno=fd)
        self._sequence = 0

    def fileno(self) -> int:
        """The descriptor, to pass to another process."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def link(self, name: str) -> Link:
        """Look an interface up by name."""
        request = _ifinfo() + _attribute(_IFLA_IFNAME, _text(name))
        reply = self._ask(_RTM_GETLINK, 0, request, f"look up {name}")
        index = struct.unpack_from("=BxHiII", reply)[2]
        counters = _find_attribute(reply[16:], _IFLA_STATS64)
        rx_packets, tx_packets, rx_bytes, tx_bytes = struct.unpack_from("=4Q", counters)
        return Link(index, tx_bytes, rx_bytes, tx_packets, rx_packets)

    def add_bridge(self, name: str) -> None:
        """Create a bridge."""
        kind = _attribute(_IFLA_INFO_KIND, _text("bridge"))
        self._create_link(name, kind, b"")

    def add_veth(self, name: str, bridge: str, peer_name: str, peer_ns: int) -> None:
        """Create a veth pair: one end on the bridge here, one in another namespace.

        Args:
            name: the end here.
            bridge: the bridge here that it becomes a port of.
            peer_name: the other end.
            peer_ns: descriptor of the other end's network namespace.
        """
        peer = _ifinfo() + _attribute(_IFLA_IFNAME, _text(peer_name))
        peer += _attribute(_IFLA_NET_NS_FD, struct.pack("=I", peer_ns))
        kind = _attribute(_IFLA_INFO_KIND, _text("veth"))
        kind += _attribute(_IFLA_INFO_DATA, _attribute(_VETH_INFO_PEER, peer))
        bridge_index = struct.pack("=I", self.link(bridge).index)
        self._create_link(name, kind, _attribute(_IFLA_MASTER, bridge_index))

    def set_up(self, name: str, up: bool = True) -> None:
        """Bring an interface up or down."""
        request = _ifinfo(flags=_IFF_UP if up else 0, change=_IFF_UP)
        request += _attribute(_IFLA_IFNAME, _text(name))
        self._ask(_RTM_NEWLINK, _NLM_F_ACK, request, f"set {name} up or down")

    def add_address(self, name: str, address: str, prefix: int) -> None:
        """Give an interface an IPv4 address."""
        packed = socket.inet_aton(address)
        request = struct.pack(
            "=BBBBI", socket.AF_INET, prefix, 0, 0, self.link(name).index
        )
        request += _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
        flags = _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL
        self._ask(_RTM_NEWADDR, flags, request, f"give {name} {address}")

    def set_rate(self, name: str, rate: int, burst: int) -> None:
        """Shape what leaves an interface by a token bucket (tbf).

        Args:
            name: the interface.
            rate: bytes per second.
            burst: bytes that may leave at once.
        """
        # Sizes in time are in ticks of 64 ns; the kernel takes TCA_TBF_BURST instead
        # of `buffer` where it knows it, and RATE64 where the rate passes 32 bits.
        buffer = min(burst * 1_000_000_000 // rate >> 6, 0xFFFFFFFF)
        limit = min(int(rate * _TBF_QUEUE_SECONDS) + burst, 0xFFFFFFFF)
        layer, rate32 = _TC_LINKLAYER_ETHERNET, min(rate, 0xFFFFFFFF)
        rate_spec = struct.pack("=BBHhHI", 0, layer, 0, 0, 0, rate32)
        parameters = rate_spec + bytes(12) + struct.pack("=III", limit, buffer, 0)
        options = _attribute(_TCA_TBF_PARMS, parameters)
        options += _attribute(_TCA_TBF_BURST, struct.pack("=I", burst))
        if rate > 0xFFFFFFFF:
            options += _attribute(_TCA_TBF_RATE64, struct.pack("=Q", rate))
        request = self._qdisc(name) + _attribute(_TCA_KIND, _text("tbf"))
        request += _attribute(_TCA_OPTIONS, options)
        flags = _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_REPLACE
        self._ask(_RTM_NEWQDISC, flags, request, f"shape {name} (tbf)")

    def clear_rate(self, name: str) -> None:
        """Stop shaping an interface; nothing happens where it is not shaped."""
        try:
            request = self._qdisc(name)
            self._ask(_RTM_DELQDISC, _NLM_F_ACK, request, f"unshape {name}")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise

    def _qdisc(self, name: str) -> bytes:
        index = self.link(name).index
        return struct.pack("=BxxxiIII", socket.AF_UNSPEC, index, 0, _TC_H_ROOT, 0)

    def _create_link(self, name: str, kind: bytes, more: bytes) -> None:
        request = _ifinfo() + _attribute(_IFLA_IFNAME, _text(name))
        request += _attribute(_IFLA_LINKINFO, kind) + more
        flags = _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL
        self._ask(_RTM_NEWLINK, flags, request, f"create {name}")

    def _ask(self, kind: int, flags: int, request: bytes, purpose: str) -> bytes:
        """Send one request, return the body of the one reply."""
        self._sequence += 1
        header = struct.pack(
            "=IHHII", 16 + len(request), kind, flags | _NLM_F_REQUEST, self._sequence, 0
        )
        self._socket.send(header + request)
        reply = self._socket.recv(1 << 16)
        _, reply_kind, reply_flags, _, _ = struct.unpack_from("=IHHII", reply)
        if reply_kind != _NLMSG_ERROR:
            return reply[16:]
        code = -struct.unpack_from("=i", reply, 16)[0]
        if code:
            # The failed request's header follows the code, then the kernel's words.
            tlvs = reply[36:] if reply_flags & _NLM_F_CAPPED else b""
            words = b""
            if reply_flags & _NLM_F_ACK_TLVS:
                words = _find_attribute(tlvs, _NLMSGERR_ATTR_MSG)
            reason = words.rstrip(b"\0").decode() or os.strerror(code)
            raise OSError(code, f"{purpose}: {reason}")
        return b""


def _ifinfo(flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, flags, change)


def _text(value: str) -> bytes:
    return value.encode("ascii") + b"\0"


def _attribute(kind: int, payload: bytes) -> bytes:
    padding = bytes(-len(payload) % 4)
    return struct.pack("=HH", 4 + len(payload), kind) + payload + padding


def _find_attribute(attributes: bytes, wanted: int) -> bytes:
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind & 0x3FFF == wanted:
            return attributes[4:length]
        attributes = attributes[max(4, (length + 3) & ~3) :]
    return b""
