# SPDX-License-Identifier: Apache-2.0
"""The laboratory: several emulated nodes on one Linux machine (docs/lab.md)."""

from .errors import LabError
from .job import Failure, Job, LineWriter, Member, forward_signals
from .lab import Lab, available
from .loopback import Loopback
from .process import Process
from .spec import LabSpec, parse_nodes, parse_rate, parse_size

__all__ = [
    "Failure",
    "Job",
    "Lab",
    "LabError",
    "LabSpec",
    "LineWriter",
    "Loopback",
    "Member",
    "Process",
    "available",
    "forward_signals",
    "parse_nodes",
    "parse_rate",
    "parse_size",
]
