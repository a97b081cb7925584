# SPDX-License-Identifier: Apache-2.0
"""Jobs in the laboratory: output, ends, and that nothing is left behind."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_processes import (
    ENVIRONMENT,
    PYTHON,
    await_condition,
    needs_lab,
    processes_with,
)

from torch_automoe.lab import (
    Lab,
    LabError,
    Loopback,
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three nodes, 1gbit."""
    with Lab([2, 1, 1], rate="1gbit") as lab:
        yield lab


# ---- Jobs


@needs_lab
def test_ranks_get_the_environment_of_torchrun(
    lab: Lab, capfd: pytest.CaptureFixture
) -> None:
    names = (
        "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK "
        "GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT "
        "OMP_NUM_THREADS HOSTNAME TORCHELASTIC_RUN_ID"
    )
    show = "echo " + " ".join(f"${{{name}:--}}" for name in names.split())
    env = {"PATH": os.environ["PATH"], "TORCHELASTIC_RUN_ID": "stale"}
    assert lab.run(["sh", "-c", show], env=env) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "[node0 rank0] 0 4 0 2 0 0 3 0 4 10.77.0.1 29500 1 node0 -",
        "[node0 rank1] 1 4 1 2 0 0 3 1 4 10.77.0.1 29500 1 node0 -",
        "[node1 rank2] 2 4 0 1 1 1 3 2 4 10.77.0.1 29500 1 node1 -",
        "[node2 rank3] 3 4 0 1 2 2 3 3 4 10.77.0.1 29500 1 node2 -",
    ]


@needs_lab
def test_lines_stay_whole(lab: Lab) -> None:
    script = (
        "import os, sys\n"
        "for i in range(500):\n"
        "    for part in (f'{os.environ['RANK']}:{i}:', 'x' * 100, '\\n'):\n"
        "        os.write(1, part.encode())\n"
        "os.write(2, b'10%\\r20%\\r\\nlast')\n"
    ).replace("os.environ['RANK']", 'os.environ["RANK"]')
    lines: list[tuple[int, str, bytes]] = []
    job = lab.launch(
        [*PYTHON, script],
        on_line=lambda member, *line: lines.append((member.index, *line)),
    )
    with job:
        assert job.wait(timeout=60) == 0
    for rank in range(4):
        out = [line for r, stream, line in lines if (r, stream) == (rank, "stdout")]
        assert out == [f"{rank}:{i}:{'x' * 100}".encode() for i in range(500)]
        errors = [line for r, stream, line in lines if (r, stream) == (rank, "stderr")]
        assert errors == [b"10%", b"20%", b"last"]


@needs_lab
@pytest.mark.parametrize(
    ("end", "code", "text"),
    [
        ("exit 7", 7, "node1 rank2 .* exited with code 7"),
        ("kill -9 $$", 137, "node1 rank2 .* was killed by SIGKILL"),
        ("exit 0", 0, None),
    ],
)
def test_job_ends_with_the_code_of_the_rank_that_failed(
    lab: Lab, end: str, code: int, text: str | None
) -> None:
    events: list[str] = []
    others = "exec sleep 1000" if code else "exit 0"
    script = f"if [ $RANK = 2 ]; then {end}; else {others}; fi"
    job = lab.launch(["sh", "-c", script], on_event=events.append, linger=0)
    with job:
        assert job.wait(timeout=60) == code
    assert len(events) == (1 if text else 0)
    assert text is None or re.search(text, events[0])
    assert job.rank_pids == lab.rank_pids


@needs_lab
def test_ranks_that_ignore_sigterm_are_killed(lab: Lab) -> None:
    events: list[str] = []
    lines: list[bytes] = []
    script = "[ $RANK = 0 ] || trap '' TERM; echo ready; while :; do sleep 0.1; done"
    job = lab.launch(
        ["sh", "-c", script],
        on_line=lambda member, stream, line: lines.append(line),
        on_event=events.append,
        linger=0,
        grace=0.3,
    )
    with job:
        await_condition(lambda: job.poll(0.01) or len(lines) == 4, "all ranks run")
        os.kill(job.rank_pids[0], signal.SIGKILL)
        assert job.wait(timeout=60) == 137
    late = "node0 rank1, node1 rank2, node2 rank3"
    assert events[1] == f"killing what did not stop in time: {late}"


