# SPDX-License-Identifier: Apache-2.0
"""The checks of `make lint` find what they are there to find."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
LICENCE = "// SPDX-License-Identifier: Apache-2.0\n"


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small csrc that keeps every rule."""
    files = {
        "kernels/permute.hpp": "#include <vector>\n",
        "process_group/common/config.cpp": 'auto v = std::getenv("AUTOMOE_NODE");\n',
        "process_group/common/error.hpp": "#include <string>\n",
        "process_group/memory/ring.hpp": '#include "process_group/common/error.hpp"\n',
        "process_group/network/peer.hpp": '#include "kernels/permute.hpp"\n',
        "process_group/exchange/run.cpp": '#include "process_group/memory/ring.hpp"\n',
        "process_group/work.hpp": "#include <torch/torch.h>\n",
        "moe_ops/plan.cpp": "#include <ATen/ATen.h>\n",
        "bindings.cpp": '#include "process_group/work.hpp"\n',
    }
    for name, text in files.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LICENCE + text)
    return tmp_path


@pytest.fixture
def layers(tree: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_tool("check_layers")
    monkeypatch.setattr(module, "ROOT", tree)
    return module


def test_layers_of_a_good_tree(
    layers: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert layers.main() == 0
    assert "9 files are fine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "process_group/memory/ring.hpp",
            '#include "process_group/network/peer.hpp"',
            "process_group/network is not below process_group/memory",
        ),
        (
            "process_group/common/error.hpp",
            '#include "process_group/exchange/run.cpp"',
            "process_group/exchange is not below process_group/common",
        ),
        (
            "kernels/permute.hpp",
            '#include "process_group/common/error.hpp"',
            "process_group/common is not below kernels",
        ),
        (
            "process_group/exchange/run.cpp",
            "#include <c10/util/Exception.h>",
            "no torch in kernels and the core",
        ),
        ("kernels/permute.hpp", '#  include "torch/all.h"', "no torch in kernels"),
        ("bindings.cpp", '#include "work.hpp"', "not a path from csrc"),
        (
            "process_group/network/peer.hpp",
            'auto v = std::getenv("UCX_TLS");',
            "reads the environment",
        ),
    ],
)
def test_layers_finds_violation(
    layers: ModuleType,
    tree: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    line: str,
    message: str,
) -> None:
    path = tree / "csrc" / name
    path.write_text(LICENCE + line + "\n")
    assert layers.main() == 1
    (found,) = capsys.readouterr().out.splitlines()
    assert found.startswith(f"{path}:2: ")
    assert message in found


def test_layers_ignores_comments(layers: ModuleType, tree: Path) -> None:
    path = tree / "csrc" / "kernels" / "permute.hpp"
    path.write_text(LICENCE + "// Not through getenv().\n")
    assert layers.main() == 0


def test_layers_knows_every_folder(layers: ModuleType, tree: Path) -> None:
    path = tree / "csrc" / "process_group" / "alltoall" / "new.cpp"
    path.parent.mkdir()
    path.write_text(LICENCE)
    assert layers.main() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int x;\n", "the first line is not"),
        (LICENCE + "int x;\n" * 500, "501 lines, at most 500"),
        (LICENCE + "// caf\u00e9\n", ":2: not ASCII"),
    ],
)
def test_sources_finds_violation(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    message: str,
) -> None:
    module = load_tool("check_sources")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "setup.py").write_text("# SPDX-License-Identifier: Apache-2.0\n")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "one.cpp").write_text(LICENCE + "int x;\n")
    assert module.main() == 0
    (tmp_path / "csrc" / "two.cpp").write_text(text, encoding="utf-8")
    capsys.readouterr()
    assert module.main() == 1
    (found,) = capsys.readouterr().out.splitlines()
    assert "two.cpp" in found
    assert message in found
