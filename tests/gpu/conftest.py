# SPDX-License-Identifier: Apache-2.0
"""Tests that need a CUDA device; without one each of them is skipped, with the reason.

``make test-gpu`` runs them on a machine with a GPU; docs/gpu.md says what they prove.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def why_not() -> str | None:
    """Why there is no GPU to test with; None: there is one."""
    if torch.version.cuda is None:
        return f"there is no CUDA device: torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return "there is no CUDA device: torch finds no GPU or no driver"
    from torch_automoe import _loader

    if not _loader.build_record().CUDA:
        return "torch_automoe was built without CUDA: run `make test-gpu`"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is in this folder where it cannot run."""
    own = [item for item in items if HERE in item.path.parents]
    reason = why_not() if own else None
    if reason is not None:
        for item in own:
            item.add_marker(pytest.mark.skip(reason=reason))
