# SPDX-License-Identifier: Apache-2.0
"""Whole models into parallel ones: each rank reads what it needs of safetensors."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torch_automoe.parallel.expert_lists import names_in_lists
from torch_automoe.parallel.experts import local_part
from torch_automoe.parallel.hf_names import (
    Source,
    plain_name,
    reset_unsaved_buffers,
    sources,
    tied_names,
    unexpected_in_files,
)

_INDEX = "model.safetensors.index.json"


def load_pretrained(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Fill a parallel model from safetensors, in place; nothing is communicated.

    The files are those of ``save_pretrained``, here, in transformers or on its hub,
    with the names that they have there. Each rank reads its own part of a tensor;
    where transformers converts names or shapes, the files' tensors of its own experts.

    A model may have been built on the meta device, made parallel and fully sharded::

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        automoe.parallelize(model, mesh)
        fully_shard(model, mesh=mesh.dense)
        automoe.load_pretrained(model, folder)

    Memory is then made here (or by ``model.to_empty(device=...)`` before). Buffers that
    files do not hold are computed as transformers does; in other models by
    ``reset_parameters()`` of the modules that have them.

    Args:
        model: its tensors keep their types.
        folder: seen by all ranks.

    Returns:
        ``model``.

    Raises:
        ValueError: there are no such files, they are quantised, shapes differ, or a
            tensor of the model is not in them.
    """
    reader = _Reader(Path(folder))
    reset_unsaved_buffers(model, garbage=_materialize(model))
    state = {plain_name(name): value for name, value in model.state_dict().items()}
    loaded, read = _load_lists(model, state, reader)
    names = [name for name in reader.names if name not in read]
    found, rest = sources(model, names, state)
    for source in found:
        loaded |= _load(model, source, state, reader)
    for name, kept in tied_names(model).items():
        if name in state and name not in loaded and kept in loaded:
            local_part(state[name]).copy_(local_part(state[kept]))
            loaded.add(name)
    missing = [name for name in state if name not in loaded]
    if missing:
        raise ValueError(
            f"{folder} has no values for {_some(missing)}, expected all parameters "
            "and saved buffers of the model"
        )
    rest = unexpected_in_files(model, rest)
    if rest:
        warnings.warn(
            f"{folder} has values for {_some(rest)}, which the model has not; they "
            "were left out",
            stacklevel=2,
        )
    return model


def _materialize(model: nn.Module) -> bool:
    """Give a model on the meta device memory; return whether it was there."""
    tensors = [*model.parameters(), *model.buffers()]
    if not any(tensor.is_meta for tensor in tensors):
        return False
    meshes = (t.device_mesh.device_type for t in tensors if isinstance(t, DTensor))
    model.to_empty(device=next(meshes, "cpu"))
    return True


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@torch.no_grad()
def _load_lists(
    model: nn.Module, state: dict[str, Tensor], reader: _Reader
) -> tuple[set[str], set[str]]:
    """Fill what was stacked from the experts of a list; names in model and files."""
    loaded, read = set(), set()
    there = set(reader.names)
    for name, experts in names_in_lists(model).items():
        name = plain_name(name)
        if not there.issuperset(experts):
            continue
        tensor = state[name]
        _check_shape(name, tensor, [len(experts), *reader.shape(experts[0])])
        part, *rest = _own(tensor)
        local = local_part(tensor)
        for place, expert in enumerate(experts[part] if local.numel() else []):
            local[place].copy_(reader.read(expert, tuple(rest)))
        loaded.add(name)
        read.update(experts)
    return loaded, read


@torch.no_grad()
def _load(
    model: nn.Module, source: Source, state: dict[str, Tensor], reader: _Reader
) -> set[str]:
    """Fill what one source makes; returns the names in the model."""
    if source.converter is None:
        ((name, *_),) = source.names.values()
        _copy(source.target, state[source.target], reader.shape(name), reader, name)
        return {source.target}
    target = state[source.target]
    part = slice(None)
    counts = {len(names) for names in source.names.values()}
    if source.stacks_experts() and counts == {target.shape[0]}:
        part = _own(target)[0]
        if part.start == part.stop:
            return {source.target}
    values = source.convert(model, reader.read, part)
    for name, value in values.items():
        own = _own(state[name])
        shape = list(value.shape)
        if part != slice(None):
            # Only this rank's experts were read.
            own = (slice(None), *own[1:])
            shape[0] = target.shape[0]
        _check_shape(name, state[name], shape)
        local_part(state[name]).copy_(value[own])
    return set(values)


def _copy(
    target: str, tensor: Tensor, shape: list[int], reader: _Reader, name: str
) -> None:
    _check_shape(target, tensor, shape)
    local = local_part(tensor)
    if local.numel():
        local.copy_(reader.read(name, _own(tensor)))


def _check_shape(name: str, tensor: Tensor, shape: Iterable[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} is {tuple(shape)} in the files, expected {tuple(tensor.shape)}: "
            "build the model with the config that belongs to the files"
        )


def _own(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part of a tensor lies in the whole."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(
        slice(min(start, whole), min(start, whole) + size)
        for start, size, whole in zip(offsets, sizes, tensor.shape, strict=True)
    )


class _Reader:
    """Reads tensors, or parts of them, from the safetensors of a folder."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        config = folder / "config.json"
        if config.is_file() and "quantization_config" in json.loads(config.read_text()):
            raise ValueError(
                f"{folder} holds quantised weights, expected plain ones: load them "
                "with from_pretrained(..., dtype=...), which can dequantise, and "
                "save_pretrained"
            )
        index = folder / _INDEX
        if index.is_file():
            files = set(json.loads(index.read_text())["weight_map"].values())
            paths = [folder / file for file in sorted(files)]
        else:
            paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(
                f"{folder} has no files *.safetensors, expected a folder of "
                "save_pretrained"
            )
        self._files: dict[str, Any] = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> list[int]:
        """Of a tensor."""
        return self._files[name].get_slice(name).get_shape()

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or a part of it."""
        if not part:  # also a tensor without dimensions
            return self._files[name].get_tensor(name)
        return self._files[name].get_slice(name)[part]
