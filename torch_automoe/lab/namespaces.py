# SPDX-License-Identifier: Apache-2.0
"""Linux namespaces and mounts: the system calls that Python does not offer."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 0x2, 0x4, 0x8
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int, purpose: str) -> None:
    """Move this process into new namespaces; OSError names ``purpose``."""
    _check(_libc.unshare(ctypes.c_int(flags)), f"unshare({purpose})")


def set_parent_death_signal(signum: int) -> None:
    """Have the kernel send ``signum`` when the thread that forked us ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0), "prctl(PDEATHSIG)")


def set_process_name(name: str) -> None:
    """Name this process for ps and top (15 characters count)."""
    _check(_libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0), "prctl(NAME)")


def may_administer() -> bool:
    """Whether this process may make namespaces without a user namespace."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(row for row in status.splitlines() if row.startswith("CapEff:"))
    effective = int(line.split()[1], 16)
    needed = 1 << _CAP_NET_ADMIN | 1 << _CAP_SYS_ADMIN
    return effective & needed == needed


def enter_user_namespace() -> None:
    """Become root of a new user namespace; outside we stay who we are."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER, "user")
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1")
    _write("/proc/self/gid_map", f"0 {gid} 1")


def make_mounts_private() -> None:
    """Keep what we mount from showing up outside this mount namespace."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)


def disable_ipv6() -> None:
    """Give later interfaces of this network namespace no IPv6 address.

    Link-local addresses would only add noise to the byte counters, and software that
    picks the first address it finds would pick one that /etc/hosts does not know.
    """
    with suppress(OSError):
        setting = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
        setting.write_text("1", encoding="ascii")


def mount_node_files(hosts: str, boot_id: str) -> list[str]:
    """Give this mount namespace the /proc, /sys, /dev/shm and names of a node.

    Returns:
        What had to be left as it is outside, one sentence each.
    """
    notes = []
    _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    try:
        _mount_sysfs()
    except OSError as error:
        notes.append(
            f"/sys is the one outside, so /sys/class/net shows its interfaces "
            f"({error.strerror})"
        )
    # A file can only be bound from a mounted file system: a first tmpfs carries the
    # files and is then detached from /dev/shm; the bound files keep it alive.
    _mount_shared_memory()
    for text, target in (
        (hosts, "/etc/hosts"),
        (boot_id, "/proc/sys/kernel/random/boot_id"),
    ):
        if not os.path.exists(target):
            notes.append(f"{target} does not exist here, so it cannot be replaced")
            continue
        source = Path("/dev/shm", os.path.basename(target))
        source.write_text(text, encoding="ascii")
        source.chmod(0o644)
        _mount(str(source), target, None, _MS_BIND)
    _check(_libc.umount2(b"/dev/shm", _MNT_DETACH), "umount(/dev/shm)")
    _mount_shared_memory()
    return notes


def _mount_shared_memory() -> None:
    _mount("shm", "/dev/shm", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777")


def _mount_sysfs() -> None:
    """Mount a sysfs that shows our network namespace, keeping the cgroups visible."""
    try:
        cgroups = os.open("/sys/fs/cgroup", os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        cgroups = None
    try:
        _mount("sysfs", "/sys", "sysfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        if cgroups is not None:
            source = f"/proc/self/fd/{cgroups}"
            _mount(source, "/sys/fs/cgroup", None, _MS_BIND | _MS_REC)
    finally:
        if cgroups is not None:
            os.close(cgroups)


def _mount(
    source: str | None,
    target: str,
    kind: str | None,
    flags: int,
    options: str | None = None,
) -> None:
    def encoded(text: str | None) -> bytes | None:
        return None if text is None else os.fsencode(text)

    result = _libc.mount(
        encoded(source),
        encoded(target),
        encoded(kind),
        ctypes.c_ulong(flags),
        encoded(options),
    )
    _check(result, f"mount({kind or source or 'private'} on {target})")


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="ascii")
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"write to {path}") from error


def _check(result: int, step: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), step)
