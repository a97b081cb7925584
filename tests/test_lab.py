# SPDX-License-Identifier: Apache-2.0
"""The laboratory: its shapes, its nodes and the network between them."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_processes import (
    PYTHON,
    await_condition,
    needs_lab,
)

from torch_automoe.lab import (
    Lab,
    LabError,
    parse_nodes,
    parse_rate,
    parse_size,
)
from torch_automoe.lab.errors import explain_refusal
from torch_automoe.lab.spec import LabSpec, make_spec


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three nodes, 1gbit."""
    with Lab([2, 1, 1], rate="1gbit") as lab:
        yield lab


# ---- Shapes and arguments


def test_nodes_argument_forms() -> None:
    assert parse_nodes("4", 2) == (2, 2, 2, 2)
    assert parse_nodes("3") == (2, 2, 2)
    assert parse_nodes("3,3,2") == (3, 3, 2)


@pytest.mark.parametrize("text", ["", "0", "-1", "2,", "a", "2,0", "1.5"])
def test_nodes_argument_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="nodes: got"):
        parse_nodes(text)


def test_nodes_argument_refuses_two_forms_at_once() -> None:
    with pytest.raises(ValueError, match="ranks-per-node: got 2 beside nodes '3,3'"):
        parse_nodes("3,3", 2)


def test_rates_and_sizes_have_tc_units() -> None:
    assert parse_rate("1gbit") == 125_000_000
    assert parse_rate("100mbit") == 12_500_000
    assert parse_rate("1.5kbit") == 187
    assert parse_size("128kb") == 131072
    assert parse_size("2m") == 2 << 20


@pytest.mark.parametrize("text", ["", "1", "1gb", "0mbit", "-1gbit", "1bit", "fast"])
def test_rate_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="rate: got .*1gbit"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": []}, "nodes: got"),
        ({"nodes": [2, 0]}, "nodes: got"),
        ({"nodes": [1], "threads": 0}, "threads: got 0"),
        ({"nodes": [1], "burst": "128kb"}, "burst: given without a rate"),
        ({"nodes": [1], "rate": "1gbit", "burst": "4kb"}, "burst: got 4096"),
        ({"nodes": [1], "placement": "random"}, "placement: got 'random'"),
    ],
)
def test_shape_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_spec(**options)


def test_placement_block_and_cyclic() -> None:
    block = LabSpec((3, 1, 2))
    assert block.node_of_rank == (0, 0, 0, 1, 2, 2)
    assert block.local_rank_of_rank == (0, 1, 2, 0, 0, 1)
    cyclic = LabSpec((3, 1, 2), placement="cyclic")
    assert cyclic.node_of_rank == (0, 1, 2, 0, 2, 0)
    assert cyclic.local_rank_of_rank == (0, 0, 0, 1, 1, 2)


def test_refusals_say_what_to_do() -> None:
    refused = OSError(errno.EPERM, "Operation not permitted")
    as_root = explain_refusal("unshare(mount)", refused, unprivileged=False)
    assert "unshare(mount): Operation not permitted" in as_root
    assert "--privileged" in as_root
    as_user = explain_refusal("unshare(user)", refused, unprivileged=True)
    assert re.search("run as root", as_user)
    lacking = explain_refusal("bridge", OSError(errno.EOPNOTSUPP, "no"), False)
    assert "modprobe" in lacking


# ---- Nodes


