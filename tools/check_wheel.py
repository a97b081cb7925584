# SPDX-License-Identifier: Apache-2.0
"""Checks a built wheel: contents, metadata, entry points, and what _C is linked to.

python tools/check_wheel.py dist/*.whl

Nothing is imported or installed. The extension is read with readelf. Where auditwheel
is installed it is asked too: it must find no library to take into the wheel but those
of torch and UCX, and names the platform tag that the wheel could carry.
"""

from __future__ import annotations

import configparser
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from email import message_from_bytes
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Loaded before _C is, by torch_automoe._loader, and pinned in the metadata.
OF_OTHER_WHEELS = ("libtorch*.so", "libc10*.so", "libuc[pstm].so.0", "libcudart.so.*")
# Of every Linux that PEP 600 (manylinux) knows.
OF_THE_SYSTEM = (
    *("libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0"),
    *("libgcc_s.so.1", "libstdc++.so.6", "ld-linux-*.so.*"),
)
REQUIRED_FILES = ("__init__.py", "_build.py", "_C.pyi", "backend.py", "py.typed")
FORBIDDEN_FILES = (
    *("*.cpp", "*.hpp", "*.cu", "*.cuh", "*.cmake"),
    *("*.o", "*.a", "*.pyc", "*.sh"),
)
REGISTRATION = "torch_automoe._autoload:autoload"
ENTRY_POINTS = {
    "torch.backends": {"automoe": REGISTRATION},
    "torch.distributed.backends": {"automoe": REGISTRATION},
    "console_scripts": {"automoe": "torch_automoe.cli:main"},
}


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a name is one of the shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def readelf(option: str, path: Path) -> str:
    """Return what readelf prints of a file, untranslated."""
    return subprocess.run(
        ["readelf", option, "--wide", path],
        capture_output=True,
        text=True,
        check=True,
        env={"LC_ALL": "C", "PATH": "/usr/local/bin:/usr/bin:/bin"},
    ).stdout


def check_names(names: list[str]) -> list[str]:
    """Return what is missing from the files of a wheel, and what is too many."""
    found = []
    have = set(names)
    for name in REQUIRED_FILES:
        if f"torch_automoe/{name}" not in have:
            found.append(f"torch_automoe/{name} is missing")
    for source in sorted((ROOT / "torch_automoe").rglob("*.py")):
        name = source.relative_to(ROOT).as_posix()
        if name not in have and source.name not in REQUIRED_FILES:
            found.append(f"{name} is missing")
    if not any(matches(name, ("*.dist-info/licenses/LICENSE",)) for name in names):
        found.append("LICENSE is missing")
    for name in names:
        top = name.split("/")[0]
        if top != "torch_automoe" and not matches(top, ("torch_automoe-*.dist-info",)):
            found.append(f"{name} does not belong into a wheel")
        elif matches(name, FORBIDDEN_FILES):
            found.append(f"{name} is a file of the build")
    return found


def check_entry_points(text: str) -> list[str]:
    """Return which entry points are not what torch and pip need."""
    parser = configparser.ConfigParser(delimiters="=")
    parser.read_string(text)
    return [
        f"entry points {group}: got {got}, expected {expected}"
        for group, expected in ENTRY_POINTS.items()
        if (got := dict(parser[group]) if group in parser else None) != expected
    ]


def check_metadata(metadata: bytes, build_record: str) -> list[str]:
    """Return whether the metadata pin the torch and UCX that _C was built with."""
    found = []
    headers = message_from_bytes(metadata)
    requires = [
        line for line in headers.get_all("Requires-Dist", []) if "extra ==" not in line
    ]
    built = dict(re.findall(r'^(\w+) = "(.*)"$', build_record, re.M))
    minor = ".".join(built.get("TORCH_VERSION", "?").split(".")[:2])
    if f"torch=={minor}.*" not in requires:
        found.append(f"requires {requires}, but _C was built for torch {minor}")
    ucx = re.escape(built.get("UCX_VERSION", "?"))
    if built.get("UCX_SOURCE") == "wheel" and not any(
        re.fullmatch(rf"libucx-cu\d+>={ucx}", line) for line in requires
    ):
        found.append(f"requires {requires}, but _C was built with the wheel of UCX")
    if headers["License-Expression"] != "Apache-2.0":
        found.append(f"License-Expression is {headers['License-Expression']}")
    return found


def check_extension(path: Path) -> list[str]:
    """Return what an extension is linked to that a wheel must not rely on."""
    found = []
    dynamic = readelf("--dynamic", path)
    for kind, value in re.findall(r"\((RPATH|RUNPATH)\).*\[(.*)\]", dynamic):
        found.append(f"{path.name} has {kind} {value}, a folder of the build machine")
    for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if not matches(name, OF_OTHER_WHEELS + OF_THE_SYSTEM):
            found.append(f"{path.name} needs {name}, which no requirement brings")
    if "PyInit__C" not in readelf("--dyn-syms", path):
        found.append(f"{path.name} exports no PyInit__C, so Python cannot import it")
    return found


def audit(path: Path) -> tuple[list[str], str]:
    """Ask auditwheel; return what it finds, and the platform tag that it allows.

    torch and UCX left aside, the symbols of the system's libraries decide the tag.
    """
    done = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", "--json", path],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return [f"auditwheel failed: {done.stdout}{done.stderr}".rstrip()], "unknown"
    shown = json.loads(done.stdout)
    return audit_findings(shown), shown["sym_tag"]


def audit_findings(shown: dict) -> list[str]:
    """Return what ``auditwheel show --json`` objects to, torch and UCX left aside."""
    found = [
        f"auditwheel: {name} would have to be taken into the wheel"
        for name in shown["external_libs"]
        if not matches(name, OF_OTHER_WHEELS)
    ]
    for fault in ("pyfpe", "ucs2", "unsupported_isa"):
        if shown[fault]:
            found.append(f"auditwheel: {fault}")
    return found


def check_wheel(path: Path) -> list[str]:
    """Return everything that is wrong with one wheel, one line each."""
    found = []
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        found += check_names(names)
        texts = {}
        for name in names:
            if matches(name, ("*.dist-info/METADATA", "*.dist-info/entry_points.txt")):
                texts[name.rpartition("/")[2]] = archive.read(name)
        record = "torch_automoe/_build.py"
        build_record = archive.read(record).decode() if record in names else ""
        found += check_metadata(texts.get("METADATA", b""), build_record)
        found += check_entry_points(texts.get("entry_points.txt", b"").decode())
        extensions = [n for n in names if matches(n, ("torch_automoe/_C.*.so",))]
        if len(extensions) != 1:
            found.append(f"got extensions {extensions}, expected torch_automoe/_C.*.so")
        for name in extensions:
            found += check_extension(Path(archive.extract(name, folder)))
    return found


def main(arguments: list[str]) -> int:
    """Check the wheels that are named; return 1 where one has faults."""
    if not arguments:
        print("usage: check_wheel.py WHEEL...", file=sys.stderr)
        return 2
    status = 0
    for path in map(Path, arguments):
        found = check_wheel(path)
        tag = "unknown, for auditwheel is not installed"
        if find_spec("auditwheel") is not None:
            objections, tag = audit(path)
            found += objections
        print("\n".join(f"{path.name}: {line}" for line in found) or path.name)
        print(f"  platform tag that its symbols allow: {tag}")
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
