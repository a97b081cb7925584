# SPDX-License-Identifier: Apache-2.0
"""Whole models out of parallel ones: safetensors with the names of the model."""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from torch_automoe.parallel.expert_lists import names_in_lists
from torch_automoe.parallel.hf_names import (
    groups_to_save,
    is_transformers,
    plain_name,
    tied_names,
    to_file_names,
)

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|model-\d{5}\.partial")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20}
_UNITS |= {"GIB": 2**30, "TB": 10**12, "TIB": 2**40, "B": 1}


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a parallel model as one process would; collective over all ranks.

    A model of transformers becomes a folder that ``from_pretrained`` loads, with the
    names and shapes that its files have: experts are taken apart where those do. A
    model in PEFT: the folder of its adapter. Any other: its state dict. Rank 0 writes;
    the folder has to be seen by rank 0 alone.

    Memory: every rank gathers one whole tensor at a time. Rank 0 keeps those that are
    converted together (at most the experts of one layer) and ``max_shard_size`` of
    finished ones.

    Args:
        model: all ranks have the same parts of it (no pipeline stages).
        folder: is made; files of an earlier save in it are replaced.
        max_shard_size: bytes of a file, as 5 * 10**9, "5GB" or "500MB". A tensor that
            is larger has a file of its own.
        dtype: convert floating-point tensors to it; default: as they are.

    Raises:
        ValueError: an argument is wrong, ranks have different parts, or the model is
            quantised.
        RuntimeError: rank 0 could not write; it raises its own error.
    """
    limit = parse_size(max_shard_size)
    model = getattr(model, "_orig_mod", model)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "model is quantised by transformers, expected plain weights: save it with "
            "Distributed Checkpoint (docs/checkpoints.md)"
        )
    adapter = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    state = _state(model, adapter)
    _check_same_names(list(state))
    on_rank0 = not dist.is_initialized() or dist.get_rank() == 0
    error: Exception | None = None
    writer = _Writer(Path(folder), limit) if on_rank0 and not adapter else None
    kept: dict[str, Tensor] = {}
    lists = {plain_name(name): own for name, own in names_in_lists(model).items()}
    for group in groups_to_save(model, list(state)) if not adapter else [list(state)]:
        whole = {name: _gather(state.pop(name), dtype, on_rank0) for name in group}
        if not on_rank0 or error is not None:
            continue
        try:
            if writer is None:
                kept |= whole
            else:
                writer.add(to_file_names(model, _apart(whole, lists)))
        except Exception as caught:  # others wait in the next gather
            error = caught
    if on_rank0 and error is None:
        try:
            if writer is None:
                _save_adapter(model, folder, kept)
            else:
                writer.finish()
                _save_config(model, folder, dtype)
        except Exception as caught:
            error = caught
    _raise_together(error, folder)


def _state(model: nn.Module, adapter: bool) -> dict[str, Any]:
    """What is written, in an order that is the same on all ranks."""
    state = get_model_state_dict(model)
    tied = tied_names(model)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} in the state dict is {type(value).__name__}, expected a "
                "tensor: save the model with Distributed Checkpoint "
                "(docs/checkpoints.md)"
            )
    if adapter:
        trained = {
            plain_name(n) for n, p in model.named_parameters() if p.requires_grad
        }
        parts = ("lora_", "modules_to_save", "token_adapter")
        return {
            name: value
            for name, value in state.items()
            if name in trained or any(part in name for part in parts)
        }
    return {
        name: value
        for name, value in state.items()
        if name not in ignored and tied.get(name) not in state
    }


def _apart(
    tensors: dict[str, Tensor], lists: dict[str, list[str]]
) -> dict[str, Tensor]:
    """Take the parameters of lists of experts apart again."""
    apart = {}
    for name, tensor in tensors.items():
        if name in lists:
            apart |= zip(lists[name], tensor.unbind(), strict=True)
        else:
            apart[name] = tensor
    return apart


def _check_same_names(names: list[str]) -> None:
    if not dist.is_initialized():
        return
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, names)
    for rank, other in enumerate(every):
        if other != every[0]:
            differing = sorted(set(other) ^ set(every[0]))[:3] or "their order"
            raise ValueError(
                f"model has other tensors on rank {rank} than on rank 0 ({differing}), "
                "expected the same parts on all ranks: save pipeline stages with "
                "Distributed Checkpoint (docs/checkpoints.md)"
            )


def _gather(value: Tensor, dtype: torch.dtype | None, keep: bool) -> Tensor | None:
    """The whole of a tensor in CPU memory where ``keep``; collective for a DTensor."""
    value = value.detach()
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    if isinstance(value, DTensor):
        # Parameters that are offloaded travel by way of the device of their ranks.
        value = value.to(value.device_mesh.device_type).full_tensor()
    return value.cpu() if keep else None


def _raise_together(error: Exception | None, folder: str | os.PathLike) -> None:
    """Raise on all ranks what rank 0 has met."""
    if dist.is_initialized():
        text = [f"{type(error).__name__}: {error}" if error is not None else None]
        dist.broadcast_object_list(text, src=0)
        if text[0] is not None and error is None:
            raise RuntimeError(f"rank 0 could not write {os.fspath(folder)}: {text[0]}")
    if error is not None:
        raise error


class _Writer:
    """Writes tensors into files of at most ``limit`` bytes, and what lists them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._waiting: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._names: list[list[str]] = []  # of each file that is written

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors; write those that are waiting if a file is full."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._waiting and self._bytes + size > self.limit:
                self._write()
            tensor = tensor.contiguous()
            if tensor.untyped_storage().nbytes() != size:
                tensor = tensor.clone()  # of a view, which would keep the whole
            self._waiting[name] = tensor
            self._bytes += size
            self._total += size

    def finish(self) -> None:
        """Write the rest, and give the files their names."""
        self._write()
        count = len(self._names)
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            files = [_WEIGHTS]
        partial = [self._partial(index) for index in range(count)]
        for old in self.folder.iterdir():
            if old in partial:
                continue
            if old.name in (_WEIGHTS, _INDEX) or _SHARD.fullmatch(old.name):
                old.unlink()
        for index, file in enumerate(files):
            self._partial(index).rename(self.folder / file)
        if count > 1:
            where = zip(files, self._names, strict=True)
            weight_map = {name: file for file, names in where for name in names}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / _INDEX).write_text(text)

    def _write(self) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._partial(len(self._names))
        save_file(self._waiting, path, metadata={"format": "pt"})
        self._names.append(list(self._waiting))
        self._waiting, self._bytes = {}, 0

    def _partial(self, index: int) -> Path:
        return self.folder / f"model-{index + 1:05}.partial"


def _save_config(
    model: Any, folder: str | os.PathLike, dtype: torch.dtype | None
) -> None:
    """What ``from_pretrained`` reads beside the weights."""
    if not is_transformers(model):
        return
    config = copy.deepcopy(model.config)
    config.dtype = str(dtype or model.dtype).removeprefix("torch.")
    # fully_shard has put its own name before that of the class.
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if getattr(model, "_auto_class", None) is not None:
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=config)


def _save_adapter(model: Any, folder: str | os.PathLike, state: dict) -> None:
    with warnings.catch_warnings():
        # Of the base model, which need not be on the hub.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        model.save_pretrained(folder, state_dict=state)


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 1000, "5GB" or "500 MiB".

    Raises:
        ValueError: it is something else.
    """
    if isinstance(size, int) and size > 0:
        return size
    match = (
        re.fullmatch(r"(\d+)\s*([A-Za-z]+)", size) if isinstance(size, str) else None
    )
    unit = _UNITS.get(match[2].upper()) if match else None
    if unit is None or not int(match[1]):
        raise ValueError(
            f"max_shard_size is {size!r}, expected a positive number of bytes, or a "
            'text such as "5GB" or "500MB"'
        )
    return int(match[1]) * unit
