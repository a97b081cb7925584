# SPDX-License-Identifier: Apache-2.0
"""Flight recorder: what ranks posted, dumps on failure, and ``automoe trace``."""

from __future__ import annotations

import json
import pickle
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool

from torch_automoe import cli, flight_recorder
from torch_automoe.flight_recorder import compare, read_trace, render


def entry(sequence: int, name: str = "all_reduce", **changes: object) -> dict:
    """One entry as torch's recorder dumps it."""
    values = {
        "record_id": sequence - 1,
        "process_group": ("7", "experts"),
        "collective_seq_id": sequence,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "profiling_name": f"automoe:{name}",
        "state": "completed",
        "retired": True,
        "input_sizes": [[4, 2]],
        "input_dtypes": ["Float"],
        "time_created_ns": 10**9 * sequence,
    }
    return {**values, **changes}


def write_dumps(
    folder: Path, *ranks: list[dict], ranks_of_group: str | None = None
) -> list[Path]:
    """Write one dump per list of entries; returns the files."""
    everyone = ranks_of_group or str(list(range(len(ranks))))
    paths = []
    for rank, entries in enumerate(ranks):
        dump = {
            "version": "2.10",
            "comm_lib_version": "automoe",
            "pg_config": {"7": {"name": "7", "desc": "experts", "ranks": everyone}},
            "entries": entries,
        }
        paths.append(folder / f"trace_rank_{rank}")
        paths[-1].write_bytes(pickle.dumps(dump, protocol=2))
    return paths


def only_report(paths: list[Path]) -> flight_recorder.GroupReport:
    (report,) = compare([read_trace(path) for path in paths])
    return report


# ---- comparing ----


def test_all_is_well(tmp_path: Path) -> None:
    entries = [entry(1), entry(2)]
    report = only_report(write_dumps(tmp_path, entries, entries))
    assert report.finding is None
    assert (report.name, report.description, report.ranks) == ("7", "experts", [0, 1])
    assert report.last_posted[1].sequence == 2
    assert "every collective that was posted has ended" in render([report])


def test_a_rank_that_did_not_call_is_named(tmp_path: Path) -> None:
    waiting = entry(2, "reduce_scatter", state="started", retired=False)
    paths = write_dumps(tmp_path, [entry(1), waiting], [entry(1)], [entry(1), waiting])
    report = only_report(paths)
    assert report.finding.kind == "not posted"
    assert report.finding.sequence == 2
    assert report.finding.missing == [1]
    assert set(report.finding.operations) == {0, 2}
    assert report.last_ended[0].sequence == 1
    text = render([report])
    assert "#2, automoe:reduce_scatter, was posted by rank 0, 2, but not by rank 1" in (
        text
    )


