# SPDX-License-Identifier: Apache-2.0
"""The process that holds a laboratory: its namespaces live as long as it does.

    owner (the user's program)
      +- supervisor        leaves the host's namespaces, waits
           +- pid 1 of the laboratory: the bridge; ends when the owner closes its
              socket or dies, and then the kernel ends every process below
                +- pid 1 of node 0 ... ranks
                +- pid 1 of node 1 ... ranks

Namespaces without names, held by processes only, leave nothing behind.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from . import channel, namespaces
from .errors import explain_refusal
from .netlink import Netlink
from .network import Network
from .node import NodeInit, set_up_node
from .spec import LabSpec

_NODE_NAMESPACES = (
    namespaces.CLONE_NEWNET
    | namespaces.CLONE_NEWUTS
    | namespaces.CLONE_NEWIPC
    | namespaces.CLONE_NEWPID
    | namespaces.CLONE_NEWNS
)


@dataclass(frozen=True)
class _Inherited:
    """Descriptors that the owner handed over at the start."""

    control: socket.socket
    owner_pidfd: int
    nodes: list[int]
    unprivileged: bool


def main() -> None:
    """Entry of the supervisor process; its argument is JSON from lab.py."""
    config = json.loads(sys.argv[1])
    shape = config["spec"]
    spec = LabSpec(**{**shape, "ranks_per_node": tuple(shape["ranks_per_node"])})
    inherited = _Inherited(
        control=socket.socket(fileno=config["control"]),
        owner_pidfd=config["owner_pidfd"],
        nodes=config["nodes"],
        unprivileged=not namespaces.may_administer(),
    )
    _guarded(lambda: _enter_and_wait(spec, inherited), inherited.control, inherited)


def _enter_and_wait(spec: LabSpec, inherited: _Inherited) -> None:
    """Leave the host's namespaces, fork the laboratory's pid 1, wait for its end."""
    if inherited.unprivileged:
        namespaces.enter_user_namespace()
    flags = namespaces.CLONE_NEWNS | namespaces.CLONE_NEWNET | namespaces.CLONE_NEWPID
    namespaces.unshare(flags, "mount, network, pid")
    init = os.fork()
    if init == 0:
        _guarded(lambda: _run_init(spec, inherited), inherited.control, inherited)
    # Only pid 1 may hold the sockets: the owner must see them close when it dies.
    for fd in (inherited.control.fileno(), *inherited.nodes):
        os.close(fd)
    os.waitpid(init, 0)


def _run_init(spec: LabSpec, inherited: _Inherited) -> None:
    namespaces.set_parent_death_signal(signal.SIGKILL)
    namespaces.set_process_name("lab-init")
    namespaces.make_mounts_private()
    namespaces.disable_ipv6()
    network = Network(spec)
    notes: set[str] = set()
    for node in range(spec.num_nodes):
        supervisor_end = _start_node(spec, node, inherited)
        reply = channel.receive(supervisor_end)
        supervisor_end.close()
        if reply is None or "error" in reply[0]:
            failure = {"error": f"node {node} ended while it was set up"}
            channel.send(inherited.control, failure if reply is None else reply[0])
            return
        notes.update(reply[0]["notes"])
        netlink, namespace = reply[1]
        network.join(Netlink(netlink), namespace)
        os.close(namespace)
    for fd in inherited.nodes:
        os.close(fd)
    # From here on only orphans of a killed node end here: let the kernel reap them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    channel.send(inherited.control, {"notes": sorted(notes)})
    _serve(network, inherited)


def _serve(network: Network, inherited: _Inherited) -> None:
    """Answer the owner until it closes the control socket or ends."""
    poll = select.poll()
    poll.register(inherited.control, select.POLLIN)
    poll.register(inherited.owner_pidfd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if inherited.owner_pidfd in ready:
            return
        request = channel.receive(inherited.control)
        if request is None:
            return
        operation, arguments = request[0]["operation"], request[0]["arguments"]
        try:
            result = getattr(network, operation)(**arguments)
            answer = {"result": result}
        except OSError as error:
            answer = {"error": f"{operation}: {error.strerror or error}"}
        channel.send(inherited.control, answer)


def _start_node(spec: LabSpec, node: int, inherited: _Inherited) -> socket.socket:
    """Fork a node's pid 1; returns the socket on which it reports."""
    ours, theirs = socket.socketpair()
    holder = os.fork()
    if holder == 0:
        _guarded(lambda: _fork_node(spec, node, inherited, theirs), theirs, inherited)
    theirs.close()
    os.waitpid(holder, 0)
    return ours


def _fork_node(
    spec: LabSpec, node: int, inherited: _Inherited, supervisor: socket.socket
) -> None:
    namespaces.unshare(_NODE_NAMESPACES, "network, uts, ipc, pid, mount")
    if os.fork() == 0:
        _guarded(
            lambda: _run_node(spec, node, inherited, supervisor), supervisor, inherited
        )


def _run_node(
    spec: LabSpec, node: int, inherited: _Inherited, supervisor: socket.socket
) -> None:
    owner = inherited.nodes[node]
    _close_all_but(supervisor.fileno(), owner)
    set_up_node(spec, node, supervisor)
    supervisor.close()
    NodeInit(socket.socket(fileno=owner)).serve()


def _close_all_but(*kept: int) -> None:
    """Drop what a fork gave us beyond the standard streams and ``kept``."""
    low = 3
    for fd in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
        os.closerange(low, fd)
        low = fd + 1


def _guarded(
    body: Callable[[], None], failures: socket.socket, inherited: _Inherited
) -> NoReturn:
    """Run a process's body and end the process, reporting what went wrong."""
    try:
        body()
        os._exit(0)
    except OSError as error:
        step = str(error.filename or "laboratory")
        message = explain_refusal(step, error, inherited.unprivileged)
        # The owner may have gone; then nobody is left to read this.
        with suppress(OSError):
            channel.send(failures, {"error": message})
    except BaseException as error:  # a forked process must never return to its caller
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(1)
