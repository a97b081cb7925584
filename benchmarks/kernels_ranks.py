# SPDX-License-Identifier: Apache-2.0
"""Starts ranks that share a device for kernels_bench.py, and brings back their rows."""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import tempfile
from datetime import timedelta
from pathlib import Path

import kernels_hops as hops
import torch
import torch.distributed as dist
import torch.multiprocessing
from kernels_report import Row, make_row
from torch import Tensor

import torch_automoe as automoe

_LAUNCH_TOKENS = 16
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


def _measure_part(part: str, options: argparse.Namespace) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(
                _be_rank, (options, part, folder), nprocs=options.ranks
            )
        except (
            torch.multiprocessing.ProcessRaisedException,
            torch.multiprocessing.ProcessExitedException,
        ) as error:
            last = str(error).strip().splitlines()[-1]
            return [], [f"{part}: needs ranks that do not end with: {last}"]
        return pickle.loads(Path(folder, "found").read_bytes())


def _be_rank(rank: int, options: argparse.Namespace, part: str, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    torch.set_num_threads(1)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store = dist.FileStore(str(Path(folder, "store")), options.ranks)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=options.ranks,
        timeout=timedelta(seconds=120),
    )
    group = dist.new_group(backend="automoe")
    contest = hops.Contest(device, options.iters, options.warmup)
    rows: list[Row] = []
    notes: list[str] = []
    for hidden in options.hidden:
        _PARTS[part](options, hidden, contest, group, rows, notes)
    if rank == 0:
        found = rows, list(dict.fromkeys(notes))
        Path(folder, "found").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _draw(
    options: argparse.Namespace,
    tokens: int,
    hidden: int,
    device: torch.device,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, automoe.Plan]:
    """x, ids and a plan of this rank, with other values on each."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    noise = torch.rand((tokens, options.experts), generator=generator)
    ids = noise.argsort(dim=1)[:, : options.topk].to(device)
    x = torch.randn((tokens, hidden), generator=generator).bfloat16().to(device)
    return x, ids, automoe.plan(ids, num_experts=options.experts, group=group)


def _sum_of_ranks(count: int) -> int:
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


def _run_hops(options, hidden, contest, group, rows, notes) -> None:
    x, ids, plan = _draw(options, options.tokens, hidden, contest.device, group)
    expanded = hops.Expanded(x, ids, options.experts)
    peers = hops.make_peers(expanded, notes)
    # Rows of this rank's experts, in their order and in that of an all-to-all.
    received = automoe.dispatch(x, None, plan)[0]
    by_source = torch.empty_like(received)
    by_source[expanded.by_expert] = received
    expected = x.float() * options.topk  # every expert gives back what it got
    allowed = float(expected.abs().max()) / 16
    calls = {
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
    moved = _sum_of_ranks(received.nbytes)
    for job, of_job in calls.items():
        times = contest.in_turn(list(of_job.values()))
        for (name, call), own in zip(of_job.items(), times, strict=True):
            result = call()
            if job == "combine":
                wrong = int(((result.float() - expected).abs() > allowed).sum())
            else:
                right = received if name == "automoe" else by_source
                wrong = int((result != right).sum())
            rows.append(
                make_row("hops", job, name, hidden, moved, own,
                         wrong=_sum_of_ranks(wrong))
            )  # fmt: skip


def _run_launches(options, hidden, contest, group, rows, notes) -> None:
    if contest.device.type != "cuda":
        notes.append("launches: needs a CUDA device")
        return
    x, _, plan = _draw(options, _LAUNCH_TOKENS, hidden, contest.device, group)
    chain = hops.one_chain(x, plan)
    for _ in range(3):
        chain()
    count = hops.count_launches(chain)
    most = torch.tensor(count)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if not int(most):
        notes.append("launches: needs CUPTI, by which torch.profiler counts them")
        return
    ours, empty = contest.in_turn([chain, lambda: hops.launch_empty(int(most))])
    job = f"T={_LAUNCH_TOKENS}"
    base = statistics.median(empty)
    for name, own in (("automoe", ours), (f"{int(most)} empty kernels", empty)):
        ratio = statistics.median(own) / base
        rows.append(make_row("launches", job, name, hidden, None, own, ratio=ratio))


def _run_overlap(options, hidden, contest, group, rows, notes) -> None:
    x, _, plan = _draw(options, options.tokens, hidden, contest.device, group)
    size = options.product
    calls = hops.overlap_calls(contest, x, plan, size)
    times = contest.in_turn(calls)
    alone, product, both = map(statistics.median, times)
    hidden_share = (alone + product - both) / min(alone, product)
    names = ("dispatch", f"products of {size}", "both")
    for name, own in zip(names, times, strict=True):
        ratio = hidden_share if name == "both" else None
        rows.append(
            make_row("overlap", "dispatch", name, hidden, None, own, ratio=ratio)
        )


_PARTS = {"hops": _run_hops, "launches": _run_launches, "overlap": _run_overlap}
