# SPDX-License-Identifier: Apache-2.0
"""The kernels of one rank, at sizes of all kinds, as the CPU: for compute-sanitizer.

Not those of 8-bit floats, which run between nodes alone, nor those that compare rows,
which nothing runs yet. A program of one process: python tests/gpu/kernels_program.py
"""

from __future__ import annotations

import sys

import gpu_operators as programs
import torch
import torch.distributed as dist
from gpu_cases import FLOATS, Case

# Small: a checker makes a kernel some hundred times slower.
CASES = [
    *(Case(tokens=(9,), dtype=dtype, hidden=33, align=4) for dtype in FLOATS),
    Case(tokens=(40,), topk=6, hidden=1024, holes=True),
    Case(tokens=(600,), topk=4, num_experts=48, hidden=8),  # more than 2048 picks
    Case(tokens=(3,), topk=1, hidden=1),
    Case(tokens=(0,)),
]


def main() -> int:
    """Run all cases; an exception ends it, with exit status 1."""
    if not torch.cuda.is_available():
        print("there is no CUDA device: torch.cuda.is_available() is False")
        return 2
    dist.init_process_group("automoe", store=dist.HashStore(), rank=0, world_size=1)
    for case in CASES:
        programs.compare_local(case)
        programs.compare_exchange(case)
    for dtype, hidden in (("uint8", 3), ("int64", 32)):
        programs.compare_type(dtype, hidden)
    programs.compare_capacity()
    programs.compare_parts()
    dist.destroy_process_group()
    print(f"{len(CASES)} cases: GPU and CPU agree bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
