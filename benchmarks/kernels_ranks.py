# SPDX-License-Identifier: Apache-2.0
"""Starts ranks that share a device for kernels_bench.py, and brings back their rows."""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import kernels_hops as hops
import kernels_overlap as overlap
import torch
import torch.distributed as dist
import torch.multiprocessing
from kernels_report import make_row
from kernels_row import Row
from kernels_timing import Contest
from torch import Tensor

import torch_automoe as automoe
from torch_automoe import _loader

_LAUNCH_TOKENS = 16
_DIRECT = "CUDA tensors go between the GPUs themselves"
Found = tuple[list[Row], list[str]]


def measure(options: argparse.Namespace) -> Found:
    """Rows, and what was not measured, of all parts that need ranks.

    Each part has ranks of its own, so that a failure is of that part alone.
    """
    rows: list[Row] = []
    notes: list[str] = []
    for part in _PARTS:
        if getattr(options, part):
            more_rows, more_notes = _measure_part(part, options)
            rows += more_rows
            notes += more_notes
    return rows, notes


def count_ranks(part: str, options: argparse.Namespace) -> int:
    """As many as were asked for; else those that a part needs at least."""
    return options.ranks or max(_PARTS[part].least_ranks, options.nodes)


def _measure_part(part: str, options: argparse.Namespace) -> Found:
    size = count_ranks(part, options)
    if options.nodes > 1 and options.device == "cuda":
        why = hops.why_no_nccl(torch.device("cuda"), size)
        if why is not None:
            return [], [f"{part} between nodes, {why}"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(
                _be_rank, (options, part, size, folder), nprocs=size
            )
        except (
            torch.multiprocessing.ProcessRaisedException,
            torch.multiprocessing.ProcessExitedException,
        ) as error:
            last = str(error).strip().splitlines()[-1]
            return [], [f"{part}: needs ranks that do not end with: {last}"]
        return pickle.loads(Path(folder, "found").read_bytes())


@dataclass
class Rank:
    """What a rank measures with, and what it has found."""

    part: str
    options: argparse.Namespace
    device: torch.device
    contest: Contest
    group: dist.ProcessGroup
    fp8_group: dist.ProcessGroup | None = None
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def draw(self, tokens: int, hidden: int) -> tuple[Tensor, Tensor, automoe.Plan]:
        """x, ids and a plan of this rank, with other values on each."""
        options = self.options
        generator = torch.Generator().manual_seed(dist.get_rank())
        noise = torch.rand((tokens, options.experts), generator=generator)
        ids = noise.argsort(dim=1)[:, : options.topk].to(self.device)
        x = torch.randn((tokens, hidden), generator=generator)
        x = x.bfloat16().to(self.device)
        plan = automoe.plan(ids, num_experts=options.experts, group=self.group)
        return x, ids, plan

    def add(
        self,
        job: str,
        contender: str,
        hidden: int,
        times: list[float],
        moved: int | None = None,
        **more: object,
    ) -> None:
        """Add a row of all ranks; ``wrong`` is that of this rank. Collective."""
        wrong = sum_of_ranks(int(more.pop("wrong", 0)))
        self.rows.append(
            make_row(
                self.part, job, contender, hidden, moved, times, wrong=wrong,
                ranks=dist.get_world_size(),
                nodes=automoe.topology(self.group).num_nodes, **more,
            )
        )  # fmt: skip


def sum_of_ranks(count: int) -> int:
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


def count_off(result: Tensor, expected: Tensor) -> int:
    """Elements of sums that are rounded at every step, and are not what they must be:
    off by more than 1/16 of the largest."""
    if not expected.numel():
        return 0
    allowed = float(expected.abs().max()) / 16
    off = (result.float() - expected.float()).abs()
    return int((~(off <= allowed)).sum())  # NaN too


def _be_rank(
    rank: int, options: argparse.Namespace, part: str, size: int, folder: str
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    if options.nodes > 1:
        os.environ["AUTOMOE_NODE"] = f"node{rank * options.nodes // size}"
    torch.set_num_threads(1)
    device = torch.device(options.device)
    if device.type == "cuda":
        if size > torch.cuda.device_count():
            # NVLink's multicast needs a GPU for each rank.
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = dist.FileStore(str(Path(folder, "store")), size)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    me = Rank(
        part,
        options,
        device,
        Contest(device, options.iters, options.warmup, options.flush_bytes),
        make_group(options),
    )
    for hidden in options.hidden:
        _PARTS[part].run(me, hidden)
    note_staging(me, me.group)
    if rank == 0:
        found = me.rows, list(dict.fromkeys(me.notes))
        Path(folder, "found").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def make_group(options: argparse.Namespace, wire: str = "exact") -> dist.ProcessGroup:
    """A group of ours of all ranks. Collective."""
    of_group = automoe.Options(wire=wire, max_ctas=options.max_ctas)
    return dist.new_group(backend="automoe", pg_options=of_group)


def note_staging(me: Rank, group: dist.ProcessGroup) -> None:
    """Say so where rows have gone through the host."""
    if me.device.type == "cuda":
        used = _loader.load().describe_device_group(group.group_name)
        if _DIRECT not in used:
            me.notes.append(
                f"{me.part}, GPU to GPU: needs what this machine lacks, and the rows "
                f"of it are of the way through the host: {used.splitlines()[-1]}"
            )


def _run_hops(me: Rank, hidden: int) -> None:
    x, ids, plan = me.draw(me.options.tokens, hidden)
    expanded = hops.Expanded(x, ids, me.options.experts)
    peers = hops.make_peers(expanded, me.notes)
    # Rows of this rank's experts, in their order and in that of an all-to-all.
    received = automoe.dispatch(x, None, plan)[0]
    by_source = torch.empty_like(received)
    by_source[expanded.by_expert] = received
    summed = x.float() * me.options.topk  # every expert gives back what it got
    jobs = {
        "dispatch": {
            "automoe": lambda: automoe.dispatch(x, None, plan)[0],
            **{name: peer.dispatch for name, peer in peers.items()},
        },
        "combine": {
            "automoe": lambda: automoe.combine(received, plan),
            **{
                name: lambda peer=peer: peer.combine(by_source)
                for name, peer in peers.items()
            },
        },
    }
    _add_fp8(me, x, ids, jobs)
    moved = sum_of_ranks(received.nbytes)
    for job, calls in jobs.items():
        times = me.contest.in_turn(list(calls.values()))
        for (name, call), own in zip(calls.items(), times, strict=True):
            result = call()
            if job == "combine":
                wrong = count_off(result, summed)
            elif name == _FP8:
                wrong = count_off(result, received)
            else:
                right = received if name == "automoe" else by_source
                wrong = int((result != right).sum())
            me.add(job, name, hidden, own, moved, wrong=wrong)
    _run_plans(me, hidden, ids, plan)


_FP8 = "automoe, fp8 wire"


def _add_fp8(
    me: Rank, x: Tensor, ids: Tensor, jobs: dict[str, dict[str, Callable]]
) -> None:
    """A dispatch whose rows are 8-bit floats between nodes. Collective."""
    if me.options.nodes == 1:
        return
    if me.device.type != "cuda":
        me.notes.append("hops, fp8 wire: needs a CUDA device")
        return
    if me.fp8_group is None:
        me.fp8_group = make_group(me.options, "fp8")
    plan = automoe.plan(ids, num_experts=me.options.experts, group=me.fp8_group)
    jobs["dispatch"][_FP8] = lambda: automoe.dispatch(x, None, plan)[0]


def _run_plans(me: Rank, hidden: int, ids: Tensor, plan: automoe.Plan) -> None:
    """Plans, with and without a wait for R."""

    def run(most: int | None = None) -> Tensor:
        made = automoe.plan(
            ids,
            num_experts=me.options.experts,
            group=me.group,
            max_recv_tokens=most,
        )
        return made.num_tokens_per_expert

    most_rows = torch.tensor(plan.num_recv_tokens)
    dist.all_reduce(most_rows, dist.ReduceOp.MAX)  # bounds must be the same
    calls = {"automoe": run, "automoe, bounded": lambda: run(int(most_rows))}
    times = me.contest.in_turn(list(calls.values()))
    for (name, call), own in zip(calls.items(), times, strict=True):
        wrong = int((call() != plan.num_tokens_per_expert).sum())
        me.add("plan", name, hidden, own, wrong=wrong)


def _run_launches(me: Rank, hidden: int) -> None:
    if me.device.type != "cuda":
        me.notes.append("launches: needs a CUDA device")
        return
    x, _, plan = me.draw(_LAUNCH_TOKENS, hidden)
    chain = overlap.one_chain(x, plan)
    for _ in range(3):
        chain()
    most = torch.tensor(overlap.count_launches(chain))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    count = int(most)
    if not count:
        me.notes.append("launches: needs CUPTI, by which torch.profiler counts them")
        return
    ours, empty = me.contest.in_turn([chain, lambda: overlap.launch_empty(count)])
    job = f"T={_LAUNCH_TOKENS}"
    base = statistics.median(empty)
    wrong = count_off(chain(), x.float() * me.options.topk)
    ratio = statistics.median(ours) / base
    me.add(job, "automoe", hidden, ours, ratio=ratio, wrong=wrong)
    me.add(job, f"{count} empty kernels", hidden, empty, ratio=1.0)


def _run_overlap(me: Rank, hidden: int) -> None:
    x, ids, plan = me.draw(me.options.tokens, hidden)
    calls = overlap.overlap_calls(me.contest, x, plan, me.options.product)
    times = me.contest.in_turn(calls)
    alone, product, both = map(statistics.median, times)
    share = overlap.hidden_share(alone + product, both, min(alone, product))
    expected = automoe.dispatch(x, None, plan)[0]
    names = ("dispatch", f"products of {me.options.product}", "both")
    for name, call, own in zip(names, calls, times, strict=True):
        result = call()
        wrong = 0 if result is None else int((result != expected).sum())
        ratio = share if name == "both" else None
        me.add("dispatch", name, hidden, own, ratio=ratio, wrong=wrong)
    if me.options.nodes == 1:
        # The first chunk is all that stays inside a node.
        me.notes.append("overlap of moe's chunks: needs --nodes 2")
    else:
        _run_chunks(me, hidden, x, ids)


def _run_chunks(me: Rank, hidden: int, x: Tensor, ids: Tensor) -> None:
    count = me.options.chunks
    layer = overlap.ChunkedLayer(
        me.contest, x, ids, me.options.experts, count, me.group
    )
    calls = {
        "moe in 1 chunk": lambda: layer.run(1),
        f"moe in {count} chunks": lambda: layer.run(count),
        "chunks one by one": layer.run_one_by_one,
    }
    times = me.contest.in_turn([*calls.values(), *layer.steps()])
    _, chunked, serial, *steps = map(statistics.median, times)
    least = overlap.pipelined(overlap.chunks_of(steps))
    share = overlap.hidden_share(serial, chunked, sum(steps) - least)
    whole = layer.run(1)
    wrongs = [count_off(whole, x.float() * me.options.topk)]
    wrongs += [int((call() != whole).sum()) for call in list(calls.values())[1:]]
    ratios = (None, share, None)
    for name, own, ratio, wrong in zip(calls, times[:3], ratios, wrongs, strict=True):
        me.add("moe", name, hidden, own, ratio=ratio, wrong=wrong)
    for place, name in enumerate(("dispatch", "experts", "combine")):
        # Times of all chunks, step by step.
        own = [sum(of_step) for of_step in zip(*times[3 + place :: 3], strict=True)]
        me.add("moe", f"{name} of {count} chunks", hidden, own)


@dataclass(frozen=True)
class _Part:
    run: Callable[[Rank, int], None]
    least_ranks: int


_PARTS = {
    "hops": _Part(_run_hops, 2),
    # Of one rank: ranks that share a card take turns on it.
    "launches": _Part(_run_launches, 1),
    "overlap": _Part(_run_overlap, 1),
}
