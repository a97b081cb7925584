# SPDX-License-Identifier: Apache-2.0
"""Errors of the laboratory, and what to do when the kernel refuses namespaces."""

from __future__ import annotations

import errno
from pathlib import Path


class LabError(RuntimeError):
    """The laboratory cannot do what was asked; the message says what to do."""


def explain_refusal(step: str, error: OSError, unprivileged: bool) -> str:
    """Say why a set-up step failed and what would let it succeed.

    Args:
        step: what was tried, for example "unshare(user)".
        error: what the kernel answered.
        unprivileged: whether the laboratory runs inside a user namespace.
    """
    text = f"{step}: {error.strerror or error}"
    refused = error.errno in (errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EUSERS)
    if refused and unprivileged:
        return f"{text}. {_user_namespace_advice()}"
    if refused:
        return (
            f"{text}. This looks like a container that forbids it although it runs as "
            f"root: start the container with --privileged"
        )
    if error.errno in (errno.EOPNOTSUPP, errno.ENOENT, errno.EINVAL, errno.ENOSYS):
        return (
            f"{text}. The kernel may lack a feature: namespaces, veth, bridge, and "
            f"sch_tbf for a rate; as root try: modprobe -a bridge veth sch_tbf"
        )
    return text


def _user_namespace_advice() -> str:
    def setting(name: str) -> str | None:
        try:
            return Path("/proc/sys", name).read_text(encoding="ascii").strip()
        except OSError:
            return None

    # Debian, Ubuntu and the kernel itself each have a switch of their own.
    if setting("kernel/unprivileged_userns_clone") == "0":
        fix = "sysctl kernel.unprivileged_userns_clone=1"
    elif setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        fix = "sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    elif setting("user/max_user_namespaces") == "0":
        fix = "sysctl user.max_user_namespaces=10000"
    else:
        return (
            "User namespaces are refused here, probably by a container's rules: run as "
            "root, or start the container with --privileged"
        )
    return f"User namespaces are switched off: run as root, or as root set `{fix}`"
