# SPDX-License-Identifier: Apache-2.0
"""Text as bytes: what is read, what is held out, and the batches of a step."""

from __future__ import annotations

import os
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_automoe.train.config import UsageError

# One file in twenty is held out; of a single file, the last twentieth.
HELD_OUT_EVERY = 20
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
)


@dataclass(frozen=True)
class Text:
    """A training part and a held-out part, each a uint8 vector.

    ``crc32`` is a checksum of both, to find ranks or runs that read other text.
    """

    source: str
    train: torch.Tensor
    held_out: torch.Tensor
    crc32: int


def load_text(data: str, min_bytes: int) -> Text:
    """Read a file, a folder, or (``data`` empty) Python's standard library.

    Of a folder, all text files are read in the order of their paths; of the
    standard library, its ``.py`` files without tests and installed packages.

    Args:
        data: path of a file or folder, or "".
        min_bytes: bytes that each part must at least have.

    Raises:
        UsageError: ``data`` does not exist, or its text is too short.
    """
    if not data:
        root = Path(sysconfig.get_path("stdlib"))
        source = f"source code of the Python standard library ({root})"
        files = _standard_library_files(root)
    else:
        root = Path(data)
        source = str(root)
        if not root.exists():
            raise UsageError(f"--data: {root} does not exist (give a file or folder)")
        files = [root] if root.is_file() else _text_files(root)
    train, held_out = _split(files)
    for name, part in (("training", train), ("held-out", held_out)):
        if len(part) < min_bytes:
            raise UsageError(
                f"--data: the {name} part of {source} has {len(part)} bytes of text, "
                f"expected at least {min_bytes} (--seq-len + 1); give more text"
            )
    crc32 = zlib.crc32(held_out, zlib.crc32(train))
    return Text(source, _as_tensor(train), _as_tensor(held_out), crc32)


def _standard_library_files(root: Path) -> list[Path]:
    return [path for path in _files(root) if path.suffix == ".py"]


def _text_files(root: Path) -> list[Path]:
    """The files below ``root`` that have no NUL byte near their start."""
    files = []
    for path in _files(root, skipped_folders=frozenset()):
        with path.open("rb") as stream:
            if b"\0" not in stream.read(4096):
                files.append(path)
    return files


def _files(
    root: Path, skipped_folders: frozenset[str] = _SKIPPED_FOLDERS
) -> list[Path]:
    """Files below ``root`` in the order of their paths, hidden ones left out."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in skipped_folders and not name.startswith(".")
        ]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    files = [path for path in found if path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _split(files: list[Path]) -> tuple[bytes, bytes]:
    texts = [path.read_bytes() for path in files]
    if len(texts) >= HELD_OUT_EVERY:
        held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        del texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        return b"\n".join(texts), b"\n".join(held_out)
    text = b"\n".join(texts)
    cut = len(text) - len(text) // HELD_OUT_EVERY
    return text[:cut], text[cut:]


def _as_tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def training_batch(
    text: torch.Tensor, step: int, *, seed: int, batch: int, seq_len: int
) -> torch.Tensor:
    """The global batch of a step, (batch, seq_len + 1) int64.

    A pure function of seed and step: a run goes on at any step, on any number
    of ranks, with the very batches it would have seen.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - seq_len, (batch,), generator=generator)
    return _windows(text, starts, seq_len)


def held_out_windows(
    text: torch.Tensor, *, num_windows: int, seq_len: int
) -> torch.Tensor:
    """Windows spread evenly over the held-out part, (num_windows, seq_len + 1)."""
    last = len(text) - seq_len - 1
    starts = torch.linspace(0, last, num_windows, dtype=torch.float64).long()
    return _windows(text, starts, seq_len)


def _windows(text: torch.Tensor, starts: torch.Tensor, seq_len: int) -> torch.Tensor:
    return text[starts.unsqueeze(1) + torch.arange(seq_len + 1)].long()


def unigram_entropy(text: torch.Tensor) -> float:
    """Bits per byte of the best model that only knows how often each byte occurs."""
    frequency = torch.bincount(text, minlength=256).double() / len(text)
    frequency = frequency[frequency > 0]
    return float(-(frequency * frequency.log2()).sum())
