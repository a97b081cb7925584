# SPDX-License-Identifier: Apache-2.0
"""PEP 517 backend: setuptools' own, which also chooses the torch to build against.

The build needs torch's headers and libraries and never imports torch. It takes, in
this order, a torch that the build itself can import (no build isolation, or a version
asked for), the torch of the environment that pip installs into, and else DEFAULT_TORCH
from the package index. To ask for another version:
``pip install . --config-settings torch=2.14.1``.
"""

from __future__ import annotations

import re
import shutil
import site
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

DEFAULT_TORCH = "2.13.0"
ROOT = Path(__file__).resolve().parent.parent

Settings = dict[str, Any] | None


def find_torch() -> Path | None:
    """Return the folder of the torch to build against, or None where there is none."""
    spec = find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    # pip's build isolation takes these folders from sys.path, but does not hide them.
    folders = [sysconfig.get_path("purelib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    for folder in folders:
        if Path(folder, "torch", "version.py").is_file():
            return Path(folder, "torch")
    return None


def torch_version(folder: Path) -> str:
    """Return the version of the torch in a folder, such as ``2.13.0+cpu``."""
    found = re.search(
        r"^__version__ = '([^']+)'", (folder / "version.py").read_text(), re.M
    )
    if found is None:
        raise RuntimeError(f"{folder / 'version.py'} names no __version__")
    return found.group(1)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return torch, where a version was asked for or the build would find none.

    setuptools' own hook is not asked: it runs setup.py, which needs the torch that is
    still to be installed, and has nothing to add.
    """
    asked = (config_settings or {}).get("torch")
    if asked:
        return [f"torch=={asked}"]
    return [] if find_torch() else [f"torch=={DEFAULT_TORCH}"]


# setup.py names the torch minor, so that metadata need it as much as a build does.
get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = get_requires_for_build_wheel


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel without what an earlier one left behind; return its file name."""
    for stale in (ROOT / "build").glob("lib.*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


if __name__ == "__main__":
    sys.exit("build_backend.py is called by pip; run 'pip install .' instead")
