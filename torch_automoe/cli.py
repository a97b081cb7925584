# SPDX-License-Identifier: Apache-2.0
"""The command ``automoe``: one subcommand per module, imported only when it is run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# Subcommand -> (module with add_arguments(parser) and run(args) -> int, one line).
_COMMANDS = {
    "train": (
        "torch_automoe.train.cli",
        "train a small mixture-of-experts language model over the backend",
    ),
    "lab": (
        "torch_automoe.lab.cli",
        "run a script on several emulated nodes of this machine",
    ),
    "info": (
        "torch_automoe.info",
        "show versions, UCX, node, interface, transports and build flags",
    ),
    "trace": (
        "torch_automoe.flight_recorder",
        "show what each rank posted last, from the dumps of flight recorders",
    ),
}


def _overview() -> str:
    lines = [f"  {name:<8}{text}" for name, (_, text) in _COMMANDS.items()]
    return "\n".join(["commands:", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit code.

    Args:
        argv: arguments after the program's name; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    top = argparse.ArgumentParser(
        prog="automoe",
        description="Expert parallelism with the c10d backend automoe.",
        epilog=f"{_overview()}\n\n'automoe COMMAND --help' tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=sorted(_COMMANDS), metavar="COMMAND")
    # Everything after the command belongs to its module, which need not be imported
    # to know that, and may hold options of another program.
    command = top.parse_args(arguments[:1]).command
    name, description = _COMMANDS[command]
    module = import_module(name)
    parser = argparse.ArgumentParser(prog=f"automoe {command}", description=description)
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
