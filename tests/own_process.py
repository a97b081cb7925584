# SPDX-License-Identifier: Apache-2.0
"""What this process uses."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path


def kilobytes_in_use() -> int:
    """Resident memory without what is freed already.

    glibc keeps freed memory between blocks that live, in an arena per thread: how much
    depends on which thread freed what first. That is given back before the look.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def num_threads() -> int:
    """Threads that are not ending: one may be joined, yet listed for a moment."""
    exiting = 0x4  # PF_EXITING of the kernel
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it is gone meanwhile
            fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
            count += not int(fields[6]) & exiting
    return count
