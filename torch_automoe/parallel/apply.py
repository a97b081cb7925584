# SPDX-License-Identifier: Apache-2.0
"""One call that gives a model expert parallelism, and what it did."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from torch_automoe.parallel.adapters import find_adapter
from torch_automoe.parallel.blocks import Block, find_block
from torch_automoe.parallel.expert_lists import (
    is_container,
    stack_container,
    why_not_stackable,
)
from torch_automoe.parallel.experts import (
    ParallelExperts,
    make_parallel,
    parallel_state,
)
from torch_automoe.parallel.fsdp import (
    expert_shard_dim,
    set_gradient_divide_factors,
    shard_experts,
)
from torch_automoe.parallel.lora import attach_lora, why_not_lora
from torch_automoe.parallel.mesh import MoEMesh, as_moe_mesh
from torch_automoe.parallel.shared import EarlyShared, find_shared
from torch_automoe.parallel.transformers_experts import register_if_imported


class ExpertParallel(ParallelStyle):
    """Style of an experts module: its experts lie on the ranks of a mesh.

    For ``parallelize_module(model, mesh["ep"], {"layers.*.mlp.experts":
    ExpertParallel()})``, or for ``automoe.parallelize(model, mesh, styles=...)``.

    With ``parallelize_module``, ``fully_shard`` and the scale of gradients
    (``set_gradient_divide_factors``) are left to the caller, shared experts are not run
    early, and LoRA is not looked for.

    Args:
        num_chunks: as ``automoe.moe`` takes it; for experts that weigh their rows
            themselves (``explain`` says "in one chunk") it is always 1.
        tp_mesh: ranks that all hold the same tokens, as tensor parallelism without
            sequence parallelism leaves them: each then sends a part. ``parallelize``
            sets it to the mesh's tp unless ``tokens`` is "sharded".
        tokens: "replicated" or "sharded" over tp.
        overlap_shared: run a shared expert that the block calls after the experts
            while tokens travel.
    """

    def __init__(
        self,
        *,
        num_chunks: int | str = "auto",
        tp_mesh: DeviceMesh | None = None,
        tokens: str = "replicated",
        overlap_shared: bool = True,
    ) -> None:
        super().__init__()
        if num_chunks != "auto" and not (
            isinstance(num_chunks, int) and num_chunks >= 1
        ):
            raise ValueError(
                f"num_chunks is {num_chunks!r}, expected 'auto' or a positive number"
            )
        if tokens not in ("replicated", "sharded"):
            raise ValueError(
                f'tokens is {tokens!r}, expected "replicated" or "sharded"'
            )
        self.num_chunks = num_chunks
        self.tp_mesh = tp_mesh
        self.tokens = tokens
        self.overlap_shared = overlap_shared

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        block = find_block(module)
        experts = block.convert() if block else module
        state = self.apply_to(experts, device_mesh, self.tp_mesh)
        state.notes += [block.note] if block and block.note else []
        return module

    def apply_to(
        self, module: nn.Module, ep: DeviceMesh, tp: DeviceMesh | None
    ) -> ParallelExperts:
        """Shard the experts of ``module`` over ``ep``; return what it knows now.

        Raises:
            ValueError: it cannot be done; the text says why.
        """
        adapter = find_adapter(module)
        if adapter is None:
            raise ValueError(why_not(module))
        reason = why_not_stackable(module) if is_container(module) else None
        reason = reason or adapter(module).why_not(module, ep.size())
        if reason:
            raise ValueError(reason)
        if ep.ndim != 1:
            raise ValueError(f"the mesh of ep has {ep.ndim} dimensions, expected one")
        state = ParallelExperts(
            adapter(module),
            ep,
            tp if self.tokens == "replicated" else None,
            self.num_chunks,
        )
        stack_container(module)
        make_parallel(module, state)
        return state


def parallelize(
    model: nn.Module,
    mesh: MoEMesh | DeviceMesh,
    styles: Mapping[str, ExpertParallel | None] | None = None,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | int = True,
    offload_policy: OffloadPolicy | None = None,
    fully_shard_experts: bool = True,
) -> nn.Module:
    """Give a model expert parallelism, in place; call it before ``fully_shard``.

    Every experts module is found, its parameters become DTensors that are sharded by
    expert over ep, and ``fully_shard`` shards them over the ranks beside. Calls of the
    module go to the ranks that have the experts. Everything else stays as it is: apply
    ``fully_shard(..., mesh=mesh.dense)`` to it next. All ranks must hold the same
    parameters, or meta tensors.

    Found are experts of transformers, modules whose own parameters are all stacked by
    expert, blocks with a ``ModuleList`` of experts (whose routing is found by running
    them on random tokens, so they must have values), and what
    ``register_moe_adapter`` knows. ``automoe.explain(model)`` says what was done.

    Args:
        model: changed in place.
        mesh: ``automoe.init_moe_mesh(...)``, or a mesh with an axis "ep".
        styles: pattern of module names -> how, or None to leave alone; the first
            that matches counts. Default: ``ExpertParallel()`` for all.
        mp_policy: of FSDP, for experts; ``cast_forward_inputs`` is taken as False.
        reshard_after_forward: as ``fully_shard`` takes it.
        offload_policy: of FSDP, for experts.
        fully_shard_experts: False leaves sharding beside ep to ``shard_placement_fn``,
            and the scale of gradients to ``set_gradient_divide_factors``.

    Returns:
        ``model``.

    Raises:
        ValueError: there are no experts, or some that this cannot handle; the text
            names each with its reason. The model is then as it was.
    """
    register_if_imported()
    mesh = as_moe_mesh(mesh)
    found = _find(model, styles or {}, mesh)
    options = {
        "mp_policy": mp_policy,
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": offload_policy,
    }
    for name, (style, block) in found.items():
        module = block.convert() if block else model.get_submodule(name)
        state = style.apply_to(module, mesh.ep, style.tp_mesh or mesh.tp)
        state.notes += [block.note] if block and block.note else []
        outer = attach_lora(model, name, state, style.tp_mesh or mesh.tp)
        _overlap_shared(model, outer, style, state)
        if fully_shard_experts:
            shard_experts(module, mesh, **options)
    if fully_shard_experts:
        set_gradient_divide_factors(model, mesh)
    return model


def _find(
    model: nn.Module, styles: Mapping[str, ExpertParallel | None], mesh: MoEMesh
) -> dict[str, tuple[ExpertParallel, Block | None]]:
    """Styles of all experts modules; raises before anything is changed."""
    default = ExpertParallel()

    def style_of(name: str) -> ExpertParallel | None:
        matching = (
            s for pattern, s in styles.items() if fnmatch.fnmatch(name, pattern)
        )
        return next(matching, default)

    _check_patterns(model, styles)
    found, refused = {}, {}
    known: set[str] = set()
    for name, module in model.named_modules():
        if known and not known.isdisjoint(_outer_names(name)):
            continue
        block = find_block(module)
        experts = ".".join(filter(None, (name, block.child))) if block else name
        if style_of(name) is None or style_of(experts) is None:
            if block:
                known.add(experts)
            continue
        reason = None
        if block is not None or find_adapter(module) is not None:
            found[experts] = style_of(experts), block
            module = model.get_submodule(experts)
            reason = why_not_lora(model, experts, module)
            reason = reason or _why_not_here(block, module, mesh)
        elif looks_like_experts(module):
            reason = why_not(module)
        if reason:
            refused[experts] = reason
        if experts in found or reason:
            known.add(experts)
    if refused:
        raise ValueError(_refusal(model, refused))
    if not found:
        raise ValueError(
            f"model is {type(model).__name__}, and no experts were found in it: "
            "expected modules with parameters that are stacked by expert, or lists "
            "of experts; automoe.register_moe_adapter teaches it other ones"
        )
    return found


def _refusal(model: nn.Module, refused: dict[str, str]) -> str:
    lines = "\n".join(
        f"  {name or '(the model)'} ({type(model.get_submodule(name)).__name__}): "
        f"{reason}"
        for name, reason in refused.items()
    )
    return (
        f"parallelize cannot handle these modules:\n{lines}\nGive styles="
        '{"NAME": None} to leave one alone, or write an adapter for it: '
        "automoe.register_moe_adapter"
    )


def _check_patterns(model: nn.Module, styles: Mapping[str, object]) -> None:
    names = [name for name, _ in model.named_modules()]
    for pattern in styles:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"styles names {pattern!r}, which no module of {type(model).__name__} "
                f"is called; its modules are {', '.join(names[1:6])}, ..."
            )


def _outer_names(name: str) -> Iterator[str]:
    """A name and those of all modules around it: a.b, a and the model."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _why_not_here(block: Block | None, module: nn.Module, mesh: MoEMesh) -> str | None:
    if parallel_state(module) is not None:
        return "it is parallel already; call parallelize once"
    if isinstance(module, FSDPModule) or any(
        isinstance(p, DTensor) for p in module.parameters()
    ):
        return "its parameters are sharded already; call parallelize before fully_shard"
    try:
        if block is not None:
            reason, parameters = block.why_not(), block.parameters
        else:
            adapter = find_adapter(module)(module)
            reason = why_not_stackable(module) if is_container(module) else None
            reason = reason or adapter.why_not(module, mesh.ep.size())
            parameters = adapter.expert_parameters(module)
        if reason is None:
            for name, parameter in parameters.items():
                expert_shard_dim(name, parameter, mesh.sparse)
    except ValueError as error:
        return str(error)
    return reason


