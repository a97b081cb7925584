# SPDX-License-Identifier: Apache-2.0
"""``python -m torch_automoe.lab``: the same as ``automoe lab``."""

import sys

from .cli import main

sys.exit(main())
