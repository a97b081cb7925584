# SPDX-License-Identifier: Apache-2.0
"""What each rank posted last: reads the dumps of flight recorders, ``automoe trace``.

The dumps are those that torch's own recorder writes (``DebugInfoWriter``, version 2.x)
and the backend's (``csrc/process_group/flight_recorder.hpp``), one file per rank.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import pickle
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Their ranks give every tensor the same shape.
_SAME_SHAPES = {
    *("all_reduce", "allreduce", "allreduce_coalesced", "broadcast", "reduce"),
    *("all_gather", "_all_gather_base", "all_gather_into_tensor", "reduce_scatter"),
    *("_reduce_scatter_base", "reduce_scatter_tensor"),
}


class _PlainUnpickler(pickle.Unpickler):
    """Loads numbers, texts, lists and dicts; a file that asks for more is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@dataclass(frozen=True)
class Operation:
    """One entry of a recorder.

    Attributes:
        sequence: number among the group's collectives, or among what the rank has sent
            and received in it.
        name: such as ``automoe:all_reduce``, ``automoe:send 0->1``.
        state: "pending", "completed", "failed", or "ended" where the recorder does not
            tell how.
        shapes: of the inputs.
        dtypes: of the inputs.
        place: ``file:line function`` of the innermost call outside torch; "" if none.
        created_ns: time of the call, since the epoch.
    """

    sequence: int
    name: str
    state: str
    shapes: list[list[int]]
    dtypes: list[str]
    place: str
    created_ns: int

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) or "()" for shape in self.shapes)
        types = " ".join(dict.fromkeys(self.dtypes))
        what = f"#{self.sequence} {self.name} {shapes} {types}".rstrip()
        return f"{what}, {self.state}" + (f", at {self.place}" if self.place else "")


@dataclass
class Part:
    """What one rank recorded of one group, the oldest first."""

    description: str = "undefined"
    collectives: list[Operation] = field(default_factory=list)
    point_to_point: list[Operation] = field(default_factory=list)


@dataclass
class Trace:
    """The dump of one rank.

    Attributes:
        rank: global rank.
        parts: by name of the group.
        groups: by name: the global ranks, as far as they were recorded.
        wrapped: older entries have been dropped.
    """

    rank: int
    parts: dict[str, Part]
    groups: dict[str, list[int]]
    wrapped: bool


@dataclass
class Finding:
    """The first collective of a group that did not end well on all ranks.

    Attributes:
        kind: "not posted" by some ranks, "different" operations or shapes under one
            number, or "not ended" though all have posted it.
        sequence: its number in the group.
        operations: by global rank, of those that posted it.
        missing: global ranks whose dump does not have it.
    """

    kind: str
    sequence: int
    operations: dict[int, Operation]
    missing: list[int]


@dataclass
class GroupReport:
    """One process group over all dumps.

    Attributes:
        name: as c10d calls it.
        description: such as ``default_pg``.
        ranks: its global ranks.
        without_dump: those of which no dump was given.
        unknown: those whose recorder has dropped all that they posted in this group.
        last_posted: by global rank; None: nothing.
        last_ended: by global rank; None: nothing.
        pending_point_to_point: sends and receives that have not ended, by global rank.
        finding: None: all that was posted has ended.
    """

    name: str
    description: str
    ranks: list[int]
    without_dump: list[int]
    unknown: list[int]
    last_posted: dict[int, Operation | None]
    last_ended: dict[int, Operation | None]
    pending_point_to_point: dict[int, list[Operation]]
    finding: Finding | None


# ---- reading ----


def dump(stack_traces: bool = True, only_active: bool = False) -> bytes:
    """Return what the backend recorded in this process, as its files hold it.

    Args:
        stack_traces: with the Python stack of each call.
        only_active: without what has completed.
    """
    from torch_automoe import _loader

    return _loader.load().dump_flight_record(stack_traces, only_active)


