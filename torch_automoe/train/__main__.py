# SPDX-License-Identifier: Apache-2.0
"""``python -m torch_automoe.train``, or the same under ``torchrun``."""

import argparse
import sys

from torch_automoe.train.cli import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m torch_automoe.train", description=__doc__
    )
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
