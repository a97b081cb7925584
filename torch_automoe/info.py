# SPDX-License-Identifier: Apache-2.0
"""What this installation is and what it found: ``python -m torch_automoe.info``."""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch_automoe import _loader

_SIOCGIFADDR = 0x8915
_PR_SET_PTRACER = 0x59616D61

# Run by a child: reads this process's memory as a rank reads that of a node-mate.
_READ_CODE = """
import ctypes, sys
pid, address, size = map(int, sys.stdin.readline().split())
class IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
page = ctypes.create_string_buffer(size)
here, there = IoVec(ctypes.addressof(page), size), IoVec(address, size)
libc = ctypes.CDLL(None, use_errno=True)
read = libc.process_vm_readv
read.restype = ctypes.c_ssize_t
got = read(pid, ctypes.byref(here), ctypes.c_ulong(1), ctypes.byref(there),
           ctypes.c_ulong(1), ctypes.c_ulong(0))
sys.stdout.buffer.write(page.raw if got == size else b"errno %d" % ctypes.get_errno())
"""


def collect() -> dict[str, Any]:
    """Return everything that is shown, as one JSON-ready dictionary.

    Nothing in it raises: what cannot be found is None, and an extension that cannot be
    loaded is described under "extension".
    """
    torch_found, cuda = _torch_and_cuda()
    return {
        "torch_automoe": _package_version("torch_automoe"),
        "python": platform.python_version(),
        "torch": torch_found,
        "extension": _extension(),
        "ucx": _ucx(),
        "cuda": cuda,
        "node": _node(),
        "interface": _interface(),
        "transports": _transports(),
        "build": _build(),
    }


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch_and_cuda() -> tuple[str | None, dict[str, Any]]:
    """Return torch's version and what it finds of CUDA and NCCL."""
    cuda: dict[str, Any] = {"torch_cuda": None, "nccl": None, "devices": []}
    try:
        import torch
    except (ImportError, RuntimeError, OSError):
        return None, cuda
    cuda["torch_cuda"] = torch.version.cuda
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        cuda["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    if torch.cuda.is_available():
        cuda["devices"] = [
            torch.cuda.get_device_name(index)
            for index in range(torch.cuda.device_count())
        ]
    return torch.__version__, cuda


def _extension() -> dict[str, Any]:
    try:
        module = _loader.load()
    except (ImportError, ValueError, OSError) as error:
        return {"loaded": False, "error": str(error)}
    return {"loaded": True, "path": module.__file__}


def _ucx() -> dict[str, Any]:
    try:
        ucx = _loader.load_ucx()
    except (ImportError, ValueError) as error:
        return {"version": None, "error": str(error)}
    return {"version": ucx.version, "source": ucx.source, "path": ucx.path}


def _build() -> dict[str, Any] | None:
    try:
        record = _loader.build_record()
    except ImportError:
        return None
    return {
        name.lower(): value for name, value in vars(record).items() if name.isupper()
    }


def _node() -> dict[str, Any]:
    yama = Path("/proc/sys/kernel/yama/ptrace_scope")
    return {
        "hostname": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "pinned": os.environ.get("AUTOMOE_NODE") or None,
        "cross_memory_reads": _cross_memory_reads(),
        "yama_ptrace_scope": int(yama.read_text()) if yama.exists() else None,
    }


def _cross_memory_reads() -> bool:
    """Return whether another process of this user can read our memory (by doing it)."""
    page = ctypes.create_string_buffer(os.urandom(4096), 4096)
    with subprocess.Popen(
        [sys.executable, "-c", _READ_CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        # Where Yama restricts reads to ancestors, a process may name one more reader.
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(child.pid))
        request = f"{os.getpid()} {ctypes.addressof(page)} {len(page)}\n"
        seen, _ = child.communicate(request.encode())
        libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(0))
    return seen == page.raw


def _interface() -> dict[str, Any]:
    """Return the interface used between nodes, as the backend chooses it."""
    asked = os.environ.get("AUTOMOE_INTERFACE")
    names = [name for _, name in socket.if_nameindex()]
    if asked:
        found = asked in names
        return {
            "name": asked,
            "address": _address(asked) if found else None,
            "reason": "AUTOMOE_INTERFACE"
            + ("" if found else ", but there is none such"),
        }
    master = os.environ.get("MASTER_ADDR")
    # Connecting a datagram socket sends nothing; it only asks the routing table.
    # 192.0.2.1 is an address of no host (RFC 5737): it takes the default route.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master or "192.0.2.1", 9))
            address = probe.getsockname()[0]
        except OSError as error:
            target = f"MASTER_ADDR {master}" if master else "another machine"
            reason = f"no route to {target} ({error.strerror or error})"
            return {"name": None, "address": None, "reason": reason}
    reason = f"route to MASTER_ADDR {master}" if master else "default route"
    name = next((name for name in names if _address(name) == address), None)
    return {"name": name, "address": address, "reason": reason}


def _address(interface: str) -> str | None:
    """Return the IPv4 address of an interface, or None."""
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _transports() -> dict[str, Any]:
    """Return what carries data inside a node and between nodes."""
    return {
        "node": ["shared memory (memfd)", "cross-memory reads where allowed"],
        "network": _ucx_network_transports(),
        "rdma_devices": _loader.rdma_devices(),
    }


def _ucx_network_transports() -> list[str] | None:
    """Return UCX's transports between nodes as transport:device, or None.

    They come from the ucx_info that belongs to the UCX in use, where there is one.
    """
    try:
        library = Path(_loader.load_ucx().path)
    except (ImportError, ValueError):
        return None
    program: str | None = str(library.parent.parent / "bin" / "ucx_info")
    if not os.access(program, os.X_OK):
        program = shutil.which("ucx_info")
    if program is None:
        return None
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}
    try:
        listing = subprocess.run(
            [program, "-d"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    pairs = re.findall(r"Transport: (\S+)\s*\n#\s*Device: (\S+)", listing)
    return [
        f"{transport}:{device}"
        for transport, device in pairs
        if transport.startswith(("tcp", "rc", "dc", "ud"))
    ]


def render(found: dict[str, Any]) -> str:
    """Return what `collect` found as lines for a person."""
    build, ucx, cuda = found["build"], found["ucx"], found["cuda"]
    node, interface = found["node"], found["interface"]
    transports = found["transports"]
    yama = node["yama_ptrace_scope"]
    rows = {
        "torch_automoe": found["torch_automoe"] or "not installed (source tree)",
        "extension": found["extension"].get("path")
        or f"cannot be loaded: {found['extension']['error']}",
        "python": found["python"],
        "torch": found["torch"] or "cannot be imported",
        "UCX": ucx.get("error") or f"{ucx['version']} ({ucx['source']}: {ucx['path']})",
        "CUDA": f"torch's {cuda['torch_cuda'] or 'none'}, "
        f"devices: {', '.join(cuda['devices']) or 'none'}",
        "NCCL": cuda["nccl"] or "none",
        "node": f"{node['hostname']}, {node['cores']} cores"
        + (f", pinned to {node['pinned']!r}" if node["pinned"] else ""),
        "cross-memory": ("allowed" if node["cross_memory_reads"] else "forbidden")
        + f" (Yama ptrace_scope {'absent' if yama is None else yama})",
        "interface": f"{interface['name'] or 'none'} "
        f"({interface['address'] or 'no address'}; {interface['reason']})",
        "in a node": ", ".join(transports["node"]),
        "network": ", ".join(transports["network"] or ["unknown (no ucx_info)"]),
        "RDMA": ", ".join(transports["rdma_devices"]) or "no devices",
    }
    if build is None:
        rows["build"] = "none"
    else:
        rows["build"] = (
            f"torch {build['torch_version']}, UCX {build['ucx_version']} "
            f"({build['ucx_source']}), CUDA {build.get('cuda') or 'none'}, "
            f"{build['compiler']}, {build['flags']}"
        )
        rows["revision"] = build["git_revision"] or "unknown"
    return "\n".join(f"{name:<15}{value}" for name, value in rows.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``automoe info`` to a parser."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )


def run(args: argparse.Namespace) -> int:
    """Print what was found; return 0 also where the extension cannot be loaded."""
    found = collect()
    print(json.dumps(found, indent=2) if args.json else render(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m torch_automoe.info``."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_automoe.info", description=__doc__
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
