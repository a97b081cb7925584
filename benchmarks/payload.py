# SPDX-License-Identifier: Apache-2.0
"""Test values that say where they come from, and the count of wrong ones.

Every 8 bytes are a mix of (source rank, destination rank, index in the block), so a
block that was swapped, shifted, cut or mixed up with another shows, in any dtype: only
bits are made and compared. All values change from one checked call to the next, and the
output is filled with wrong values before it, so old results do not pass.
"""

from __future__ import annotations

import torch
from routing import Cell

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER = 0xBF58476D1CE4E5B9
_EVERY_BYTE = 0x0101010101010101


def _int64(value: int) -> int:
    """Wrap to the range of int64, which torch wants for its scalars."""
    return (value + 2**63) % 2**64 - 2**63


def _mix(value: int) -> int:
    value = (value ^ (value >> 31)) * _MULTIPLIER % 2**64
    return value ^ (value >> 29)


def block_bytes(source: int, dest: int, num_bytes: int) -> torch.Tensor:
    """Values that ``source`` sends to ``dest``: uint8 (num_bytes,)."""
    start = _mix((source * 1_000_003 + dest + 1) * _GOLDEN % 2**64)
    words = torch.arange(-(-num_bytes // 8), dtype=torch.int64)
    words.mul_(_int64(_GOLDEN)).add_(_int64(start))
    words.bitwise_xor_(words >> 31).mul_(_int64(_MULTIPLIER))
    words.bitwise_xor_(words >> 29)
    return words.view(torch.uint8)[:num_bytes]


class Payload:
    """Input, output and expected output of one rank for one cell.

    ``input`` and ``output`` are 1-D for an even cell, else (rows, row_elements), with
    ``input_splits`` and ``output_splits`` in rows (None for an even cell).
    """

    def __init__(self, cell: Cell, rank: int) -> None:
        sends, receives = cell.rows[rank].tolist(), cell.rows[:, rank].tolist()
        self.input_splits = None if cell.even else sends
        self.output_splits = None if cell.even else receives
        self._itemsize = cell.dtype.itemsize
        self._mask = 0
        self._is_bool = cell.dtype == torch.bool
        self._input = self._words(
            [(rank, dest, rows * cell.row_bytes) for dest, rows in enumerate(sends)]
        )
        self._expected = self._words(
            [(source, rank, n * cell.row_bytes) for source, n in enumerate(receives)]
        )
        self._output = torch.zeros_like(self._expected)
        self._output_bytes = sum(receives) * cell.row_bytes
        self.input = self._view(self._input, cell, sum(sends))
        self.output = self._view(self._output, cell, sum(receives))

    def _words(self, blocks: list[tuple[int, int, int]]) -> torch.Tensor:
        """Concatenate the blocks (source, dest, bytes), padded to whole int64."""
        total = sum(num_bytes for _, _, num_bytes in blocks)
        words = torch.zeros(-(-total // 8), dtype=torch.int64)
        start = 0
        for source, dest, num_bytes in blocks:
            part = words.view(torch.uint8)[start : start + num_bytes]
            part.copy_(block_bytes(source, dest, num_bytes))
            start += num_bytes
        return words.bitwise_and_(_EVERY_BYTE) if self._is_bool else words

    @staticmethod
    def _view(words: torch.Tensor, cell: Cell, rows: int) -> torch.Tensor:
        values = words.view(torch.uint8)[: rows * cell.row_bytes].view(cell.dtype)
        return values if cell.even else values.view(rows, cell.row_elements)

    def renew(self, call: int) -> None:
        """Take the values of checked call number ``call``; spoil the output."""
        # The same change of every byte: blocks of odd sizes start anywhere in a word.
        byte = call & 1 if self._is_bool else call % 255 + 1
        mask = byte * _EVERY_BYTE
        change = _int64(mask ^ self._mask)
        self._mask = mask
        self._input.bitwise_xor_(change)
        self._expected.bitwise_xor_(change)
        torch.bitwise_not(self._expected, out=self._output)
        # The padding is never sent; make it equal, so that whole words compare.
        self._output.view(torch.uint8)[self._output_bytes :] = self._expected.view(
            torch.uint8
        )[self._output_bytes :]

    def count_wrong(self) -> int:
        """Number of elements of the output that are not what was sent."""
        if torch.equal(self._output, self._expected):
            return 0
        got = self._output.view(torch.uint8)[: self._output_bytes]
        expected = self._expected.view(torch.uint8)[: self._output_bytes]
        differs = (got != expected).view(-1, self._itemsize)
        return int(differs.any(dim=1).sum())
