# SPDX-License-Identifier: Apache-2.0
"""What ranks put into collectives, and what reductions make of it, computed here.

Numbers and bytes are drawn from the rank's number, so every rank knows everybody's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist
from exchange_cases import block_bytes

Tensors = list[torch.Tensor]

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
GLOO_INTEGERS = [torch.int8, torch.uint8, torch.int32, torch.int64]
OTHER_INTEGERS = [torch.int16, torch.uint16, torch.uint32, torch.uint64]
INTEGERS = [*GLOO_INTEGERS, *OTHER_INTEGERS]
COMPLEX = [torch.complex64, torch.complex128, torch.complex32]
FLOAT8 = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
_NUMBERS = [*FLOATS, *INTEGERS]
DTYPES = [*_NUMBERS, *COMPLEX, torch.bool, *FLOAT8]
OPS = {  # op -> what is reduced with it
    "SUM": [*_NUMBERS, *COMPLEX, torch.bool],
    "AVG": [*_NUMBERS, *COMPLEX],
    **dict.fromkeys(["PRODUCT", "MIN", "MAX"], [*_NUMBERS, torch.bool]),
    **dict.fromkeys(["BAND", "BOR", "BXOR"], [*INTEGERS, torch.bool]),
    "PREMUL_SUM": FLOATS,
}
FACTOR = 2.5  # of PREMUL_SUM
LARGE = 20_001  # elements; more than rides with a record
HUGE = -1  # stands for a little more than 1 MB
SMALL_SIZES = [0, 1, 7]


@dataclass(frozen=True)
class Case:
    """What one collective is called with.

    Attributes:
        op: of a reduction; None: bytes are moved.
        size: elements of the tensors, or of the smallest where several have sizes.
        strided: which tensors are not contiguous: "", "inputs", "outputs" or "both".
    """

    dtype: torch.dtype
    op: str | None
    size: int
    strided: str = ""

    @property
    def elements(self) -> int:
        """The size as a number."""
        return (1 << 20) // self.dtype.itemsize + 5 if self.size == HUGE else self.size

    @property
    def reduce_op(self) -> dist.ReduceOp:
        """The operation for torch."""
        return make_op(self.op)

    def values(self, rank: int, salt: int = 0, size: int | None = None) -> torch.Tensor:
        """What a rank puts in: any bytes to move, or numbers that reduce exactly."""
        size = self.elements if size is None else size
        return self.as_input(self._values(rank, salt, size))

    def _values(self, rank: int, salt: int, size: int) -> torch.Tensor:
        if self.op is None:
            noise = block_bytes(size, rank, salt, size * self.dtype.itemsize)
            if self.dtype is torch.bool:
                noise = noise & 1
            return noise.clone().view(self.dtype)
        if self.dtype.is_complex:
            part = Case(self.dtype.to_real(), self.op, self.size)
            return _complex(part._values(rank, salt, 2 * size))
        # Of five numbers in a row every rank has another one: products of four of
        # them fit int8, and have few enough bits for bfloat16.
        numbers = (torch.arange(size) + 3 * rank + salt) % 5
        if self.dtype is torch.bool:
            return numbers > 1
        if self.op == "AVG" and self.dtype.is_floating_point:
            return (12 * numbers).to(self.dtype)  # a multiple of each group's size
        if self.op == "AVG" and self.dtype.is_signed:
            return (7 * numbers - 10).to(self.dtype)
        return (numbers + 1).to(self.dtype)

    def blank(self, size: int | None = None) -> torch.Tensor:
        """Memory for a result, with a pattern that none of them has."""
        size = self.elements if size is None else size
        fill = 1 if self.dtype is torch.bool else 0xA5
        raw = torch.full((size * self.dtype.itemsize,), fill, dtype=torch.uint8)
        blank = raw.view(self.dtype)
        return _strided(blank) if self.strided in ("outputs", "both") else blank

    def as_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the layout of inputs."""
        return _strided(tensor) if self.strided in ("inputs", "both") else tensor


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, with others between them."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def make_op(name: str) -> dist.ReduceOp:
    """An operation by its name; PREMUL_SUM with FACTOR."""
    if name == "PREMUL_SUM":
        return dist._make_nccl_premul_sum(FACTOR)
    return getattr(dist.ReduceOp, name)


def _complex(parts: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(parts.view(-1, 2))


def join(tensors: Tensors) -> torch.Tensor:
    """One tensor of all elements, in any dtype."""
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat(parts).view(tensors[0].dtype)


# ---- reductions, computed here ----


def combine(op: str, tensors: Tensors) -> torch.Tensor:
    """What the op makes of all ranks' tensors, from left to right."""
    dtype = tensors[0].dtype
    if op == "PREMUL_SUM":
        return combine("SUM", [tensor * FACTOR for tensor in tensors])
    if dtype.is_complex:
        parts = [torch.view_as_real(tensor).reshape(-1) for tensor in tensors]
        return _complex(combine(op, parts))
    if dtype is torch.bool:
        return _combine_bools(op, torch.stack(tensors).int().sum(0), len(tensors))
    if not dtype.is_floating_point:
        return _combine_integers(op, [tensor.numpy() for tensor in tensors])
    functions = {
        "PRODUCT": torch.mul,
        "MIN": torch.minimum,
        "MAX": torch.maximum,
    }
    wide = [it.float() if dtype.itemsize == 2 else it for it in tensors]
    total = functools.reduce(functions.get(op, torch.add), wide)
    return (total / len(tensors) if op == "AVG" else total).to(dtype)


def _combine_bools(op: str, count: torch.Tensor, ranks: int) -> torch.Tensor:
    if op == "BXOR":
        return count % 2 == 1
    return count == ranks if op in ("PRODUCT", "MIN", "BAND") else count > 0


def _combine_integers(op: str, arrays: list[numpy.ndarray]) -> torch.Tensor:
    functions = {
        "PRODUCT": numpy.multiply,
        "MIN": numpy.minimum,
        "MAX": numpy.maximum,
        "BAND": numpy.bitwise_and,
        "BOR": numpy.bitwise_or,
        "BXOR": numpy.bitwise_xor,
    }
    total = functools.reduce(functions.get(op, numpy.add), arrays)
    if op == "AVG":  # toward zero
        ranks = numpy.array(len(arrays), total.dtype)
        total = (total - numpy.fmod(total, ranks)) // ranks
    return torch.from_numpy(total).clone(memory_format=torch.contiguous_format)