@needs_lab
def test_nodes_are_apart(lab: Lab) -> None:
    script = (
        "import os, socket; open('/dev/shm/own', 'x').write('1'); "
        "print(socket.gethostname(), os.getpid() < 1000, "
        "sorted(n for _, n in socket.if_nameindex()), "
        "sorted(os.listdir('/sys/class/net')), "
        "open('/proc/sys/kernel/random/boot_id').read().strip(), "
        "*(os.stat(f'/proc/self/ns/{n}').st_ino "
        "for n in ('net', 'uts', 'ipc', 'pid', 'mnt')))"
    )
    lines = [lab.exec(node, [*PYTHON, script]).stdout for node in range(3)]
    for node, line in enumerate(lines):
        assert line.startswith(f"node{node} True ['eth0', 'lo'] ['eth0', 'lo'] ")
    # boot id and five namespaces: all different from each other and from ours.
    columns = list(zip(*(line.split()[-6:] for line in lines), strict=True))
    assert [len(set(column)) for column in columns] == [3] * 6
    ours = {str(os.stat(f"/proc/self/ns/{n}").st_ino) for n in ("net", "mnt", "pid")}
    assert not ours & {inode for column in columns for inode in column}
    assert not os.path.exists("/dev/shm/own")


@needs_lab
def test_every_node_resolves_every_name(lab: Lab) -> None:
    script = (
        "import socket; print(*(socket.gethostbyname(f'node{n}') for n in range(3)), "
        "socket.gethostbyname(socket.gethostname()), socket.gethostbyname('localhost'),"
        "socket.getnameinfo(('::ffff:10.77.0.1', 1), 0)[0])"
    )
    for node in range(3):
        *names, own, localhost, mapped = lab.exec(
            node, [*PYTHON, script]
        ).stdout.split()
        assert names == lab.addresses
        assert own == lab.addresses[node]
        assert localhost == "127.0.0.1"
        assert mapped == "node0-mapped"


@needs_lab
def test_nodes_reach_nothing_outside(lab: Lab) -> None:
    script = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    done = lab.exec(0, [*PYTHON, script], check=False)
    assert "Network is unreachable" in done.stderr


@needs_lab
def test_exec_reports_failures(lab: Lab) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        lab.exec(1, ["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (error.value.returncode, error.value.stdout) == (3, "out\n")
    assert error.value.stderr == "err\n"
    with pytest.raises(FileNotFoundError, match="/no-such-program"):
        lab.exec(1, ["/no-such-program"])
    with pytest.raises(subprocess.TimeoutExpired):
        lab.exec(1, ["sleep", "100"], timeout=0.1)
    with pytest.raises(LabError, match="node: got 3, expected 0 to 2"):
        lab.exec(3, ["true"])


@needs_lab
def test_popen_streams_and_signals(lab: Lab) -> None:
    pipe = subprocess.PIPE
    cat = lab.popen(["cat"], node=2, stdin=pipe, stdout=pipe)
    cat.stdin.write(b"through")
    cat.stdin.close()
    assert cat.communicate() == (b"through", b"")
    assert cat.returncode == 0
    cat.close()
    sleeper = lab.popen(["sleep", "100"], node=2)
    assert sleeper.poll() is None
    # Just after exec, the kernel may still show an empty command line.
    cmdline = Path(f"/proc/{sleeper.pid}/cmdline")
    await_condition(lambda: b"sleep" in cmdline.read_bytes(), "its pid is ours to see")
    sleeper.send_signal(signal.SIGUSR1)
    assert sleeper.wait(timeout=30) == -signal.SIGUSR1
    sleeper.close()


# ---- The network

_RECEIVE = """
import socket, sys, time
server = socket.create_server(("", 5000))
print("up", flush=True)
connection, _ = server.accept()
total, start = 0, None
while part := connection.recv(1 << 20):
    start = start or time.monotonic()
    total += len(part)
print(total, time.monotonic() - start)
"""
_SEND = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5000), timeout=20)
block = bytes(1 << 20)
for _ in range(int(sys.argv[2])):
    connection.sendall(block)
