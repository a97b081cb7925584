# SPDX-License-Identifier: Apache-2.0
"""Forks ranks that have torch already: one import (seconds) serves a whole test run.

What most tests import on their ranks is there too, and whether nodes can be emulated is
known: else every new rank takes seconds for that in its first call.

Run as a program by rank_link.py, which sends one request per rank. Each rank is a
grandchild: a child joins the namespaces of the rank's node, the grandchild, which only
then is inside the node's pid namespace, becomes the rank. All of them die with their
parent, so none outlives pytest, however that ends.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import pickle
import signal
import socket
import sys
import traceback
from datetime import timedelta

import lab_processes  # noqa: F401
import torch
import torch.distributed as dist
from rank_link import receive_frame, send_frame

from torch_automoe.lab import channel, namespaces

if torch.version.cuda is None:
    # Else an import may ask the GPU, whose answers do not survive a fork.
    import torch.distributed.fsdp
    import torch.distributed.tensor

_NAMESPACES = ("mnt", "uts", "ipc", "net", "pid")


def serve(control: socket.socket) -> None:
    """Fork a rank per request until pytest closes the socket."""
    # Nobody asks how the children ended: they report that themselves.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while (request := channel.receive(control)) is not None:
        message, fds = request
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            code = 1
            try:
                code = _run_in_node(message, *fds)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        for fd in fds:
            os.close(fd)


def _run_in_node(message: dict, connection_fd: int, report_fd: int, log: int) -> int:
    """Join the node, fork the rank, report its pid and its end."""
    report = socket.socket(fileno=report_fd)
    for standard in (1, 2):
        os.dup2(log, standard)
    if message["node_pid"] is not None:
        _join_namespaces(message["node_pid"])
    # After joining: a change of credentials would clear it.
    namespaces.set_parent_death_signal(signal.SIGKILL)
    rank = os.fork()
    if rank == 0:
        namespaces.set_parent_death_signal(signal.SIGKILL)
        report.close()
        _be_rank(message, socket.socket(fileno=connection_fd))
    os.close(connection_fd)
    pidfd = os.pidfd_open(rank)
    channel.send(report, {}, [pidfd])
    os.close(pidfd)
    _, status = os.waitpid(rank, 0)
    channel.send(report, {"returncode": os.waitstatus_to_exitcode(status)})
    return 0


def _join_namespaces(pid: int) -> None:
    kinds = list(_NAMESPACES)
    own, theirs = os.stat("/proc/self/ns/user"), os.stat(f"/proc/{pid}/ns/user")
    if own.st_ino != theirs.st_ino:
        kinds.insert(0, "user")
    fds = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in kinds]
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, fd in zip(kinds, fds, strict=True):
        if libc.setns(fd, 0) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"setns({kind}): {os.strerror(code)}")
        os.close(fd)


def _be_rank(message: dict, connection: socket.socket) -> None:
    """Run calls until told to leave; never returns."""
    code = 1
    try:
        _prepare(message)
        _answer_calls(message, connection)
        code = 0
    except EOFError:
        pass  # the pool has gone
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: this is a fork in the middle of the server's stack.
        os._exit(code)


def _prepare(message: dict) -> None:
    os.chdir(message["cwd"])
    os.environ.clear()
    os.environ.update(message["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sys.path[:] = message["path"]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _answer_calls(message: dict, connection: socket.socket) -> None:
    def attempt(call) -> bool:
        try:
            outcome = ("value", call())
        except Exception as error:
            outcome = ("error", _describe(error))
        try:
            send_frame(connection, outcome)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            outcome = ("error", _describe(error))
            send_frame(connection, outcome)
        return outcome[0] == "value"

    def start() -> None:
        timeout = timedelta(seconds=message["timeout"])
        dist.init_process_group(message["backend"], timeout=timeout)

    def leave() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    if message["backend"] and not attempt(start):
        return
    while (request := receive_frame(connection)) is not None:
        attempt(lambda request=request: _call(*request))
    attempt(leave)


def _call(module: str, name: str, args: tuple, kwargs: dict) -> object:
    target = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target(*args, **kwargs)


def _describe(error: Exception) -> tuple[str, str, str]:
    return type(error).__name__, str(error), traceback.format_exc()


if __name__ == "__main__":
    namespaces.set_parent_death_signal(signal.SIGKILL)
    with socket.socket(fileno=int(sys.argv[1])) as owner:
        channel.send(owner, {"torch": torch.__version__})
        serve(owner)