def read_trace(path: str | Path) -> Trace:
    """Read the dump of one rank, which the last digits of the file's name tell.

    Raises:
        ValueError: it is no dump, or its name tells no rank.
        OSError: it cannot be read.
    """
    path = Path(path)
    digits = re.search(r"(\d+)(\.\w+)?$", path.name)
    if digits is None:
        raise ValueError(
            f"{path}: expected a name that ends in the rank, such as trace_rank_3"
        )
    content = path.read_bytes()
    try:
        if content[:1] == b"{":
            dump = json.loads(content)
        else:
            dump = _PlainUnpickler(io.BytesIO(content)).load()
        if not isinstance(dump, dict):
            raise TypeError(f"it holds a {type(dump).__name__}")
        return _make_trace(int(digits[1]), dump)
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError) as e:
        raise ValueError(
            f"{path} is no dump of a flight recorder ({type(e).__name__}: {e}); "
            "expected a file that DebugInfoWriter or _dump_fr_trace_json wrote"
        ) from e


def _make_trace(rank: int, dump: dict[str, Any]) -> Trace:
    """Sort the entries of a loaded dump by group."""
    # Only the backend's recorder tells a failure from a good end.
    tells = dump.get("comm_lib_version") == "automoe"
    parts: dict[str, Part] = {}
    entries = dump.get("entries", [])
    for entry in entries:
        name, description = entry["process_group"]
        part = parts.setdefault(name, Part(description))
        operation = _operation(entry, tells)
        (part.point_to_point if entry["is_p2p"] else part.collectives).append(operation)
    groups = {
        name: list(ast.literal_eval(config["ranks"]))
        for name, config in dump["pg_config"].items()
    }
    wrapped = bool(entries) and entries[0]["record_id"] > 0
    return Trace(rank, parts, groups, wrapped)


def _operation(entry: dict[str, Any], tells: bool) -> Operation:
    state = "pending"
    if entry["state"] == "completed":
        state = "completed"
    elif entry["retired"]:
        state = "failed" if tells else "ended"
    return Operation(
        sequence=entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"],
        name=entry["profiling_name"],
        state=state,
        shapes=entry["input_sizes"],
        dtypes=entry["input_dtypes"],
        place=_place(entry.get("frames", [])),
        created_ns=entry["time_created_ns"],
    )


