# SPDX-License-Identifier: Apache-2.0
"""Command line of ``automoe train``, for the launcher and for each rank."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

from torch_automoe.train.config import (
    UsageError,
    add_config_arguments,
    config_from_args,
)

DESCRIPTION = """\
Train a byte-level mixture-of-experts language model with plain PyTorch: FSDP2 for
the dense part, dispatch and combine of this library for the experts. Starts its
own ranks on emulated nodes; started by torchrun, it is one of the ranks.
"""

EPILOG = """\
examples:
  automoe train
  automoe train --nodes 2 --ranks-per-node 2 --rate 1gbit --steps 100
  automoe train --nodes 3,3,2 --data my_text/ --run-dir runs/mine
  automoe train --resume --run-dir runs/mine --steps 480
  torchrun --nproc-per-node 4 -m torch_automoe.train --backend gloo

More: docs/train.md
"""

_LAUNCH_OPTIONS = ("nodes", "ranks_per_node", "rate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``automoe train``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    ranks = parser.add_argument_group("ranks (not under torchrun)")
    ranks.add_argument(
        "--nodes",
        metavar="N|A,B,..",
        help="emulated nodes, or the ranks of each (default: 2 where network "
        "namespaces can be made, else 1)",
    )
    ranks.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="K",
        help="ranks of every node (default: 2; 4 on one node)",
    )
    ranks.add_argument(
        "--rate",
        metavar="RATE",
        help="rate of each node's link, as in 1gbit (default: unshaped)",
    )
    add_config_arguments(parser.add_argument_group("run"))


def run(args: argparse.Namespace) -> int:
    """Run as launcher or as one rank; returns 0, or 2 for wrong usage."""
    rank = os.environ.get("RANK")
    try:
        _require_numpy()
        if rank is not None and "WORLD_SIZE" in os.environ:
            _refuse_launch_options(args)
            # Imports torch, which the launcher and --help do without.
            from torch_automoe.train.loop import train

            train(config_from_args(args))
            return 0
        from torch_automoe.train.launch import launch

        return launch(
            config_from_args(args), args.nodes, args.ranks_per_node, args.rate
        )
    except UsageError as error:
        if rank in (None, "0"):
            print(f"automoe train: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130


def _require_numpy() -> None:
    if importlib.util.find_spec("numpy") is None:
        raise UsageError(
            "numpy is not installed, and torch's distributed checkpoints need it; "
            "run: pip install numpy"
        )


def _refuse_launch_options(args: argparse.Namespace) -> None:
    for name in _LAUNCH_OPTIONS:
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} is {getattr(args, name)}, but the ranks are already started "
                "(RANK is set); leave it out and give their number to torchrun"
            )
