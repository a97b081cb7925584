# SPDX-License-Identifier: Apache-2.0
"""Wheels and sdists: complete, and linked to nothing that they do not bring."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from test_source_checks import load_tool

from torch_automoe import _loader

ROOT = Path(__file__).resolve().parent.parent
INFO = "torch_automoe-0.1.0.dist-info"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("check_wheel")


@pytest.fixture
def files(tool: ModuleType) -> dict[str, bytes]:
    """The files of a wheel of the package that these tests run on, by name."""
    package = ROOT / "torch_automoe"
    sources = [*package.rglob("*.py"), *package.glob("*.pyi"), package / "py.typed"]
    sources.append(Path(_loader.load().__file__))
    found = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sources}
    record = _loader.build_record()
    minor = ".".join(record.TORCH_VERSION.split(".")[:2])
    metadata = [
        "Metadata-Version: 2.4",
        "Name: torch_automoe",
        "License-Expression: Apache-2.0",
        f"Requires-Dist: torch=={minor}.*",
        f"Requires-Dist: libucx-cu13>={record.UCX_VERSION}",
        "Requires-Dist: torch==1.0; extra == 'old'",
    ]
    found[f"{INFO}/METADATA"] = "\n".join([*metadata, "", ""]).encode()
    found[f"{INFO}/entry_points.txt"] = b"".join(
        f"[{group}]\nautomoe = {points['automoe']}\n".encode()
        for group, points in tool.ENTRY_POINTS.items()
    )
    found[f"{INFO}/licenses/LICENSE"] = (ROOT / "LICENSE").read_bytes()
    return found


def write_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "torch_automoe-0.1.0-cp311-cp311-linux_x86_64.whl"
    record = f"{INFO}/RECORD"
    lines = "".join(f"{name},,\n" for name in [*files, record])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, record: lines.encode()}.items():
            archive.writestr(name, content)
    return path


def extension_of(files: dict[str, bytes]) -> str:
    (name,) = [name for name in files if name.endswith(".so")]
    return name


def test_a_good_wheel_passes(
    tool: ModuleType, tmp_path: Path, files: dict[str, bytes]
) -> None:
    assert tool.check_wheel(write_wheel(tmp_path, files)) == []


@pytest.mark.parametrize(
    "name",
    [
        "torch_automoe/py.typed",
        "torch_automoe/_C.pyi",
        "torch_automoe/lab/cli.py",
        f"{INFO}/licenses/LICENSE",
    ],
)
def test_a_missing_file_is_found(
    tool: ModuleType, tmp_path: Path, files: dict[str, bytes], name: str
) -> None:
    del files[name]
    (found,) = tool.check_wheel(write_wheel(tmp_path, files))
    assert found == f"{name.rpartition('/licenses/')[2]} is missing"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tests/test_wheel.py", "does not belong into a wheel"),
        ("build/_C.o", "does not belong into a wheel"),
        ("torch_automoe/kernels.cpp", "is a file of the build"),
    ],
)
def test_a_file_too_many_is_found(
    tool: ModuleType, tmp_path: Path, files: dict[str, bytes], name: str, text: str
) -> None:
    files[name] = b""
    assert tool.check_wheel(write_wheel(tmp_path, files)) == [f"{name} {text}"]


def test_another_extension_is_found(
    tool: ModuleType, tmp_path: Path, files: dict[str, bytes]
) -> None:
    name = extension_of(files)
    content = files.pop(name)
    (found,) = tool.check_wheel(write_wheel(tmp_path, files))
    assert found == "got extensions [], expected torch_automoe/_C.*.so"
    both = {name: content, "torch_automoe/_C.cpython-399-x86_64-linux-gnu.so": content}
    (found,) = tool.check_wheel(write_wheel(tmp_path, {**files, **both}))
    assert "got extensions ['torch_automoe/_C." in found


@pytest.mark.parametrize(
    ("name", "old", "new", "text"),
    [
        ("entry_points.txt", "[torch.backends]", "[torch.ends]", "torch.backends: got"),
        ("entry_points.txt", ":autoload", ":load", "torch.backends: got {'automoe'"),
        ("METADATA", "torch==", "torch>=", "but _C was built for torch"),
        ("METADATA", "libucx-cu13>", "libucx-cu13=", "with the wheel of UCX"),
        ("METADATA", "Apache-2.0", "MIT", "License-Expression is MIT"),
    ],
)
def test_wrong_metadata_are_found(
    tool: ModuleType,
    tmp_path: Path,
    files: dict[str, bytes],
    name: str,
    old: str,
    new: str,
    text: str,
) -> None:
    content = files[f"{INFO}/{name}"].decode()
    assert old in content
    files[f"{INFO}/{name}"] = content.replace(old, new).encode()
    found = tool.check_wheel(write_wheel(tmp_path, files))
    assert text in found[0]


def test_wrong_linkage_is_found(
    tool: ModuleType, tmp_path: Path, files: dict[str, bytes]
) -> None:
    """A library that no requirement brings, and the folder that it lies in."""
    other, extension = tmp_path / "libother.so", tmp_path / "_C.so"
    linker = [os.environ.get("CC", "cc"), "-shared", "-nostartfiles", "-x", "c"]
    empty = tmp_path / "empty.c"
    empty.write_text("int automoe_nothing;\n")
    subprocess.run([*linker, empty, "-o", other], check=True)
    subprocess.run(
        [
            *(*linker, empty, "-o", extension, f"-Wl,-rpath,{tmp_path}"),
            *(f"-L{tmp_path}", "-Wl,--no-as-needed", "-lother"),
        ],
        check=True,
    )
    files[extension_of(files)] = extension.read_bytes()
    found = "\n".join(tool.check_wheel(write_wheel(tmp_path, files)))
    assert f"PATH {tmp_path}, a folder of the build machine" in found
    assert "needs libother.so, which no requirement brings" in found
    assert "exports no PyInit__C" in found


def test_auditwheel_may_object(tool: ModuleType) -> None:
    shown = {
        "external_libs": {"libtorch_cpu.so": None, "libucp.so.0": None},
        **dict.fromkeys(("pyfpe", "ucs2", "unsupported_isa"), False),
    }
    assert tool.audit_findings(shown) == []
    shown["external_libs"]["libibverbs.so.1"] = None
    shown["unsupported_isa"] = True
    assert tool.audit_findings(shown) == [
        "auditwheel: libibverbs.so.1 would have to be taken into the wheel",
        "auditwheel: unsupported_isa",
    ]


def test_auditwheel_takes_what_we_build(
    tool: ModuleType,
    tmp_path: Path,
    files: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("auditwheel")
    path = write_wheel(tmp_path, files)
    assert tool.main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "platform tag that its symbols allow: manylinux_2_" in shown


def make(*arguments: object) -> None:
    subprocess.run(["make", "-C", ROOT, *map(str, arguments)], check=True, timeout=1800)


@pytest.mark.slow
def test_an_sdist_builds_a_wheel(tool: ModuleType, tmp_path: Path) -> None:
    """From an unpacked sdist, beside which there is nothing else of this tree."""
    venv = f"VENV={Path(sys.prefix)}"
    dist = f"DIST={tmp_path}"
    make("sdist", venv, dist)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"csrc/bindings.cpp", "tests/conftest.py", "Makefile", "setup.py"} <= {
        *names
    }
    assert not [name for name in names if name.endswith(".so") or "_build.py" in name]
    make("wheel", venv, dist, f"FROM={sdist}")
    (wheel,) = tmp_path.glob("*.whl")
    assert tool.check_wheel(wheel) == []
    check_that_it_runs(wheel, tmp_path / "installed")


def check_that_it_runs(wheel: Path, folder: Path) -> None:
    """Two ranks exchange with the wheel's own files, which come before the tree's."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    script = folder / "smoke_two_ranks.py"
    shutil.copy(ROOT / "tests" / "smoke_two_ranks.py", script)

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "from torch_automoe import _loader; print(_loader.load())")
    assert str(folder / "torch_automoe" / "_C.") in where
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    assert run(*launch, script).count("all_to_all_single is right") == 2
