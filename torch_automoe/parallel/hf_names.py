# SPDX-License-Identifier: Apache-2.0
"""Names of parameters in files, as transformers converts them.

transformers stacks experts while it loads a checkpoint and takes them apart while it
saves one. Its conversions are used here as they are, a few tensors at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[], Tensor]


def is_transformers(model: nn.Module) -> bool:
    """Return whether a model is one of transformers'."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transf")
        for base in type(model).__mro__
    )


def groups_to_save(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Put the names of a model's tensors together that become files' tensors together.

    Args:
        model: names of one that is not of transformers are each alone.
        names: of its state dict.
    """
    if not is_transformers(model):
        return [[name] for name in names]
    from transformers.core_model_loading import WeightConverter, apply_converters

    converters = [
        conversion.reverse_transform()
        for conversion in reversed(_conversions_to_save(model))
        if isinstance(conversion, WeightConverter)
    ]
    groups: dict[str, list[str]] = {}
    for name in names:
        renamed, pattern = apply_converters(name, converters)
        # Where nothing is converted, a name of its own that no other has.
        groups.setdefault(renamed if pattern else f"={name}", []).append(name)
    return list(groups.values())


def to_file_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a group of tensors to what files of this model hold."""
    if not is_transformers(model):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def _conversions_to_save(model: nn.Module) -> list[Any]:
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return conversions


@dataclass
class Source:
    """Where one or several tensors of a model come from.

    Attributes:
        target: name of the (first) tensor in the model.
        names: in files; of a converted one, by the pattern that it matched.
        converter: of transformers, or None: the only name is that tensor.
    """

    target: str
    names: dict[str, list[str]]
    converter: Any = None

    def stacks_experts(self) -> bool:
        """Return whether a part of the names makes that part of dimension 0."""
        operations = self.converter.operations if self.converter else []
        return (
            bool(operations)
            and type(operations[0]).__name__ == "MergeModulelist"
            and operations[0].dim == 0
            and all(_keeps_experts(operation) for operation in operations[1:])
        )

    def convert(
        self, model: nn.Module, read: Callable[[str], Tensor], part: slice
    ) -> dict[str, Tensor]:
        """Read and convert; ``part`` takes some of the names of each pattern."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.names.items():
            for name in names[part]:
                converter.add_tensor(self.target, name, pattern, _later(read, name))
        found = converter.convert(self.target, model=model, config=model.config)
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in found.items()
        }


def _later(read: Callable[[str], Tensor], name: str) -> Read:
    return lambda: read(name)


def _keeps_experts(operation: Any) -> bool:
    kind = type(operation).__name__
    if kind in ("Concatenate", "Chunk"):
        return operation.dim > 0
    return kind == "Transpose" and min(operation.dim0, operation.dim1) > 0


def sources(
    model: nn.Module, file_names: Iterable[str], targets: Iterable[str]
) -> tuple[list[Source], list[str]]:
    """Find out which tensors of files make which tensors of a model.

    Returns:
        the sources, and names in files that nothing of the model is made of.
    """
    targets = set(targets)
    if not is_transformers(model):
        known = [name for name in file_names if name in targets]
        rest = [name for name in file_names if name not in targets]
        return [Source(name, {name: [name]}) for name in known], rest
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    conversions = get_model_conversion_mapping(model)
    renamings = [it for it in conversions if isinstance(it, WeightRenaming)]
    converters = [it for it in conversions if isinstance(it, WeightConverter)]
    converter_of = {p: it for it in converters for p in it.source_patterns}
    # Values only have to be something.
    options = {"base_model_prefix": model.base_model_prefix}
    options["meta_state_dict"] = dict.fromkeys(targets, True)
    found: dict[str, Source] = {}
    rest = []
    for name in sorted(file_names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, **options)
        if target not in targets and name in targets:
            target, pattern = name, None
        if target not in targets:
            rest.append(name)
            continue
        converter = converter_of[pattern] if pattern else None
        source = found.setdefault(target, Source(target, {}, converter))
        source.names.setdefault(pattern or name, []).append(name)
    # As transformers does, so that what is saved later has the names it came with.
    model._weight_conversions = [it for it in conversions if it.was_used()]
    return list(found.values()), rest


def unexpected_in_files(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Of names that files have and the model has not, those that should be there."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return [name for name in names if not any(re.search(p, name) for p in patterns)]


def tied_names(model: nn.Module) -> dict[str, str]:
    """Name of a tied tensor -> the name under which files hold it."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    first: dict[int, str] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    # Names that transformers says are copies come last.
    for name, tensor in sorted(named, key=lambda it: plain_name(it[0]) in tied):
        name = plain_name(name)
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            tied[name] = kept
    return {name: kept for name, kept in tied.items() if kept != name}


def plain_name(name: str) -> str:
    """A name without what activation checkpointing and compiling put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


@torch.no_grad()
def reset_unsaved_buffers(model: nn.Module, *, garbage: bool) -> None:
    """Compute buffers that files do not hold, as those of rotary embeddings.

    Modules that have such buffers are initialised; their parameters too, so load those
    afterwards.

    Args:
        model: of any kind.
        garbage: its memory was made just now, and nothing has been written there.

    Raises:
        ValueError: ``garbage``, and nothing can compute such a buffer.
    """
    root = model if is_transformers(model) else None
    _reset(model, root, "", garbage)


def _reset(module: nn.Module, root: Any, name: str, garbage: bool) -> None:
    if is_transformers(module):
        root = module
    unsaved = [
        buffer
        for buffer in sorted(module._non_persistent_buffers_set)
        if module._buffers[buffer] is not None
    ]
    if unsaved and root is not None:
        root._init_weights(module)
    elif unsaved and hasattr(module, "reset_parameters"):
        module.reset_parameters()
    elif unsaved and garbage:
        raise ValueError(
            f"{name or 'model'} ({type(module).__name__}) has buffers that files do "
            f"not hold, {unsaved}, and was on the meta device: expected a method "
            "reset_parameters() of it that computes them, or a model built on a device"
        )
    for child_name, child in module.named_children():
        _reset(child, root, f"{name}.{child_name}".lstrip("."), garbage)