def looks_like_experts(module: nn.Module) -> bool:
    """Return whether somebody would expect ``parallelize`` to do something here."""
    name = type(module).__name__.lower()
    return (
        "experts" in name
        and "shared" not in name
        and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    )


def why_not(module: nn.Module) -> str:
    """Say what is missing for a module to be run over several ranks."""
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters(recurse=False)
    }
    return (
        "expected parameters of its own that share dimension 0, the experts, and a "
        f"forward of (tokens, topk_ids, topk_weights); its parameters are {shapes}"
    )


def _overlap_shared(
    model: nn.Module, name: str, style: ExpertParallel, state: ParallelExperts
) -> None:
    parent, _, child = name.rpartition(".")
    if not style.overlap_shared or not child:
        return
    block = model.get_submodule(parent)
    shared = find_shared(block, child)
    if shared is not None and not _is_tied(model, block.get_submodule(child)):
        state.shared = EarlyShared(block, shared)


def _is_tied(model: nn.Module, module: nn.Module) -> bool:
    """Return whether a module has several places, so that its caller is not known."""
    places = model.named_modules(remove_duplicate=False)
    return sum(other is module for _, other in places) > 1


def explain(model: nn.Module) -> str:
    """Say what ``parallelize`` has done to which module, one line each."""
    lines = []
    for name, module in model.named_modules():
        state = parallel_state(module)
        if state is not None:
            lines.append(f"{name or '(the model)'}: {_explain_one(module, state)}")
    return "\n".join(lines) or "no module of this model is expert parallel"


def _explain_one(module: nn.Module, state: ParallelExperts) -> str:
    experts = state.local_experts
    own = (
        f"{experts.start}-{experts.stop - 1}"
        if experts.stop > experts.start
        else "none"
    )
    parts = [
        f"{type(module).__name__} ({state.adapter.kind})",
        f"{state.adapter.num_experts} experts over ep {state.ep.size()}, this rank "
        f"has {own}",
        f"backend {dist.get_backend(state.group)}",
    ]
    if state.adapter.weighs_rows:
        parts.append("in one chunk, as it weighs its rows itself")
    if isinstance(module, FSDPModule):
        parts.append("fully_shard over the ranks beside ep")
    if state.tp is not None:
        parts.append(f"each of tp {state.tp.size()} sends a part of the tokens")
    if state.shared is not None:
        parts.append(
            f"shared expert runs while tokens travel ({state.shared.hits} times, "
            f"{state.shared.misses} in vain)"
        )
    return "; ".join([*parts, *state.notes])
