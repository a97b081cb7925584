# SPDX-License-Identifier: Apache-2.0
"""Drives CMake, which builds the extension; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from build_backend import find_torch, torch_version  # noqa: E402

TORCH = find_torch()
if TORCH is None:
    sys.exit("torch_automoe is built against torch: run 'pip install torch==2.13.0'")
TORCH_MINOR = ".".join(torch_version(TORCH).split(".")[:2])


def runtime_requirements() -> list[str]:
    """Pin the torch minor (its C++ ABI changes with it) and the UCX built with."""
    ucx = "libucx-cu13"
    try:
        if os.environ.get("AUTOMOE_UCX") != "system":
            ucx += ">=" + ".".join(version(ucx).split(".")[:2])
    except PackageNotFoundError:
        pass  # CMake then takes the system's UCX, or says what is missing.
    # torch's object collectives, which checkpointing uses, need numpy.
    return [f"torch=={TORCH_MINOR}.*", ucx, "numpy"]


def find_tool(name: str) -> str | None:
    """Return the path of a program: on PATH, or beside this Python (pip's own)."""
    beside = sysconfig.get_path("scripts")
    return shutil.which(name) or shutil.which(name, path=beside)


class CMakeBuild(build_ext):
    """Builds _C in a folder kept between runs, and puts it and _build.py in place."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build one extension with CMake."""
        ninja = find_tool("ninja")
        tag = f"{sys.implementation.cache_tag}-torch{TORCH_MINOR}"
        build_dir = ROOT / "build" / (tag if ninja else f"{tag}-make")
        self._cmake("-S", ROOT, "-B", build_dir, *self._cache_entries(ninja))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(
            len(os.sched_getaffinity(0))
        )
        self._cmake("--build", build_dir, "--target", "_C", "--parallel", jobs)

        target = ROOT / self.get_ext_fullpath(ext.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build_dir / target.name, target)
        shutil.copy2(build_dir / "_build.py", target.parent / "_build.py")

    def copy_extensions_to_source(self) -> None:
        """Put _build.py beside _C in the source tree too, for an editable install."""
        super().copy_extensions_to_source()
        record = Path("torch_automoe", "_build.py")
        shutil.copy2(Path(self.build_lib) / record, ROOT / record)

    def _cache_entries(self, ninja: str | None) -> list[str]:
        """Name tools and packages anew each time: build isolation moves them."""
        entries = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "AUTOMOE_WERROR": "OFF",
            "AUTOMOE_TORCH_ROOT": str(TORCH),
            "AUTOMOE_UCX": os.environ.get("AUTOMOE_UCX", ""),
            "Python_EXECUTABLE": sys.executable,
        }
        libucx = find_spec("libucx")
        if libucx is not None and libucx.submodule_search_locations:
            entries["AUTOMOE_UCX_ROOT"] = libucx.submodule_search_locations[0]
        if ninja:
            entries["CMAKE_MAKE_PROGRAM"] = ninja
        arguments = [f"-D{key}={value}" for key, value in entries.items()]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        return ["-G", "Ninja" if ninja else "Unix Makefiles", *arguments, *extra]

    def _cmake(self, *arguments: object) -> None:
        cmake = find_tool("cmake")
        if cmake is None:
            sys.exit("torch_automoe needs CMake >= 3.22: run 'pip install cmake ninja'")
        command = [cmake, *map(str, arguments)]
        print("+", shlex.join(command), flush=True)
        returncode = subprocess.run(command, check=False).returncode
        if returncode:
            sys.exit(f"CMake failed (exit code {returncode}); its message is above")


setup(
    ext_modules=[Extension("torch_automoe._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=runtime_requirements(),
)
