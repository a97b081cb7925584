# SPDX-License-Identifier: Apache-2.0
"""LoRA of PEFT on parameters of experts that lie on several ranks.

PEFT puts a ``ParamWrapper`` around an experts module for each parameter that
``LoraConfig(target_parameters=...)`` names, and swaps the parameter during the
forward. Here each rank has the parameters of its own experts only, so the wrapper
passes tokens on, and the experts add what LoRA changes to their own part.

lora_A and lora_B stay whole, where PEFT has put them: a gradient is zero outside the
slices of this rank's experts, and the mean over data parallel ranks that FSDP or DDP
takes of it is that of the whole.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from torch_automoe.parallel.adapters import find_adapter
from torch_automoe.parallel.experts import ParallelExperts
from torch_automoe.parallel.subclass import subclass


def attach_lora(
    model: nn.Module, name: str, state: ParallelExperts, tp: DeviceMesh | None
) -> str:
    """Have parallel experts add the LoRA of the PEFT wrappers around them.

    Args:
        model: that has the experts module ``name``.
        name: of the experts module itself, inside its wrappers.
        state: of the module; its ``deltas`` are set.
        tp: ranks with the same tokens and the same lora_A and lora_B, or None.

    Returns:
        name of the outermost wrapper, or ``name`` where there is none.
    """
    for outer, wrapper in _wrappers(model, name):
        parameter = wrapper.parameter_name
        state.deltas[parameter] = _Lora(wrapper, state, tp)
        state.notes.append(f"LoRA on {parameter} ({', '.join(wrapper.lora_A)})")
        wrapper.__class__ = subclass(type(wrapper), **_MEMBERS)
        name = outer
    return name


def why_not_lora(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Say why what PEFT has put in or around an experts module cannot stay, if so."""
    for inner, child in module.named_modules():
        if _is_of_peft(child):
            return (
                f"PEFT has wrapped {inner} in it, expected LoRA on stacked parameters "
                "(target_parameters): lists of experts are stacked, and lora_A and "
                "lora_B would lose their names"
            )
    wrappers = _wrappers(model, name)
    if not wrappers:
        return None
    adapter = find_adapter(module)(module)
    parameters = adapter.expert_parameters(module)
    for outer, wrapper in wrappers:
        reason = _why_not(wrapper, parameters, adapter.num_experts)
        if reason:
            return f"PEFT's {type(wrapper).__name__} around it, {outer}, {reason}"
    return None


def _why_not(
    wrapper: nn.Module, parameters: dict[str, nn.Parameter], num_experts: int
) -> str | None:
    if type(wrapper).__name__ != "ParamWrapper":
        return "is not LoRA: expected LoraConfig(target_parameters=...)"
    if wrapper.merged:
        return "is merged into the weights: call unmerge_adapter() first"
    parameter = parameters.get(wrapper.parameter_name)
    if parameter is None:
        return (
            f"is for {wrapper.parameter_name}, expected one of the experts' "
            f"parameters: {', '.join(parameters)}"
        )
    if parameter.ndim not in (2, 3) or parameter.shape[0] != num_experts:
        return (
            f"is for {wrapper.parameter_name} {tuple(parameter.shape)}, expected "
            f"({num_experts}, ...) with two or three dimensions"
        )
    if parameter.dtype.itemsize < 2:
        return f"is for weights in {parameter.dtype}, expected 16 bits or more"
    if any(not isinstance(it, nn.Identity) for it in wrapper.lora_dropout.values()):
        return "has dropout, which cannot be drawn per token here: set lora_dropout=0"
    if wrapper.lora_variant or any(wrapper.lora_bias.values()):
        return "is a variant of LoRA (DoRA, lora_bias, ...): expected plain LoRA"
    return None


@dataclass(frozen=True)
class _Lora:
    """Adds the active adapters of one wrapper to this rank's part of a parameter."""

    wrapper: nn.Module
    state: ParallelExperts
    tp: DeviceMesh | None

    def __call__(self, part: Tensor) -> Tensor:
        wrapper = self.wrapper
        if wrapper.disable_adapters:
            return part
        for adapter in wrapper.active_adapters:
            if adapter in wrapper.lora_A:
                part = self._add(part, adapter)
        return part

    def _add(self, part: Tensor, adapter: str) -> Tensor:
        """Part + scaling * B A, of this rank's experts; (e, ...)."""
        a = self._whole(adapter, "lora_A").to(part.dtype)
        b = self._whole(adapter, "lora_B").to(part.dtype)
        scaling = self.wrapper.scaling[adapter]
        own = self.state.local_experts
        if part.ndim == 2:  # (e, O): a (r, O), b (E, r)
            return torch.addmm(part, b[own], a, alpha=scaling)
        # As PEFT lays them out: a (E * r, I) by expert, b (O, r * E) by rank.
        num_experts = self.state.adapter.num_experts
        a = a.unflatten(0, (num_experts, -1))[own]  # (e, r, I)
        b = b.unflatten(1, (-1, num_experts))[..., own].permute(2, 0, 1)  # (e, O, r)
        if not self.wrapper._did_swap_in_out_features:  # part is (e, I, O)
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return torch.baddbmm(part, b, a, alpha=scaling)

    def _whole(self, adapter: str, which: str) -> Tensor:
        """lora_A or lora_B; gradients are summed over tp, whose experts differ."""
        weight = getattr(self.wrapper, which)[adapter].weight
        if not isinstance(weight, DTensor):
            if self.tp is None:
                return weight
            weight = DTensor.from_local(weight, self.tp, [Replicate()], run_check=False)
        if not all(isinstance(it, Replicate) for it in weight.placements):
            raise ValueError(
                f"{which} of {self.wrapper.parameter_name} is placed as "
                f"{weight.placements} in the forward, expected it whole: apply "
                "fully_shard to the block around the experts, or to the outermost "
                "wrapper, not to parts of it"
            )
        return weight.to_local(grad_placements=[Partial()] * len(weight.placements))


def _wrappers(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Names and PEFT layers around the module ``name``, from the inside out."""
    found: list[tuple[str, nn.Module]] = []
    outer, _, child = name.rpartition(".")
    while child == "base_layer":
        wrapper = model.get_submodule(outer)
        if not _is_of_peft(wrapper):
            break
        found.append((outer, wrapper))
        outer, _, child = outer.rpartition(".")
    return found


def _is_of_peft(module: nn.Module) -> bool:
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    self._check_forward_args(x, *args, **kwargs)
    kwargs.pop("adapter_names", None)
    return self.base_layer(x, *args, **kwargs)


def _refuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"LoRA on {self.parameter_name} cannot be merged or taken off while the "
        "experts lie on several ranks: save the adapter "
        "(automoe.save_pretrained), and merge it in a single process"
    )


_MEMBERS = {
    "forward": _forward,
    "merge": _refuse,
    "unload_and_optionally_merge_module": _refuse,
}
