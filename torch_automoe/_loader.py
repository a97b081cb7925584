# SPDX-License-Identifier: Apache-2.0
"""Loads UCX and the extension, after checking that this torch is the one built for."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_UCX_SONAME = "libucp.so.0"
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


@dataclass(frozen=True)
class UcxLibrary:
    """The UCX that this process uses.

    Attributes:
        version: such as "1.22.0".
        source: "wheel" or "system".
        path: the file of libucp.
    """

    version: str
    source: str
    path: str


@functools.cache
def load() -> ModuleType:
    """Return the extension ``torch_automoe._C``; called when the first group is made.

    Raises:
        ImportError: the package is not built, or built for another torch minor, or
            there is no UCX to go with it. The message is one line with the next step.
    """
    import torch

    record = build_record()
    check_torch(record.TORCH_VERSION, torch.__version__)
    check_cuda(record.CUDA, torch.version.cuda)
    load_ucx()
    try:
        return importlib.import_module("torch_automoe._C")
    except ModuleNotFoundError:
        raise _not_built() from None


def build_record() -> ModuleType:
    """Return what the extension was built with: the generated module ``_build``.

    Raises:
        ImportError: the package was imported from a source tree that is not built.
    """
    try:
        return importlib.import_module("torch_automoe._build")
    except ModuleNotFoundError:
        raise _not_built() from None


def _not_built() -> ImportError:
    return ImportError(
        f"torch_automoe in {Path(__file__).parent} has no extension compiled for this "
        "Python: run from another folder if the package is installed, or "
        "'pip install --no-build-isolation -e .' in the source tree"
    )


def check_torch(built: str, found: str) -> None:
    """Raise ImportError unless two torch versions have the same major and minor.

    torch's C++ ABI changes with each minor, and the dynamic linker's complaint about
    it is a mangled name.
    """
    minor = ".".join(built.split(".")[:2])
    if found.split(".")[:2] != built.split(".")[:2]:
        raise ImportError(
            f"torch_automoe was built for torch {minor} and this is torch {found}: "
            f"rebuild it with '{_REBUILD}' in its source tree, or "
            f"'pip install torch=={minor}.*'"
        )


def check_cuda(built: str, found: str | None) -> None:
    """Raise ImportError where the extension needs a CUDA runtime that torch lacks.

    Args:
        built: the CUDA version that the extension was built with; "" without CUDA.
        found: that of this torch; None for a CPU build.
    """
    if built and (found or "").split(".")[0] != built.split(".")[0]:
        raise ImportError(
            f"torch_automoe was built for CUDA {built}, and this torch is built for "
            f"{'CUDA ' + found if found else 'the CPU'}: rebuild it with '{_REBUILD}' "
            "in its source tree"
        )


@functools.cache
def load_ucx() -> UcxLibrary:
    """Load UCX's libraries, so that the extension finds them by their sonames.

    AUTOMOE_UCX=wheel or system decides; without it the libucx wheel is used, or the
    system's UCX on a machine with RDMA devices, which the wheel cannot drive.

    Raises:
        ImportError: no UCX could be loaded, or it is older than the one built with.
        ValueError: AUTOMOE_UCX has another value.
    """
    asked = os.environ.get("AUTOMOE_UCX", "")
    if asked not in ("", "wheel", "system"):
        raise ValueError(f"AUTOMOE_UCX is {asked!r}, expected wheel or system")
    needed = build_record().UCX_VERSION
    source = asked or ("system" if _system_ucx_serves(needed) else "wheel")
    try:
        if source == "wheel":
            importlib.import_module("libucx").load_library()
        library = ctypes.CDLL(_UCX_SONAME)
    except (ImportError, OSError) as error:
        raise ImportError(
            f"no UCX ({source}): {error}; run 'pip install libucx-cu13', or install "
            "the system's UCX and set AUTOMOE_UCX=system"
        ) from error
    ucx = _describe(library)
    if _release(ucx.version) < _release(needed):
        raise ImportError(
            f"UCX {ucx.version} ({ucx.path}) is older than the {needed} that "
            f"torch_automoe was built with: run 'pip install libucx-cu13>={needed}' "
            "and set AUTOMOE_UCX=wheel, or rebuild with AUTOMOE_UCX=system"
        )
    return ucx


def rdma_devices() -> list[str]:
    """Return the names of this machine's RDMA devices, such as ``mlx5_0``."""
    folder = Path("/sys/class/infiniband")
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _system_ucx_serves(needed: str) -> bool:
    """Return whether there is RDMA and a system's UCX that is new enough for us."""
    if not rdma_devices():
        return False
    # In a process of its own: a UCX that was loaded here to be looked at would stay,
    # and be the one that the extension finds.
    code = (
        "import ctypes; v = [ctypes.c_uint() for _ in range(3)];"
        f"ctypes.CDLL('{_UCX_SONAME}').ucp_get_version(*map(ctypes.byref, v));"
        "print(v[0].value, v[1].value, sep='.')"
    )
    probe = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    found = probe.stdout.strip()
    if probe.returncode == 0 and _release(found) >= _release(needed):
        return True
    state = f"is {found}" if found else "is missing"
    warnings.warn(
        f"this machine has RDMA devices, but its UCX {state} where {needed} or newer "
        "is needed: using the libucx wheel, which has TCP only; install UCX "
        f"{needed}, or rebuild with AUTOMOE_UCX=system",
        stacklevel=2,
    )
    return False


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("file_name", ctypes.c_char_p),
        ("file_base", ctypes.c_void_p),
        ("symbol_name", ctypes.c_char_p),
        ("symbol_address", ctypes.c_void_p),
    ]


def _describe(library: ctypes.CDLL) -> UcxLibrary:
    """Ask a loaded libucp for its version, and the dynamic linker for its file."""
    parts = [ctypes.c_uint() for _ in range(3)]
    library.ucp_get_version(*map(ctypes.byref, parts))
    info = _DlInfo()
    ctypes.CDLL(None).dladdr(
        ctypes.cast(library.ucp_get_version, ctypes.c_void_p), ctypes.byref(info)
    )
    path = os.fsdecode(info.file_name or _UCX_SONAME.encode())
    return UcxLibrary(
        version=".".join(str(part.value) for part in parts),
        source="wheel" if "libucx" in Path(path).parts else "system",
        path=os.path.realpath(path),
    )
