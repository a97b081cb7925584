# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints (DCP) of model, optimizer and position.

A checkpoint is the folder ``step-N``. It is written under another name and
renamed when complete, so a folder with the final name is always whole. DCP
keeps the global shape of each parameter, so a checkpoint loads on any number
of ranks and any ``--ep``.
"""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

_POSITION = "position.json"
_KEPT = 2


def save_checkpoint(
    checkpoint_dir: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    position: dict[str, Any],
) -> Path:
    """Write ``step-N`` (N = ``position["step"]``) and drop all but the newest two.

    All ranks call this. ``position`` is kept as JSON beside the tensors.
    """
    final = checkpoint_dir / f"step-{position['step']:06d}"
    partial = checkpoint_dir / f"partial-{final.name}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _POSITION).write_text(json.dumps(position, indent=1) + "\n")
    dist.barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save(
        {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial
    )
    if dist.get_rank() == 0:
        partial.rename(final)
        for old in _checkpoints(checkpoint_dir)[:-_KEPT]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load a checkpoint into model and optimizer, resharding as needed."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
    )


def read_position(path: Path) -> dict[str, Any]:
    """The position that was saved with the checkpoint."""
    return json.loads((path / _POSITION).read_text())


def newest_checkpoint(checkpoint_dir: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    return next(reversed(_checkpoints(checkpoint_dir)), None)


def _checkpoints(checkpoint_dir: Path) -> list[Path]:
    return sorted(
        path for path in checkpoint_dir.glob("step-*") if (path / _POSITION).exists()
    )


def shared_run_dir(run_dir: str, resume: bool) -> Path:
    """The run folder, chosen by rank 0 for all ranks where ``run_dir`` is empty."""
    chosen = [run_dir]
    if dist.get_rank() == 0 and not run_dir:
        chosen = [_default_run_dir(resume)]
    dist.broadcast_object_list(chosen, src=0)
    return Path(chosen[0])


def _default_run_dir(resume: bool) -> str:
    root = Path("runs")
    earlier = [d for d in root.glob("*") if newest_checkpoint(d / "checkpoints")]
    if resume and earlier:
        return str(max(earlier, key=lambda path: path.stat().st_mtime))
    return str(root / datetime.now().strftime("%Y%m%d-%H%M%S"))