"""


def _stream(lab: Lab, source: int, target: int, num_mib: int) -> float:
    """Send over TCP from node to node; returns bytes per second at the receiver."""
    receiver = lab.popen([*PYTHON, _RECEIVE], node=target, stdout=subprocess.PIPE)
    assert receiver.stdout.readline() == b"up\n"
    lab.exec(source, [*PYTHON, _SEND, f"node{target}", str(num_mib)])
    total, seconds = receiver.communicate(timeout=60)[0].split()
    receiver.close()
    assert int(total) == num_mib << 20
    return int(total) / float(seconds)


@needs_lab
def test_rate_is_reached_and_never_passed(lab: Lab) -> None:
    num_bytes = 96 << 20
    before = lab.counters()
    rate = _stream(lab, 0, 1, num_bytes >> 20)
    # What 1gbit leaves for TCP payload: 1448 of 1514 bytes of every frame.
    line = 125e6 * 1448 / 1514
    print(f"\n1gbit link: {rate / 1e6:.1f} MB/s, {rate / line:.3f} of the line rate")
    # The bucket's burst leaves early; all else passes at the rate, however slow we are.
    assert rate < 125e6 * num_bytes / (num_bytes - lab.spec.link_burst)
    after = lab.counters()
    sent, received, other = (
        after[node][key] - before[node][key]
        for node, key in ((0, "tx_bytes"), (1, "rx_bytes"), (2, "rx_bytes"))
    )
    assert num_bytes < sent < 1.1 * num_bytes
    assert num_bytes < received < 1.1 * num_bytes
    assert other < 0.01 * num_bytes


@needs_lab
@pytest.mark.parametrize(("source", "target"), [(2, 1), (1, 2)])
def test_slow_node_is_slow_both_ways(lab: Lab, source: int, target: int) -> None:
    lab.set_rate(2, "80mbit")
    try:
        rate = _stream(lab, source, target, 4)
    finally:
        lab.set_rate(2, "1gbit")
    # 80 mbit are 10 MB/s, and 128 KiB of the 4 MiB may leave early.
    assert rate < 10e6 * 4096 / (4096 - 128)


@needs_lab
def test_unshaped_links() -> None:
    with Lab([1, 1]) as lab:
        _stream(lab, 0, 1, 16)
        lab.set_rate(0, None)
        lab.set_rate(0, "100gbit")
        lab.set_rate(0, None)
        _stream(lab, 1, 0, 16)
        with pytest.raises(ValueError, match="rate: got"):
            lab.set_rate(0, "quick")


@needs_lab
def test_link_down_and_up(lab: Lab) -> None:
    def carrier() -> str:
        path = "/sys/class/net/eth0/carrier"
        return lab.exec(1, [*PYTHON, f"print(open('{path}').read())"]).stdout.strip()

    assert carrier() == "1"
    lab.set_link(1, up=False)
    try:
        assert carrier() == "0"
        receiver = lab.popen([*PYTHON, _RECEIVE], node=1, stdout=subprocess.PIPE)
        assert receiver.stdout.readline() == b"up\n"
        failing = _SEND.replace("timeout=20", "timeout=0.5")
        done = lab.exec(0, [*PYTHON, failing, "node1", "1"], check=False)
        assert done.returncode != 0
        receiver.kill()
        receiver.wait(timeout=30)
        receiver.close()
    finally:
        lab.set_link(1, up=True)
    assert carrier() == "1"
    _stream(lab, 0, 1, 1)


@needs_lab
@pytest.mark.skipif(shutil.which("nft") is None, reason="nftables is not installed")
def test_packets_dropped_by_nftables(lab: Lab) -> None:
    chain = "{ type filter hook input priority 0; }"
    drop = f"add table ip t; add chain ip t c {chain}; add rule ip t c tcp drop"
    drop = drop.replace("tcp drop", "tcp dport 5000 drop")
    lab.exec(1, ["nft", drop])
    try:
        failing = _SEND.replace("timeout=20", "timeout=0.5")
        done = lab.exec(0, [*PYTHON, failing, "node1", "1"], check=False)
        assert "timed out" in done.stderr
    finally:
        lab.exec(1, ["nft", "delete table ip t"])
    _stream(lab, 0, 1, 1)
