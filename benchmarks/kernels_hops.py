# SPDX-License-Identifier: Apache-2.0
"""Other ways to carry the rows of dispatch and combine, for kernels_bench.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

# The first NCCL that runs several ranks on one GPU.
SHARING_NCCL = (2, 30)


class Expanded:
    """Every pick as a row of its own: what a plain all-to-all has to send.

    Rows are sent by (expert, token) and arrive by (source rank, expert, token).
    """

    def __init__(self, x: Tensor, ids: Tensor, num_experts: int) -> None:
        size = dist.get_world_size()
        picks = ids.flatten()
        chunk = -(-num_experts // size)
        order = picks.argsort(stable=True)
        self.x, self.shape = x, ids.shape
        self.tokens = order // ids.shape[1]
        self.inverse = order.argsort()
        to = (picks // chunk).bincount(minlength=size).cpu()
        matrix = [torch.empty_like(to) for _ in range(size)]
        dist.all_gather(matrix, to)
        self.matrix = torch.stack(matrix)  # [source, destination]
        self.sent = to.tolist()
        self.received = self.matrix[:, dist.get_rank()].tolist()
        experts = torch.empty(sum(self.received), dtype=picks.dtype)
        dist.all_to_all_single(experts, picks[order].cpu(), self.received, self.sent)
        # To the order of ours: by (expert, source rank, token).
        self.by_expert = experts.argsort(stable=True).to(x.device)

    def expand(self) -> Tensor:
        return self.x.index_select(0, self.tokens)

    def sum(self, back: Tensor) -> Tensor:
        picked = back.index_select(0, self.inverse).view(*self.shape, -1)
        return picked.float().sum(1).to(back.dtype)

    def empty(self, count: int) -> Tensor:
        return self.x.new_empty((count, self.x.shape[1]))


class AllToAll:
    """all_to_all_single of expanded rows; experts' rows are not sorted."""

    def __init__(self, expanded: Expanded, group: dist.ProcessGroup | None) -> None:
        self.expanded, self.group = expanded, group

    def dispatch(self) -> Tensor:
        it = self.expanded
        out = it.empty(sum(it.received))
        dist.all_to_all_single(out, it.expand(), it.received, it.sent, group=self.group)
        return out

    def combine(self, rows: Tensor) -> Tensor:
        it = self.expanded
        back = it.empty(sum(it.sent))
        dist.all_to_all_single(back, rows, it.sent, it.received, group=self.group)
        return it.sum(back)


class SymmetricMemory:
    """Expanded rows that every rank reads from the others' memory, by torch."""

    def __init__(self, expanded: Expanded) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.expanded = expanded
        matrix = expanded.matrix
        most = int(max(matrix.sum(0).max(), matrix.sum(1).max()))
        shape = (most, expanded.x.shape[1])
        self.buffer = symmetric.empty(
            shape, dtype=expanded.x.dtype, device=expanded.x.device
        )
        self.handle = symmetric.rendezvous(self.buffer, dist.group.WORLD)

    def _read(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """blocks[s][d]: rows that rank s, which has them by d, gives to rank d."""
        self.buffer[: rows.shape[0]].copy_(rows)
        self.handle.barrier()
        rank, hidden = dist.get_rank(), rows.shape[1]
        parts = blocks[:, rank].tolist()
        out = self.expanded.empty(sum(parts))
        for peer, place in enumerate(out.split(parts)):
            first = int(blocks[peer, :rank].sum())
            place.copy_(
                self.handle.get_buffer(
                    peer, tuple(place.shape), out.dtype, first * hidden
                )
            )
        self.handle.barrier()
        return out

    def dispatch(self) -> Tensor:
        return self._read(self.expanded.expand(), self.expanded.matrix)

    def combine(self, rows: Tensor) -> Tensor:
        return self.expanded.sum(self._read(rows, self.expanded.matrix.T))


def why_no_nccl(device: torch.device, size: int) -> str | None:
    """Why NCCL cannot be a peer; None: it can."""
    if device.type != "cuda":
        return "NCCL: needs a CUDA device"
    version = tuple(torch.cuda.nccl.version())
    if size > torch.cuda.device_count() and version < SHARING_NCCL:
        found = ".".join(map(str, version))
        return (
            f"NCCL: needs NCCL >= 2.30 for ranks on one GPU, or {size} GPUs ({found})"
        )
    return None


def make_peers(expanded: Expanded, notes: list[str]) -> dict[str, object]:
    """Everything that can carry the same rows here. Collective."""
    device, size = expanded.x.device, dist.get_world_size()
    if device.type == "cpu":
        notes.append("hops, NCCL and symmetric memory: needs a CUDA device")
        return {"gloo all_to_all": AllToAll(expanded, None)}
    peers: dict[str, object] = {}
    makers = {"torch symmetric memory": lambda: SymmetricMemory(expanded)}
    why = why_no_nccl(device, size)
    if why is None:
        group = dist.new_group(backend="nccl")
        makers["NCCL all_to_all"] = lambda: AllToAll(expanded, group)
    else:
        notes.append(f"hops, {why}")
    for name, make in makers.items():
        peer, fault = _try_peer(make)
        if fault is None:
            peers[name] = peer
        else:
            notes.append(f"hops, {name}: needs what this machine lacks: {fault}")
    return peers


def _try_peer(make: Callable[[], object]) -> tuple[object, str | None]:
    """A peer, or why some rank cannot have it. Collective."""
    peer = fault = None
    try:
        peer = make()
        peer.combine(peer.dispatch())
        torch.cuda.synchronize()
    except (RuntimeError, AttributeError, TypeError, ImportError) as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return peer, next(filter(None, faults), None)
