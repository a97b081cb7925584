# SPDX-License-Identifier: Apache-2.0
"""How much memory this process uses."""

from __future__ import annotations

import ctypes
import gc
import os
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