@pytest.mark.parametrize(
    "changes",
    [{"name": "broadcast"}, {"input_sizes": [[5, 2]]}, {"input_dtypes": ["Half"]}],
)
def test_different_operations_under_one_number(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    paths = write_dumps(tmp_path, [entry(1), entry(2)], [entry(1), entry(2, **changes)])
    report = only_report(paths)
    assert (report.finding.kind, report.finding.sequence) == ("different", 2)
    assert "rank 0: #2 automoe:all_reduce 4x2 Float, completed" in render([report])


def test_shapes_may_differ_where_the_operation_lets_them(tmp_path: Path) -> None:
    ranks = [[entry(1, "all_to_all_single", input_sizes=[[n]])] for n in (3, 4)]
    assert only_report(write_dumps(tmp_path, *ranks)).finding is None


@pytest.mark.parametrize(
    ("state", "retired", "shown"),
    [("started", False, "pending"), ("started", True, "failed")],
)
def test_posted_by_all_but_not_ended(
    tmp_path: Path, state: str, retired: bool, shown: str
) -> None:
    late = entry(1, state=state, retired=retired)
    report = only_report(write_dumps(tmp_path, [entry(1)], [late]))
    assert report.finding.kind == "not ended"
    assert report.finding.operations[1].state == shown
    assert "did not end well on rank 1" in render([report])


def test_recorders_that_dropped_entries_are_compared_where_they_overlap(
    tmp_path: Path,
) -> None:
    first, second = [entry(n) for n in range(1, 9)], [entry(n) for n in range(5, 9)]
    assert only_report(write_dumps(tmp_path, first, second)).finding is None
    first[6] = entry(7, "barrier")
    report = only_report(write_dumps(tmp_path, first, second))
    assert report.finding.sequence == 7


def test_a_rank_that_dropped_the_whole_group_is_not_blamed(tmp_path: Path) -> None:
    other = entry(900, process_group=("8", "dense"))
    paths = write_dumps(tmp_path, [entry(1)], [other], ranks_of_group="[0, 1]")
    report = compare([read_trace(path) for path in paths])[0]
    assert (report.unknown, report.finding) == ([1], None)
    assert "TORCH_FR_BUFFER_SIZE" in render([report])


def test_sends_that_wait_and_ranks_without_a_dump_are_shown(tmp_path: Path) -> None:
    send = entry(
        0,
        "send 0->2",
        is_p2p=True,
        p2p_seq_id=3,
        state="started",
        retired=False,
        frames=[
            {"name": "send", "filename": "/lib/torch/distributed/c.py", "line": 9},
            {"name": "step", "filename": "/home/me/train.py", "line": 12},
        ],
    )
    paths = write_dumps(tmp_path, [send], [entry(1)], ranks_of_group="[0, 1, 2]")
    report = only_report(paths)
    assert report.without_dump == [2]
    text = render([report])
    assert "rank 0 waits for #3 automoe:send 0->2 4x2 Float, pending" in text
    assert "at train.py:12 step" in text
    assert "no dump of rank 2" in text


# ---- files ----


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace_rank_0"
    path.write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(ValueError, match="is no dump of a flight recorder .*asks for"):
        read_trace(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"{", b"no pickle", b"\x80\x02N."])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace_rank_0"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="trace_rank_0 is no dump"):
        read_trace(path)


