# SPDX-License-Identifier: Apache-2.0
"""The installed package: entry points, loader, `automoe info`, build."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from torch_automoe import _loader, info

ROOT = Path(__file__).resolve().parent.parent
AUTOMOE = Path(sysconfig.get_path("scripts"), "automoe")


def run_python(
    *arguments: object, cwd: Path, **environment: str
) -> subprocess.CompletedProcess:
    """Run this Python in another folder, so that the installed package is imported."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def build_backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "build_backend", ROOT / "tools" / "build_backend.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.chdir(ROOT)  # setuptools reads setup.py from the current folder.
    spec.loader.exec_module(module)
    return module


# ---- entry points and imports ----


@pytest.mark.parametrize("group", ["torch.backends", "torch.distributed.backends"])
def test_entry_point_is_the_registration(group: str) -> None:
    (point,) = [p for p in entry_points(group=group) if p.name == "automoe"]
    assert point.value == "torch_automoe._autoload:autoload"
    point.load()()  # Registering a second time is allowed.


def test_package_import_loads_neither_torch_nor_extension(tmp_path: Path) -> None:
    code = (
        "import sys, torch_automoe; assert torch_automoe.__version__;"
        "print([m for m in sys.modules if m.split('.')[0] == 'torch' or '_C' in m])"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_import_torch_registers_without_loading_extension(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from torch.distributed import Backend;"
        "print('AUTOMOE' in Backend._plugins, 'torch_automoe._C' in sys.modules)"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "True False"), done.stderr


def test_unknown_attribute_is_named() -> None:
    import torch_automoe

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        torch_automoe.nothing  # noqa: B018
    assert set(torch_automoe.__all__) <= set(dir(torch_automoe))


# ---- loader ----


def test_loader_accepts_another_patch_release() -> None:
    _loader.check_torch("2.13.0+cpu", "2.13.7+cu130")


@pytest.mark.parametrize("found", ["2.14.1", "2.1.0", "3.13.0", "2.12.0a0+git12"])
def test_loader_refuses_another_torch_minor(found: str) -> None:
    with pytest.raises(ImportError) as caught:
        _loader.check_torch("2.13.0", found)
    message = str(caught.value)
    assert "built for torch 2.13" in message
    assert f"this is torch {found}" in message
    assert "rebuild it with 'pip install" in message
    assert "\n" not in message


@pytest.mark.parametrize("found", ["13.2", "13.0"])
def test_loader_accepts_a_cuda_of_the_same_major(found: str) -> None:
    _loader.check_cuda("13.0", found)
    _loader.check_cuda("", found)
    _loader.check_cuda("", None)


@pytest.mark.parametrize("found", [None, "12.8"])
def test_loader_refuses_a_torch_without_the_cuda_that_it_needs(
    found: str | None,
) -> None:
    with pytest.raises(ImportError, match="built for CUDA 13.0.*rebuild it with"):
        _loader.check_cuda("13.0", found)


def test_loader_checks_torch_before_the_linker_sees_the_extension(
    tmp_path: Path,
) -> None:
    code = (
        "import sys, torch; torch.__version__ = '2.99.0'\n"
        "from torch_automoe import _loader\n"
        "try: _loader.load()\n"
        "except ImportError as error: print(error)\n"
        "print('torch_automoe._C' in sys.modules, 'libucx' in sys.modules)"
    )
    done = run_python("-c", code, cwd=tmp_path)
    message, loaded = done.stdout.strip().splitlines()
    assert "this is torch 2.99.0" in message
    assert loaded == "False False"


def test_loader_returns_the_extension_once() -> None:
    module = _loader.load()
    assert module.__name__ == "torch_automoe._C"
    assert _loader.load() is module


def test_loader_refuses_an_older_ucx(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _loader.load_ucx().version
    record = SimpleNamespace(UCX_VERSION="99.1")
    monkeypatch.setattr(_loader, "build_record", lambda: record)
    with pytest.raises(ImportError, match=f"UCX {found} .* older than the 99.1"):
        _loader.load_ucx.__wrapped__()


def test_loader_refuses_an_unknown_ucx_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOMOE_UCX", "mine")
    with pytest.raises(ValueError, match="'mine', expected wheel or system"):
        _loader.load_ucx.__wrapped__()


def test_loader_says_that_rdma_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loader, "rdma_devices", lambda: ["mlx5_0"])
    with pytest.warns(UserWarning, match="has RDMA devices, but its UCX .* 99.1"):
        assert not _loader._system_ucx_serves("99.1")


def test_extension_holds_no_path_of_the_build_machine() -> None:
    listing = subprocess.run(
        ["readelf", "-d", _loader.load().__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "[libucp.so.0]" in listing
    assert "RPATH" not in listing
    assert "RUNPATH" not in listing


# ---- the command and what it shows ----


def test_command_lists_its_subcommands() -> None:
    done = subprocess.run([AUTOMOE, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ["train", "lab", "info", "trace"]:
        assert f"\n  {command} " in done.stdout


def test_command_refuses_an_unknown_subcommand() -> None:
    done = subprocess.run([AUTOMOE, "fly"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'fly'" in done.stderr


def test_info_as_json_agrees_with_the_loader(tmp_path: Path) -> None:
    done = run_python("-m", "torch_automoe.info", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torch"] == torch.__version__
    assert found["extension"]["loaded"], found["extension"]
    assert found["ucx"] == vars(_loader.load_ucx())
    built = found["build"]
    assert built["torch_version"].split(".")[:2] == found["torch"].split(".")[:2]
    assert "-O3" in built["flags"]
    assert found["node"]["cores"] == len(os.sched_getaffinity(0))
    assert isinstance(found["node"]["cross_memory_reads"], bool)


def test_info_works_in_a_tree_that_is_not_built(tmp_path: Path) -> None:
    package = tmp_path / "torch_automoe"
    package.mkdir()
    for source in (ROOT / "torch_automoe").glob("*.py"):
        if source.name != "_build.py":
            shutil.copy(source, package)
    # An editable install's finder would lend the copy the modules that it lacks.
    code = (
        "import runpy, sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
        "runpy.run_module('torch_automoe.info', run_name='__main__')"
    )
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"cannot be loaded: torch_automoe in {package}" in done.stdout
    assert f"torch          {torch.__version__}" in done.stdout


def test_info_works_when_ucx_cannot_be_chosen(tmp_path: Path) -> None:
    done = run_python("-m", "torch_automoe.info", cwd=tmp_path, AUTOMOE_UCX="mine")
    assert done.returncode == 0, done.stderr
    assert "AUTOMOE_UCX is 'mine', expected wheel or system" in done.stdout


@pytest.mark.parametrize(
    ("environment", "name", "address", "reason"),
    [
        ({"AUTOMOE_INTERFACE": "lo"}, "lo", "127.0.0.1", "AUTOMOE_INTERFACE"),
        ({"AUTOMOE_INTERFACE": "no0"}, "no0", None, "there is none such"),
        ({"MASTER_ADDR": "127.0.0.1"}, "lo", "127.0.0.1", "route to MASTER_ADDR"),
    ],
)
def test_info_names_the_interface(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    name: str,
    address: str | None,
    reason: str,
) -> None:
    monkeypatch.delenv("AUTOMOE_INTERFACE", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    found = info.collect()["interface"]
    assert (found["name"], found["address"]) == (name, address)
    assert reason in found["reason"]


# ---- build ----


def test_build_takes_the_torch_that_is_there(build_backend: ModuleType) -> None:
    folder = build_backend.find_torch()
    assert folder == Path(torch.__file__).parent
    assert build_backend.torch_version(folder) == torch.__version__
    assert not [
        line
        for line in build_backend.get_requires_for_build_wheel()
        if line.startswith("torch")
    ]


def test_build_finds_torch_behind_build_isolation(
    build_backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_backend, "find_spec", lambda name: None)
    assert build_backend.find_torch() == Path(torch.__file__).parent


@pytest.mark.parametrize(
    ("settings", "requirement"),
    [(None, "torch==2.13.0"), ({"torch": "2.14.1"}, "torch==2.14.1")],
)
def test_build_requires_torch_where_it_is_missing_or_asked_for(
    build_backend: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str] | None,
    requirement: str,
) -> None:
    monkeypatch.setattr(build_backend, "find_torch", lambda: None)
    assert requirement in build_backend.get_requires_for_build_wheel(settings)
    assert requirement in build_backend.get_requires_for_build_editable(settings)