@needs_lab
def test_others_may_say_why_they_fail(lab: Lab, tmp_path: Path) -> None:
    lines: list[bytes] = []
    noticed = tmp_path / "noticed"
    wait = f"while [ ! -e {noticed} ]; do sleep 0.02; done"
    script = f"[ $RANK = 0 ] && exit 5; {wait}; echo rank 0 is gone; exit 6"
    job = lab.launch(
        ["sh", "-c", script],
        on_line=lambda member, stream, line: lines.append(line),
        on_event=lambda text: noticed.touch(),
        linger=30,
    )
    with job:
        assert job.wait(timeout=60) == 5
    assert lines == [b"rank 0 is gone"] * 3


@needs_lab
def test_what_a_rank_leaves_behind_ends_with_it(lab: Lab) -> None:
    mark = f"rest-{uuid.uuid4()}"
    leave = f"sh -c 'sleep 1000; : {mark}' & sleep 0.1"
    assert lab.run(["sh", "-c", leave]) == 0
    await_condition(lambda: not processes_with(mark), "children are gone")


@needs_lab
def test_a_node_that_dies_fails_the_job() -> None:
    events: list[str] = []
    with Lab([1, 2]) as lab:
        with lab.launch(["sleep", "1000"], on_event=events.append, linger=0) as job:
            os.kill(lab.node_pids[1], signal.SIGKILL)
            assert job.wait(timeout=60) == 137
        assert re.search("node1 rank. .* was killed by SIGKILL", events[0])
        with pytest.raises(LabError, match="node 1 has ended"):
            lab.exec(1, ["true"])
        assert lab.exec(0, ["echo", "alive"]).stdout == "alive\n"


def test_loopback_runs_the_same_jobs(capfd: pytest.CaptureFixture) -> None:
    with Loopback([2, 1]) as nodes:
        show = "echo $RANK $LOCAL_RANK $NODE_RANK $AUTOMOE_NODE"
        job = nodes.launch(["sh", "-c", f"{show}; test $RANK != 1"], linger=30)
        with job:
            assert job.wait(timeout=60) == 1
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "[node0 rank0] 0 0 0 node0",
        "[node0 rank1] 1 1 0 node0",
        "[node1 rank2] 2 0 1 node1",
    ]


def test_loopback_keeps_the_port_of_rank_0() -> None:
    with Loopback([2]) as nodes:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(nodes.master)
        for _ in range(2):  # jobs one after another
            with (
                socket.create_server(nodes.master) as server,
                socket.create_connection(nodes.master),
            ):
                server.accept()[0].close()
    with Loopback([2]) as nodes:
        pass
    with socket.socket() as other:
        other.bind(nodes.master)


# ---- Nothing is left


def _host_state() -> tuple[list[str], str]:
    mounts = Path("/proc/self/mountinfo").read_text()
    return sorted(os.listdir("/sys/class/net")), mounts


@needs_lab
def test_close_ends_everything_and_leaves_the_host_as_it_was() -> None:
    before = _host_state()
    mark = f"daemon-{uuid.uuid4()}"
    with Lab([1, 1], rate="1gbit") as lab:
        daemon = f"setsid sh -c 'sleep 1000; : {mark}' >/dev/null 2>&1 &"
        lab.exec(1, ["sh", "-c", daemon])
        await_condition(lambda: processes_with(mark), "the daemon runs")
        assert _host_state() == before
        node_pids = lab.node_pids
    assert not processes_with(mark)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in node_pids)
    assert _host_state() == before
    with pytest.raises(LabError, match="not running"):
        lab.exec(0, ["true"])


@needs_lab
def test_killed_supervisor_ends_everything() -> None:
    lab = Lab([1, 1]).start()
    sleeper = lab.popen(["sleep", "1000"], node=1)
    supervisor = int(Path(f"/proc/{lab.node_pids[0]}/stat").read_text().split()[3])
    os.kill(supervisor, signal.SIGKILL)
    assert sleeper.wait(timeout=30) == -signal.SIGKILL
    with pytest.raises(LabError, match="has ended"):
        lab.counters()
    sleeper.close()
    lab.close()


@needs_lab
def test_many_laboratories_leak_no_descriptors() -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    with Lab([1]) as lab:
        lab.run(["true"])
    # What earlier tests left to the garbage collector must not be counted.
    gc.collect()
    before = num_open()
    for _ in range(5):
        with Lab([1, 1]) as lab:
            assert lab.run(["true"]) == 0
            lab.exec(0, ["true"])
    assert num_open() == before


@needs_lab
def test_the_documented_example_runs() -> None:
    text = Path(__file__).parents[1].joinpath("docs", "lab.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "[node1 rank3] rank 3 on node1" in done.stdout
    assert "10.77.0.2 node1" in done.stdout
    assert "node1 rank3" in done.stdout.splitlines()[-1]