def test_a_name_must_tell_the_rank(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a name that ends in the rank"):
        read_trace(tmp_path / "trace")


def test_two_dumps_of_a_rank_are_refused(tmp_path: Path) -> None:
    (path,) = write_dumps(tmp_path, [entry(1)])
    with pytest.raises(ValueError, match="two dumps of rank 0"):
        compare([read_trace(path), read_trace(path)])


def test_command_reads_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dumps(tmp_path, [entry(1), entry(2, state="started")], [entry(1)])
    (tmp_path / "notes.txt").write_text("not a dump")
    assert cli.main(["trace", str(tmp_path)]) == 0
    assert "but not by rank 1" in capsys.readouterr().out
    assert cli.main(["trace", "--json", str(tmp_path)]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert group["finding"]["missing"] == [1]
    assert group["last_posted"]["0"]["name"] == "automoe:all_reduce"


def test_command_says_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert "without any dump in it" in capsys.readouterr().err
    assert cli.main(["trace", str(tmp_path / "trace_rank_0")]) == 2
    assert "No such file" in capsys.readouterr().err


# ---- dumps of real ranks, one of which does not call ----


def _is_retired(entry: dict) -> bool:
    return entry["retired"] or entry["state"] == "completed"


def dump_while_one_rank_is_away(folder: str, ours: bool) -> None:
    """All ranks call once, then all but rank 1; each writes what it recorded."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = torch.ones(size, 3)
    dist.all_to_all_single(torch.empty_like(rows), rows)
    work = None
    if rank != 1:
        work = dist.all_to_all_single(torch.empty_like(rows), rows, async_op=True)
    dump = flight_recorder.dump if ours else torch._C._distributed_c10d._dump_fr_trace
    # The recorder hears of an end after the caller does, on a thread of its own.
    while (content := dump()) and not _is_retired(pickle.loads(content)["entries"][0]):
        time.sleep(0.01)
    Path(folder, f"trace_rank_{rank}").write_bytes(content)
    # A barrier would be a collective too.
    while len(list(Path(folder).glob("trace_rank_*"))) < size:
        time.sleep(0.01)
    if work is None:
        dist.all_to_all_single(torch.empty_like(rows), rows)
    else:
        work.wait()


def check_that_rank_1_is_away(folder: Path) -> None:
    paths = flight_recorder.find_files([folder])
    (report,) = compare([read_trace(path) for path in paths])
    assert report.finding.kind == "not posted"
    assert report.finding.missing == [1]
    assert report.finding.operations[0].state == "pending"
    assert f"at {Path(__file__).name}:" in str(report.finding.operations[0])
    assert report.last_ended[1].sequence == report.finding.sequence - 1


@pytest.mark.parametrize(
    "rank_pool", [{"nodes": [2], "backend": "gloo"}], indirect=True
)
def test_dumps_of_torch_itself_are_read(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(dump_while_one_rank_is_away, str(tmp_path), False)
    check_that_rank_1_is_away(tmp_path)


def record_operations(capacity: int) -> list[dict]:
    """Fill the recorder beyond what it keeps; return its entries."""
    size = dist.get_world_size()
    rows = torch.ones(size, 3, dtype=torch.bfloat16)
    for _ in range(capacity + 3):
        dist.all_to_all_single(torch.empty_like(rows), rows)
    return pickle.loads(flight_recorder.dump())["entries"]


@pytest.mark.parametrize(
    "rank_pool", [{"nodes": [2], "env": {"TORCH_FR_BUFFER_SIZE": "8"}}], indirect=True
)
def test_the_backend_records(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(dump_while_one_rank_is_away, str(tmp_path), True)
    check_that_rank_1_is_away(tmp_path)
    check_that_torch_reads(tmp_path)
    for entries in rank_pool.run(record_operations, 8):
        assert len(entries) == 8
        last = entries[-1]
        assert last["record_id"] == entries[0]["record_id"] + 7
        assert last["state"] == "completed"
        assert last["retired"]
        assert last["duration_ms"] > 0
        assert last["profiling_name"].startswith("automoe:all_to_all")
        assert (last["input_sizes"], last["input_dtypes"]) == ([[2, 3]], ["BFloat16"])
        assert any(f["name"] == "record_operations" for f in last["frames"])


def check_that_torch_reads(folder: Path) -> None:
    """torch's analyser takes our files, but for its list of known backends."""
    from torch.distributed.flight_recorder.components.builder import build_db
    from torch.distributed.flight_recorder.components.config_manager import JobConfig
    from torch.distributed.flight_recorder.components.loader import read_dir

    args = JobConfig().parse_args([str(folder)])
    details, version = read_dir(args)
    for detail in details.values():
        for one in detail["entries"]:
            one["profiling_name"] = one["profiling_name"].replace("automoe:", "gloo:")
    database = build_db(details, args, version)
    assert [call.missing_ranks for call in database.collectives][-1] == {1}


def fail_while_one_rank_is_away(folder: str) -> str:
    """Rank 1 calls only when rank 0 has given up, and learns of the failure then."""
    rank = dist.get_rank()
    rows = torch.ones(dist.get_world_size(), 3)
    dist.all_to_all_single(torch.empty_like(rows), rows)
    backend = dist.group.WORLD._get_backend(rows.device)
    backend.set_timeout(timedelta(seconds=2))
    given_up = Path(folder, "given up")
    while rank == 1 and not given_up.exists():
        time.sleep(0.01)
    error = ""
    try:
        dist.all_to_all_single(torch.empty_like(rows), rows)
    except dist.DistBackendError as caught:
        error = str(caught)
    given_up.touch()
    return error


@pytest.mark.parametrize("wanted", [True, False])
def test_a_failure_is_dumped_where_that_is_asked_for(
    tmp_path: Path, wanted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    env = {"TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "trace_rank_")}
    if not wanted:
        env["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
    with RankPool([2], env=env) as pool:
        errors = pool.run(fail_while_one_rank_is_away, str(tmp_path))
    assert all(errors), errors
    written = sorted(path.name for path in tmp_path.glob("trace_rank_*"))
    assert written == (["trace_rank_0", "trace_rank_1"] if wanted else [])
    if wanted:
        assert cli.main(["trace", str(tmp_path)]) == 0
        assert re.search(
            r"was posted by rank 0, but not by rank 1", capsys.readouterr().out
        )


def dumped_without_a_recorder() -> list[dict]:
    """Exchange once; returns the entries, of which there are none."""
    rows = torch.ones(dist.get_world_size(), 3)
    dist.all_to_all_single(torch.empty_like(rows), rows)
    return pickle.loads(flight_recorder.dump())["entries"]


@pytest.mark.parametrize(
    "rank_pool", [{"nodes": [2], "env": {"TORCH_FR_BUFFER_SIZE": "0"}}], indirect=True
)
def test_recording_can_be_switched_off(rank_pool: RankPool) -> None:
    assert rank_pool.run(dumped_without_a_recorder) == [[], []]
