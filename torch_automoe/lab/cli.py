# SPDX-License-Identifier: Apache-2.0
"""Command line of ``automoe lab``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import LabError
from .job import forward_signals
from .lab import Lab
from .spec import PLACEMENTS, parse_nodes

DESCRIPTION = """\
Run a distributed program on emulated nodes of this machine. Each node has its own
network, host name, process ids, /dev/shm and /etc/hosts; links between nodes can be
given a rate. Works as root, and without root where user namespaces are allowed.
"""

EPILOG = """\
examples:
  automoe lab --nodes 4 --ranks-per-node 2 --rate 1gbit -- train.py --steps 100
  automoe lab --nodes 3,3,2 -m -- my_package.main --steps 100
  automoe lab --nodes 2 --no-python -- ./my_program
  automoe lab --nodes 2 --torchrun -- train.py

Every rank gets the variables that torchrun sets (RANK, LOCAL_RANK, WORLD_SIZE,
LOCAL_WORLD_SIZE, NODE_RANK, GROUP_RANK, MASTER_ADDR, MASTER_PORT, ...). The exit code
is that of the rank that failed first, 128 + n when signal n ended it. The nodes reach
each other only: nothing outside. More: docs/lab.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``automoe lab``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--nodes",
        default="2",
        metavar="N|A,B,..",
        help="number of nodes, or the ranks of each node, as in 3,3,2 (default: 2)",
    )
    add(
        "--ranks-per-node",
        type=int,
        metavar="K",
        help="ranks of every node when --nodes is a number (default: 2)",
    )
    add(
        "--rate",
        metavar="RATE",
        help="rate of each node's link in each direction, in tc's units: 1gbit, "
        "100mbit (default: unshaped)",
    )
    add(
        "--burst",
        metavar="SIZE",
        help="bytes that may leave a link at once (default: 128kb, or what 1 ms "
        "carries where that is more)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="OMP_NUM_THREADS of each rank (default: as set, else 1)",
    )
    add(
        "--placement",
        choices=PLACEMENTS,
        default="block",
        help="ranks fill node after node, or are dealt out in turn (default: block)",
    )
    add(
        "-m",
        "--module",
        action="store_true",
        help="the command is a Python module, not a script",
    )
    add(
        "--no-python",
        "--exec",
        action="store_true",
        help="the command is a program, not a Python script",
    )
    add(
        "--torchrun",
        action="store_true",
        help="start one torchrun per node instead of the ranks themselves: slower to "
        "start, for what needs torchrun's own agent",
    )
    add(
        "--grace",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds between SIGTERM and SIGKILL for ranks to stop (default: 10)",
    )
    add(
        "--linger",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds that the other ranks may go on after one failed (default: 1)",
    )
    add("--no-prefix", action="store_true", help="do not mark lines with their rank")
    add(
        "--counters",
        action="store_true",
        help="at the end, show the bytes that each node sent and received",
    )
    add(
        "command",
        nargs=argparse.REMAINDER,
        metavar="-- script.py args",
        help="a Python script, a module with -m, a program with --no-python",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``automoe lab``; returns the exit code of the job, 2 for wrong usage."""
    try:
        lab = _make_lab(args)
        argv = _program(args)
    except ValueError as error:
        print(f"automoe lab: {error}", file=sys.stderr)
        return 2
    try:
        with _interruptible(), lab:
            return _run_job(lab, argv, args)
    except BrokenPipeError:
        return _end_of_pipe()
    except OSError as error:
        what = error.filename or argv[0]
        print(f"automoe lab: cannot run {what}: {error.strerror}", file=sys.stderr)
        return 1
    except LabError as error:
        print(f"automoe lab: {error}", file=sys.stderr)
        return 1
    except _Interrupted as interrupted:
        return 128 + interrupted.signum


def main(argv: list[str] | None = None) -> int:
    """Entry of ``python -m torch_automoe.lab``."""
    parser = argparse.ArgumentParser(prog="automoe lab")
    add_arguments(parser)
    return run(parser.parse_args(argv))


class _Interrupted(BaseException):
    """A signal came while no job ran."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _make_lab(args: argparse.Namespace) -> Lab:
    return Lab(
        parse_nodes(args.nodes, args.ranks_per_node),
        rate=args.rate,
        burst=args.burst,
        threads=args.threads,
        placement=args.placement,
    )


def _program(args: argparse.Namespace) -> list[str]:
    """The command line of a rank, or what follows torchrun's options."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.module:
        if args.no_python:
            raise ValueError("module: -m and --no-python exclude each other")
        command = ["-m", *command]
    if not command or command == ["-m"]:
        raise ValueError(
            "command: got nothing to run, expected `-- script.py args`, "
            "`-m -- module args` or `--no-python -- program args`"
        )
    if args.torchrun:
        return ["--no-python", *command] if args.no_python else command
    return command if args.no_python else [sys.executable, "-u", *command]


def _run_job(lab: Lab, argv: list[str], args: argparse.Namespace) -> int:
    nodes = zip(lab.hostnames, lab.addresses, lab.node_pids, strict=True)
    places = ", ".join(f"{name} {place} (pid {pid})" for name, place, pid in nodes)
    for text in (lab.spec.describe(), places, *lab.notes):
        print(f"automoe lab: {text}", file=sys.stderr, flush=True)
    job = lab.launch(
        argv,
        torchrun=args.torchrun,
        prefix=not args.no_prefix,
        grace=args.grace,
        linger=args.linger,
    )
    with job, forward_signals(job):
        code = job.wait()
    if args.counters:
        _print_counters(lab)
    return code


def _print_counters(lab: Lab) -> None:
    print(f"{'node':>8} {'sent (B)':>16} {'received (B)':>16}")
    for name, counters in zip(lab.hostnames, lab.counters(), strict=True):
        sent, received = counters["tx_bytes"], counters["rx_bytes"]
        print(f"{name:>8} {sent:>16} {received:>16}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Leave by _Interrupted on SIGINT, SIGTERM and SIGHUP, so that all is closed."""

    def interrupt(signum: int, frame: object) -> None:
        raise _Interrupted(signum)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {signum: signal.signal(signum, interrupt) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _end_of_pipe() -> int:
    """Whoever read our output has gone: end as a program without handlers would."""
    # Python flushes stdout at exit; give it somewhere harmless to go.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
