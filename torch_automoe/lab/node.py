# SPDX-License-Identifier: Apache-2.0
"""The first process (pid 1) of an emulated node: starts programs, reaps what ends."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import time
import uuid
from contextlib import suppress
from typing import NamedTuple

from . import channel, namespaces
from .netlink import Netlink
from .spec import LabSpec, hostname


class _Child(NamedTuple):
    popen: subprocess.Popen
    report: socket.socket
    kill_group: bool


def set_up_node(spec: LabSpec, node: int, supervisor: socket.socket) -> None:
    """Become a node: name, mounts, loopback; hand our network to the supervisor."""
    namespaces.set_process_name(f"lab-{hostname(node)}")
    socket.sethostname(hostname(node))
    notes = namespaces.mount_node_files(spec.hosts_file(node), f"{uuid.uuid4()}\n")
    namespaces.disable_ipv6()
    netlink = Netlink()
    netlink.set_up("lo")
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    channel.send(supervisor, {"notes": notes}, [netlink.fileno(), namespace])
    netlink.close()
    os.close(namespace)


class NodeInit:
    """Serves the requests of the laboratory's owner until that closes its socket.

    Each request starts one program and carries four descriptors: a socket on which the
    program's start and end are reported, and its stdin, stdout and stderr.
    """

    def __init__(self, owner: socket.socket) -> None:
        self._owner = owner
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._wakeup, wakeup_end = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup_end.setblocking(False)
        # Kept as an attribute: the number alone would not keep the socket open.
        self._wakeup_end = wakeup_end
        signal.set_wakeup_fd(wakeup_end.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)

    def serve(self) -> None:
        """Run until the owner has gone; the node's processes end with us."""
        channel.send(self._owner, {}, [os.pidfd_open(os.getpid())])
        self._selector.register(self._owner, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._wakeup:
                    self._reap()
                    continue
                request = channel.receive(self._owner)
                if request is None:
                    return
                self._spawn(*request)

    def _spawn(self, request: dict, fds: list[int]) -> None:
        report = socket.socket(fileno=fds[0])
        try:
            popen = subprocess.Popen(
                request["argv"],
                env=request["env"],
                cwd=request["cwd"],
                stdin=fds[1],
                stdout=fds[2],
                stderr=fds[3],
                start_new_session=True,
            )
        except OSError as error:
            answer = {"errno": error.errno, "filename": error.filename}
            _report(report, answer)
            report.close()
        else:
            child = _Child(popen, report, request["kill_group"])
            self._children[popen.pid] = child
            pidfd = os.pidfd_open(popen.pid)
            _report(report, {"node_pid": popen.pid}, [pidfd])
            os.close(pidfd)
        finally:
            for fd in fds[1:]:
                os.close(fd)

    def _reap(self) -> None:
        """Report the children that ended; collect orphans too, as every pid 1 must."""
        with suppress(BlockingIOError):
            self._wakeup.recv(4096)
        with suppress(ChildProcessError):
            while info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                child = self._children.pop(info.si_pid, None)
                if child is not None and child.kill_group:
                    # Not yet reaped, so the number is still its own.
                    with suppress(ProcessLookupError):
                        os.killpg(info.si_pid, signal.SIGKILL)
                _, status = os.waitpid(info.si_pid, 0)
                if child is not None:
                    child.popen.returncode = os.waitstatus_to_exitcode(status)
                    ended = {
                        "returncode": child.popen.returncode,
                        "time": time.monotonic(),
                    }
                    _report(child.report, ended)
                    child.report.close()


def _report(report: socket.socket, message: dict, fds: tuple | list = ()) -> None:
    # The owner may have lost interest in this program and closed its end.
    with suppress(BrokenPipeError, ConnectionResetError):
        channel.send(report, message, fds)