def _place(frames: list[dict[str, Any]]) -> str:
    """Return the innermost frame of the user's own code."""
    for frame in frames:
        parts = Path(frame["filename"]).parts
        if (
            parts
            and parts[-1].endswith(".py")
            and not {"torch", __package__} & {*parts}
        ):
            return f"{parts[-1]}:{frame['line']} {frame['name']}"
    return ""


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return files, and for folders those in them whose name ends in a number."""
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir()) if path.is_dir() else []
        found += [p for p in inside if re.search(r"\d(\.json)?$", p.name)]
        if not path.is_dir():
            found.append(path)
    return found


# ---- comparing ----


def compare(traces: Sequence[Trace]) -> list[GroupReport]:
    """Compare what the ranks have posted in each group that was used at all.

    Raises:
        ValueError: two dumps are of the same rank.
    """
    by_rank: dict[int, Trace] = {}
    for trace in traces:
        if by_rank.setdefault(trace.rank, trace) is not trace:
            raise ValueError(
                f"got two dumps of rank {trace.rank}, expected one of each"
            )
    names = dict.fromkeys(name for trace in traces for name in trace.parts)
    return [_compare_group(name, by_rank) for name in names]


def _compare_group(name: str, by_rank: dict[int, Trace]) -> GroupReport:
    having = [trace for trace in by_rank.values() if name in trace.parts]
    known = [trace.groups[name] for trace in having if name in trace.groups]
    ranks = sorted(known[0] if known else (trace.rank for trace in having))
    parts = {r: by_rank[r].parts.get(name, Part()) for r in ranks if r in by_rank}
    unknown = [r for r in parts if by_rank[r].wrapped and not parts[r].collectives]
    ended = {
        rank: [op for op in part.collectives if op.state != "pending"]
        for rank, part in parts.items()
    }
    return GroupReport(
        name=name,
        description=having[0].parts[name].description,
        ranks=ranks,
        without_dump=[r for r in ranks if r not in by_rank],
        unknown=unknown,
        last_posted={
            r: part.collectives[-1] if part.collectives else None
            for r, part in parts.items()
        },
        last_ended={r: ops[-1] if ops else None for r, ops in ended.items()},
        pending_point_to_point={
            r: waiting
            for r, part in parts.items()
            if (waiting := [op for op in part.point_to_point if op.state == "pending"])
        },
        finding=_find(
            {r: part.collectives for r, part in parts.items() if r not in unknown}
        ),
    )


def _find(collectives: dict[int, list[Operation]]) -> Finding | None:
    """Return the first collective that did not end well on all ranks."""
    by_number = {
        rank: {op.sequence: op for op in operations}
        for rank, operations in collectives.items()
    }
    # Where recorders have dropped entries, begin with what all of them still have.
    starts = [min(numbers) for numbers in by_number.values() if numbers]
    if not starts:
        return None
    every = {number for numbers in by_number.values() for number in numbers}
    for sequence in sorted(number for number in every if number >= max(starts)):
        posted = {r: ops[sequence] for r, ops in by_number.items() if sequence in ops}
        missing = [rank for rank in by_number if rank not in posted]
        if missing:
            return Finding("not posted", sequence, posted, missing)
        if len({_signature(op) for op in posted.values()}) > 1:
            return Finding("different", sequence, posted, [])
        if any(op.state in ("pending", "failed") for op in posted.values()):
            return Finding("not ended", sequence, posted, [])
    return None


def _signature(operation: Operation) -> tuple[object, ...]:
    """Return what has to be the same on all ranks."""
    name = operation.name.rpartition(":")[2]
    if name in _SAME_SHAPES:
        return (name, str(operation.shapes), str(operation.dtypes))
    return (name,)


# ---- showing ----


def render(reports: Sequence[GroupReport]) -> str:
    """Return the reports as text for people."""
    lines = []
    for report in reports:
        lines.append(
            f"group {report.name} ({report.description}), ranks {_ranks(report.ranks)}"
        )
        if report.without_dump:
            lines.append(f"  no dump of rank {_ranks(report.without_dump)}")
        if report.unknown:
            lines.append(
                f"  dropped by the recorder of rank {_ranks(report.unknown)}: "
                "set TORCH_FR_BUFFER_SIZE higher"
            )
        for rank, posted in report.last_posted.items():
            ended = report.last_ended[rank]
            shown = f"#{ended.sequence}" if ended else "none"
            lines.append(
                f"  rank {rank}: last ended {shown}, last posted {posted or 'none'}"
            )
        for rank, waiting in report.pending_point_to_point.items():
            lines += [f"  rank {rank} waits for {operation}" for operation in waiting]
        lines += [f"  {line}" for line in _render_finding(report.finding)]
    return "\n".join(lines)


def _render_finding(finding: Finding | None) -> list[str]:
    if finding is None:
        return ["every collective that was posted has ended on all ranks"]
    number, posted = finding.sequence, finding.operations
    first = next(iter(posted.values()))
    if finding.kind == "not posted":
        line = (
            f"collective #{number}, {first.name}, was posted by rank "
            f"{_ranks(posted)}, but not by rank {_ranks(finding.missing)}"
        )
    elif finding.kind == "different":
        line = f"collective #{number} is not the same on all ranks"
    else:
        open_ranks = [r for r, op in posted.items() if op.state != "completed"]
        line = (
            f"collective #{number}, {first.name}, was posted by all ranks and did not "
            f"end well on rank {_ranks(open_ranks)}"
        )
    by_text: dict[str, list[int]] = {}
    for rank, operation in posted.items():
        by_text.setdefault(str(operation), []).append(rank)
    return [
        line,
        *(f"  rank {_ranks(ranks)}: {text}" for text, ranks in by_text.items()),
    ]


def _ranks(ranks: Iterable[int]) -> str:
    """Return ranks as ``0-3, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``automoe trace`` to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "A dump is written where a group fails, if a file is named before the start:\n"
        "  export TORCH_FR_DUMP_TEMP_FILE=/tmp/trace_rank_   # the rank is appended\n"
        "then: automoe trace /tmp/trace_rank_*"
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="FILE",
        help="dump of one rank, pickle or JSON, or a folder of such",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of text"
    )


def run(args: argparse.Namespace) -> int:
    """Print where each rank stands in each group; return 2 where no dump is read."""
    try:
        files = find_files(args.paths)
        if not files:
            raise ValueError(f"got {', '.join(args.paths)} without any dump in it")
        reports = compare([read_trace(path) for path in files])
    except (OSError, ValueError) as error:
        print(f"automoe trace: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"groups": [asdict(report) for report in reports]}, indent=2))
    else:
        print(render(reports))
    return 0
