# SPDX-License-Identifier: Apache-2.0
"""``automoe lab``: what it runs, how it ends, and with which privileges."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from lab_processes import (
    ENVIRONMENT,
    alive,
    await_condition,
    descendants,
    lab_command,
    needs_lab,
    run_cli,
)

# ---- The command line


@needs_lab
def test_command_runs_script_module_and_program(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint(os.environ['RANK'], *sys.argv[1:])\n")
    code, out, err = run_cli("--nodes", "2,1", "--", str(script), "--flag", "--", "x")
    assert (code, sorted(out.splitlines())) == (
        0,
        [f"[node{n} rank{r}] {r} --flag -- x" for n, r in ((0, 0), (0, 1), (1, 2))],
    )
    assert "2 nodes with 2+1 ranks, links unshaped" in err
    code, out, _ = run_cli("--nodes", "1,1", "--no-prefix", "-m", "platform", "--terse")
    assert code == 0
    assert len(out.splitlines()) == 2
    # So that rank 0 is first: both write when they like.
    show = "test $RANK = 0 || sleep 2; hostname"
    code, out, err = run_cli(
        *("--nodes", "1,1", "--rate", "1gbit", "--counters", "--exec", "--"),
        *("sh", "-c", show),
    )
    assert (code, out.splitlines()[:1][0][:6]) == (0, "[node0")
    assert "node1" in out.splitlines()[-1]
    assert "links 1gbit both ways" in err


@needs_lab
def test_command_reports_failure_and_wrong_usage() -> None:
    code, _, err = run_cli("--nodes", "1,1", "--exec", "--", "sh", "-c", "exit 3")
    assert code == 3
    assert "exited with code 3" in err
    code, _, err = run_cli("--nodes", "1,1", "--exec", "--", "/no-such-program")
    assert (code, "cannot run /no-such-program: No such file" in err) == (1, True)
    for wrong, message in (
        (("--nodes", "2"), "command: got nothing to run"),
        (("--nodes", "x", "--", "a.py"), "nodes: got 'x'"),
        (("--rate", "1gb", "--", "a.py"), "rate: got '1gb'"),
    ):
        code, _, err = run_cli(*wrong)
        assert (code, message in err) == (2, True)


@needs_lab
def test_command_ends_when_its_reader_has_gone() -> None:
    shell = f"{' '.join(lab_command('--exec', '--', 'yes'))} | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr


@needs_lab
def test_command_starts_torchrun_with_uneven_nodes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "names = 'RANK LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK WORLD_SIZE'.split()\n"
        "line = ' '.join(['rank', *(os.environ[name] for name in names)])\n"
        "os.write(1, f'{line}\\n'.encode())\n"
    )
    code, out, err = run_cli("--nodes", "1,2", "--torchrun", "--", str(script))
    assert code == 0, err
    assert sorted(line for line in out.splitlines() if "rank" in line) == [
        "[node0] rank 0 0 1 0 3",
        "[node1] rank 1 0 2 1 3",
        "[node1] rank 2 1 2 1 3",
    ]


# ---- Ends and leftovers


@needs_lab
@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGKILL, -9),
    ],
)
def test_signals_to_the_command_end_everything(
    signum: signal.Signals, code: int
) -> None:
    program = ("sh", "-c", "echo started; sleep 1000; true")
    command = subprocess.Popen(
        lab_command("--nodes", "2", "--no-prefix", "--no-python", "--", *program),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with command:
        for _ in range(4):
            assert command.stdout.readline() == b"started\n"
        # Supervisor, its pid 1, two nodes, four shells, four sleeps.
        await_condition(lambda: len(descendants(command.pid)) == 12, "all sleep")
        started = descendants(command.pid)
        command.send_signal(signum)
        assert command.wait(timeout=60) == code
    await_condition(lambda: not alive(started), "all processes are gone")


# ---- Without privileges


def _can(*command: str) -> bool:
    return shutil.which(command[0]) is not None and (
        subprocess.run(command, capture_output=True).returncode == 0
    )


@needs_lab
@pytest.mark.skipif(
    not _can(
        "setpriv", "--bounding-set", "-sys_admin,-net_admin", "unshare", "-U", "id"
    ),
    reason="no setpriv, or user namespaces are refused",
)
def test_works_in_a_user_namespace() -> None:
    drop = ("setpriv", "--bounding-set", "-sys_admin,-net_admin")
    show = "echo $(cat /proc/self/uid_map) $(hostname) $(ls /sys/class/net)"
    code, out, err = run_cli(
        *("--nodes", "1,1", "--rate", "1gbit", "--exec", "--", "sh", "-c", show),
        before=drop,
    )
    assert code == 0, err
    assert sorted(out.splitlines()) == [
        f"[node{n} rank{n}] 0 {os.geteuid()} 1 node{n} eth0 lo" for n in range(2)
    ]


@pytest.mark.skipif(
    not _can("unshare", "-Ur", "setpriv", "--bounding-set", "-sys_admin", "id"),
    reason="no setpriv, or user namespaces are refused",
)
def test_says_what_to_do_where_namespaces_are_refused() -> None:
    refuse = (
        "echo 0 > /proc/sys/user/max_user_namespaces; "
        'exec setpriv --bounding-set -sys_admin "$@"'
    )
    code, _, err = run_cli(
        *("--exec", "--", "true"), before=("unshare", "-Ur", "sh", "-c", refuse, "sh")
    )
    assert code == 1
    assert "cannot emulate nodes here: unshare(user)" in err
    assert "sysctl user.max_user_namespaces" in err
