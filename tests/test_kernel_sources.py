# SPDX-License-Identifier: Apache-2.0
"""Every kernel is launched in the one way that lets it be loaded beforehand."""

from __future__ import annotations

import re
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "csrc" / "kernels"


def test_every_kernel_is_known_to_load_kernels():
    kernel = re.compile(r"__global__[^;{]*?(\w+)\(const __grid_constant__")
    kernels = set()
    for path in sorted(KERNELS.glob("*.cu")):
        text = path.read_text()
        for name in kernel.findall(text):
            kernels.add(name)
            assert re.search(rf"\bKernel<\s*{name}\b", text), f"{path.name}: {name}"
    assert {"gatherRows", "reduceRows", "sortSpots", "scanValues"} <= kernels


def test_no_kernel_is_launched_in_another_way():
    for path in sorted(KERNELS.iterdir()):
        launches = re.findall(r"<<<|\bcudaLaunch\w+|\bcuLaunch\w+", path.read_text())
        expected = ["cudaLaunchKernel"] if path.name == "cuda_language.cuh" else []
        assert launches == expected, path.name
