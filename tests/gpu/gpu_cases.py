# SPDX-License-Identifier: Apache-2.0
"""What the tests on GPUs exchange, drawn from a seed, and how they compare bits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Whether CUDA's library is that of the tests: see tools/test_without_gpu.sh.
WITHOUT_GPU = "AUTOMOE_TEST_GPUS" in os.environ
if WITHOUT_GPU:
    import cuda_on_cpu

    _INSTEAD_OF_TORCHS = cuda_on_cpu.install()

# For one test. Without a GPU, ranks and what stands for GPUs share few cores.
SECONDS = 300 if WITHOUT_GPU else 60

KIND = "cuda"  # a test without a GPU puts another kind of device here
FLOATS = ("float64", "float32", "bfloat16", "float16")
OTHERS = ("bool", "uint8", "int16", "int64", "float8_e4m3fn", "complex64")


@dataclass(frozen=True)
class Case:
    """One layer of experts on all ranks.

    Attributes:
        tokens: T of each rank; rank r has ``tokens[r % len(tokens)]``.
        holes: some picks are -1.
    """

    tokens: tuple[int, ...] = (23, 17)
    topk: int = 2
    num_experts: int = 6
    hidden: int = 64
    dtype: str = "bfloat16"
    align: int = 1
    holes: bool = False
    seed: int = 1

    def tokens_of(self, rank: int) -> int:
        return self.tokens[rank % len(self.tokens)]


CASES = [
    *(Case(dtype=dtype) for dtype in FLOATS),
    # Rows of any length and address; those of 16 bytes and more go in vectors.
    *(Case(hidden=hidden, dtype="bfloat16") for hidden in (1, 3, 7, 33, 129, 1000)),
    Case(hidden=5, dtype="float64", align=4),
    Case(hidden=7, dtype="float16", holes=True),
    Case(tokens=(0, 9)),
    Case(tokens=(9, 0), dtype="float32", align=8),
    Case(tokens=(0,)),
    Case(topk=1),
    Case(topk=6, holes=True),
    Case(topk=6, dtype="float32"),
    Case(num_experts=3, topk=3),
    Case(num_experts=1, topk=1),
    Case(tokens=(1,), num_experts=64, topk=8, align=16),
    # More than one block, and more than 2048 picks.
    Case(tokens=(700, 513), topk=8, num_experts=64, hidden=1024, align=16),
    Case(tokens=(257,), topk=4, num_experts=16, hidden=7168),
]


def describe(case: Case) -> str:
    """A name for the table of tests."""
    text = f"{case.dtype}-T{'+'.join(map(str, case.tokens))}-K{case.topk}"
    text += f"-E{case.num_experts}-H{case.hidden}-align{case.align}"
    return text + ("-holes" if case.holes else "")


@dataclass
class Inputs:
    """Of one rank, on the CPU."""

    ids: Tensor
    x: Tensor
    weights: Tensor
    grad_out: Tensor


def draw(case: Case, rank: int) -> Inputs:
    """Draw the inputs of a rank."""
    generator = torch.Generator().manual_seed(case.seed * 64 + rank)
    tokens, dtype = case.tokens_of(rank), getattr(torch, case.dtype)

    def normal(columns: int) -> Tensor:
        return torch.randn((tokens, columns), dtype=torch.float64, generator=generator)

    noise = torch.rand((tokens, case.num_experts), generator=generator)
    ids = noise.argsort(dim=1)[:, : case.topk].to(torch.int64)
    if case.holes:
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(
        ids,
        normal(case.hidden).to(dtype),
        normal(case.topk).to(wide),
        normal(case.hidden).to(dtype),
    )


def own_device() -> torch.device:
    """The GPU of this rank, made current; ranks share a card where there are few."""
    index = dist.get_rank() % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def devices() -> tuple[torch.device, torch.device]:
    """The CPU, then the GPU of this rank."""
    return torch.device("cpu"), own_device()


def on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Copies on a device; leaves that need a gradient where these do."""
    return [
        tensor.detach().clone().to(device).requires_grad_(tensor.requires_grad)
        for tensor in tensors
    ]


def assert_same(found: object, expected: object, where: str = "result") -> None:
    """The first on a GPU, the second on the CPU: the same types, shapes and bits."""
    if isinstance(expected, Tensor):
        assert found.device.type == KIND and expected.device.type == "cpu", where
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        mine = found.detach().cpu().contiguous().view(-1).view(torch.uint8)
        theirs = expected.detach().contiguous().view(-1).view(torch.uint8)
        different = int((mine != theirs).sum())
        assert different == 0, f"{where}: {different} of {mine.numel()} bytes differ"
        return
    assert isinstance(expected, Sequence) and len(found) == len(expected), where
    for index, pair in enumerate(zip(found, expected, strict=True)):
        assert_same(*pair, where=f"{where}[{index}]")
