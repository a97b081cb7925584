# SPDX-License-Identifier: Apache-2.0
"""Messages with file descriptors over a unix stream socket."""

from __future__ import annotations

import array
import json
import socket
import struct
from collections.abc import Sequence

_HEADER = struct.Struct("=I")
_MAX_FDS = 8


def send(
    channel: socket.socket, message: dict[str, object], fds: Sequence[int] = ()
) -> None:
    """Send one message; the receiver gets duplicates of the descriptors."""
    body = json.dumps(message).encode()
    packed = array.array("i", fds)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)] if fds else []
    channel.sendmsg([_HEADER.pack(len(body))], rights)
    channel.sendall(body)


def receive(channel: socket.socket) -> tuple[dict, list[int]] | None:
    """Receive one message and its descriptors; None when the peer has gone."""
    room = socket.CMSG_SPACE(_MAX_FDS * 4)
    try:
        header, ancillary, _, _ = channel.recvmsg(
            _HEADER.size, room, socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC
        )
        fds = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if len(header) < _HEADER.size:
            return None
        body = _receive_exactly(channel, _HEADER.unpack(header)[0])
    except ConnectionResetError:
        return None
    return None if body is None else (json.loads(body), list(fds))


def _receive_exactly(channel: socket.socket, size: int) -> bytes | None:
    body = bytearray()
    while len(body) < size:
        part = channel.recv(min(size - len(body), 1 << 20))
        if not part:
            return None
        body += part
    return bytes(body)
