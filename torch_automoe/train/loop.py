# SPDX-License-Identifier: Apache-2.0
"""The training run of one rank, from process group to generated text."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy

import torch_automoe as automoe
from torch_automoe.balance.metrics import load_balance_stats
from torch_automoe.parallel.experts import parallel_state
from torch_automoe.router import balance_losses, set_balance_loss_scale
from torch_automoe.train.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    read_position,
    save_checkpoint,
    shared_run_dir,
)
from torch_automoe.train.config import BYTE_MOE, TrainConfig, UsageError
from torch_automoe.train.data import (
    Text,
    held_out_windows,
    load_text,
    training_batch,
    unigram_entropy,
)
from torch_automoe.train.metrics import (
    BITS_PER_NAT,
    RunLog,
    peak_memory_gib,
)
from torch_automoe.train.model import ByteMoE, generate, init_weights
from torch_automoe.train.moe import TimedBiasUpdate
from torch_automoe.train.optimizer import build_optimizer, learning_rate
from torch_automoe.train.parallel import (
    clip_grad_norm_,
    parallelize,
    release_groups,
)
from torch_automoe.train.stock import StockModel, make_stock_model
from torch_automoe.train.timing import all_reduce, comm_timer


def train(config: TrainConfig) -> None:
    """Train on this rank; torchrun's variables say which rank of how many.

    Raises:
        UsageError: an option cannot work, before any group is made where that
            can be seen from the options alone.
    """
    config.check(int(os.environ["WORLD_SIZE"]))
    text = load_text(config.data, config.seq_len + 1)
    dist.init_process_group(config.backend)
    try:
        Run(config, text).train()
    finally:
        dist.destroy_process_group()
        release_groups()


class Run:
    """Model, optimizer, text and log of one rank."""

    def __init__(self, config: TrainConfig, text: Text) -> None:
        self.config = config
        self.text = text
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        check_same_text(text)
        self.mesh = automoe.init_moe_mesh("cpu", ep=config.ep or self.world_size)
        self.model = build_model(config, self.mesh)
        self.optimizer = build_optimizer(self.model, config)
        self.balance = TimedBiasUpdate(
            automoe.routed_layers(self.model), self.optimizer, config.bias_update_rate
        )
        self.run_dir = shared_run_dir(config.run_dir, config.resume)
        self.checkpoint_dir = Path(
            config.checkpoint_dir or self.run_dir / "checkpoints"
        )
        self.first_step = self._resume() if config.resume else self._start_afresh()
        self.log = RunLog(
            self.run_dir,
            enabled=self.rank == 0,
            as_json=config.json,
            color=config.color,
            first_step=self.first_step,
        )

    def train(self) -> None:
        """Run all steps, then evaluate, generate and keep a checkpoint."""
        config = self.config
        self._introduce()
        start = time.monotonic()
        comm_timer.take_shares()  # start counting here
        for step in range(self.first_step + 1, config.steps + 1):
            self.log.step(self._step(step), last=step == config.steps)
            due = config.checkpoint_every and step % config.checkpoint_every == 0
            if due or step == config.steps:
                self._checkpoint(step)
        self._conclude(time.monotonic() - start)

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its metrics."""
        config = self.config
        start = time.perf_counter()
        batch = training_batch(
            self.text.train,
            step,
            seed=config.seed,
            batch=config.batch,
            seq_len=config.seq_len,
        )
        loss = self._loss(batch)
        loss.backward()
        grad_norm = clip_grad_norm_(self.model, config.max_norm)
        lr = learning_rate(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._metrics(step, loss.item(), grad_norm, lr, start)

    def _loss(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's part of the cross entropy.

        It is divided by the size of the global batch, so that the parts of all ranks
        add up to the loss, and their gradients to its gradient. The routers bring the
        gradient of the balance loss.
        """
        config = self.config
        loss = self._cross_entropy(batch.chunk(self.world_size)[self.rank])
        return loss / (config.batch * config.seq_len)

    def _cross_entropy(self, batch: torch.Tensor) -> torch.Tensor:
        """Summed over the bytes of ``batch``, (b, seq_len + 1), in nats."""
        logits = self.model(batch[:, :-1]).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")

    def _metrics(
        self, step: int, loss: float, grad_norm: float, lr: float, start: float
    ) -> dict[str, Any]:
        config = self.config
        shares = comm_timer.take_shares()
        kinds = ("all_to_all", "fsdp", "all_reduce")
        balance = {
            name.replace("seq_aux", "aux"): value.item() / self.world_size
            for name, value in balance_losses(self.model).items()
        }
        parts = [loss, *balance.values(), *(shares.get(kind, 0.0) for kind in kinds)]
        loss, *sums = all_reduce(
            torch.tensor(parts, dtype=torch.float64), dist.ReduceOp.SUM
        ).tolist()
        balance_sums, share_sums = sums[: len(balance)], sums[len(balance) :]
        stats = load_balance_stats(
            self.balance.num_tokens_per_expert, ep_size=self.mesh.ep.size()
        )
        seconds = time.perf_counter() - start
        percent = [100 * share / self.world_size for share in share_sums]
        tokens = config.batch * config.seq_len
        return {
            "step": step,
            "loss": loss,
            "bpb": loss * BITS_PER_NAT,
            "grad_norm": grad_norm,
            "lr": lr,
            "memory_gib": round(peak_memory_gib(), 3),
            "tps": round(tokens / seconds / self.world_size, 1),
            "step_seconds": round(seconds, 4),
            "comm_pct": round(sum(percent), 1),
            **{
                f"comm/{kind}_pct": round(value, 1)
                for kind, value in zip(kinds, percent, strict=True)
            },
            **dict(zip(balance, balance_sums, strict=True)),
            **{name: round(value, 4) for name, value in stats.items()},
        }

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per byte on the held-out part, over all ranks."""
        config = self.config
        self.model.eval()
        windows = held_out_windows(
            self.text.held_out,
            num_windows=config.eval_windows,
            seq_len=config.seq_len,
        ).chunk(self.world_size)[self.rank]
        nats = torch.zeros((), dtype=torch.float64)
        for batch in windows.split(config.batch // self.world_size):
            nats += self._cross_entropy(batch)
        all_reduce(nats, dist.ReduceOp.SUM)
        self.model.train()
        return nats.item() / (config.eval_windows * config.seq_len) * BITS_PER_NAT

    def sample(self) -> str:
        """Text that the model writes after the prompt; the same call on all ranks."""
        config = self.config
        self.model.eval()
        written = generate(
            self.model,
            config.prompt.encode(),
            config.sample_bytes,
            context=config.seq_len,
            temperature=config.temperature,
            seed=config.seed,
            # The models of transformers want a text to work on.
            rows=1 if isinstance(self.model, StockModel) else int(self.rank == 0),
        )
        self.model.train()
        return written.decode(errors="replace")

    def _introduce(self) -> None:
        config, text = self.config, self.text
        if self.rank == 0:
            content = json.dumps(asdict(config), indent=1) + "\n"
            (self.run_dir / "config.json").write_text(content)
        num_parameters = sum(p.numel() for p in self.model.parameters())
        counts = [
            state.adapter.num_experts
            for state in map(parallel_state, self.model.modules())
            if state is not None
        ]
        self.log.note(f"text: {text.source}, {len(text.train):,} bytes")
        self.log.note(
            f"model: {config.hf or config.model}, {num_parameters:,} parameters, "
            f"{len(counts)} layers of {counts[0]} experts"
        )
        self.log.note(
            f"ranks: {self.world_size} on backend {config.backend}, "
            f"ep {self.mesh.ep.size()} x efsdp {self.mesh.sparse.size()}"
        )
        if self.first_step:
            left = max(config.steps - self.first_step, 0)
            self.log.note(f"resumed after step {self.first_step}, {left} to go")

    def _conclude(self, seconds: float) -> None:
        summary = {
            "held_out_bpb": self.evaluate(),
            "unigram_entropy": unigram_entropy(self.text.held_out),
            "train_seconds": round(seconds, 2),
            "exchange": explain_exchange(self.mesh),
        }
        lines = [
            f"held-out: {summary['held_out_bpb']:.3f} bits per byte (unigram entropy "
            f"{summary['unigram_entropy']:.3f}), trained in {seconds:.1f} s",
            f"exchange: {summary['exchange']}",
        ]
        if self.config.sample_bytes:
            summary["sample"] = self.sample()
            lines.append(f"sample:\n{summary['sample']}")
        lines.append(f"run folder: {self.run_dir}")
        self.log.event(summary, "\n".join(lines))

    def _checkpoint(self, step: int) -> None:
        save_checkpoint(
            self.checkpoint_dir, self.model, self.optimizer, self._position(step)
        )

    def _position(self, step: int) -> dict[str, Any]:
        config = self.config
        return {
            "step": step,
            "seed": config.seed,
            "batch": config.batch,
            "seq_len": config.seq_len,
            "text_crc32": self.text.crc32,
            "model": config.model,
            "hf": config.hf,
            **({} if config.hf else asdict(config.sizes)),
        }

    def _start_afresh(self) -> int:
        if path := newest_checkpoint(self.checkpoint_dir):
            raise UsageError(
                f"--run-dir: {path} is there already; add --resume to go on from it, "
                "or choose another folder"
            )
        return 0

    def _resume(self) -> int:
        path = newest_checkpoint(self.checkpoint_dir)
        if path is None:
            raise UsageError(
                f"--resume: {self.checkpoint_dir} holds no checkpoint; give the "
                "--run-dir or --checkpoint-dir of an earlier run"
            )
        saved = read_position(path)
        for name, now in self._position(saved["step"]).items():
            if saved.get(name) != now:
                what = "text" if name == "text_crc32" else name.replace("_", "-")
                raise UsageError(
                    f"--resume: {path} was made with --{what} {saved.get(name)}, "
                    f"this run has {now}; give the same value"
                )
        load_checkpoint(path, self.model, self.optimizer)
        return saved["step"]


def build_model(config: TrainConfig, mesh: automoe.MoEMesh) -> ByteMoE | StockModel:
    """The parallel model of this rank."""
    mp_policy = MixedPrecisionPolicy()
    if config.hf or config.model != BYTE_MOE:
        model = make_stock_model(config)
    else:
        model = ByteMoE(config.sizes, config.aux_loss_coef)
    if config.dtype == "float64":
        model = model.double()
    elif config.dtype == "bfloat16":
        mp_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if isinstance(model, ByteMoE):
        # The loss is a mean over layers and over the sequences of all ranks.
        set_balance_loss_scale(model, 1 / (config.layers * dist.get_world_size()))
        init_weights(model, config.seed)
    try:
        parallelize(model, list(model.blocks), mesh, mp_policy)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return model


def check_same_text(text: Text) -> None:
    """Raise UsageError on every rank if the ranks have read different text."""
    crc = torch.tensor([text.crc32, -text.crc32])
    highest, negative_lowest = all_reduce(crc, dist.ReduceOp.MAX).tolist()
    if highest != -negative_lowest:
        raise UsageError(
            "--data: the ranks have read different text (checksums "
            f"{-negative_lowest:08x} and {highest:08x}); give all nodes the same files"
        )


def explain_exchange(mesh: automoe.MoEMesh) -> str:
    """Which exchange the expert-parallel group uses, and why."""
    group = mesh.ep.get_group()
    backend = dist.get_backend(group)
    if backend != "automoe":
        return f"left to backend {backend}"
    return automoe.explain_exchange(group)
