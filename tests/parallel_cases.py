# SPDX-License-Identifier: Apache-2.0
"""Training of a small model on ranks, and the same training in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel_model import SEQ_LEN, VOCAB, Model, Spec, build
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import torch_automoe as automoe
from torch_automoe.parallel.experts import parallel_state

# What float64 leaves of an exact equality after five steps of Adam.
TOLERANCE = 1e-10
# Smaller than the norms that occur, so that every step is clipped.
MAX_NORM = 0.5


@functools.cache
def moe_mesh(*, ep_backend: str | None = None, **sizes: int) -> automoe.MoEMesh:
    """A mesh that cases of the same sizes share; groups stay until ranks end."""
    override = {"ep": ep_backend} if ep_backend else None
    return automoe.init_moe_mesh("cpu", backend_override=override, **sizes)


@functools.cache
def user_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A mesh as users make it."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


@dataclass(frozen=True)
class Place:
    """Which data a rank has.

    Attributes:
        index: of the data parallel rank.
        size: data parallel ranks.
        cp: which part of each sequence.
        cp_size: parts of a sequence.
    """

    index: int
    size: int
    cp: int = 0
    cp_size: int = 1

    @classmethod
    def of(cls, mesh: automoe.MoEMesh) -> Place:
        """Where this rank is in the dense view."""
        index = 0
        for place, size in zip(
            mesh.dense.get_coordinate(), mesh.dense.shape, strict=True
        ):
            index = index * size + place
        cp_size = 1 if mesh.cp is None else mesh.cp.size()
        return cls(
            index // cp_size, mesh.dense.size() // cp_size, index % cp_size, cp_size
        )


def draw_batch(spec: Spec, step: int, place: Place) -> tuple[Tensor, Tensor]:
    """Token ids and targets (B, S) of one data parallel rank in one step."""
    start = sum(spec.sequences[: place.index])
    generator = torch.Generator().manual_seed(100 + step)
    shape = (sum(spec.sequences), SEQ_LEN + 1)
    ids = torch.randint(VOCAB, shape, generator=generator)
    ids = ids[start : start + spec.sequences[place.index]]
    each = SEQ_LEN // place.cp_size
    part = slice(place.cp * each, (place.cp + 1) * each)
    return ids[:, :-1][:, part], ids[:, 1:][:, part]


def loss_of(logits: Tensor, targets: Tensor, denominator: float) -> Tensor:
    """Cross entropy, summed and divided."""
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total / denominator


@dataclass
class History:
    """What a training gave.

    Attributes:
        losses: mean over all tokens, of each step.
        norms: of the gradients before they are clipped.
        parameters: in the end, whole.
        grads: of the last step, whole; None where there is none.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor | None] = field(default_factory=dict)

    def differences(self, other: History) -> dict[str, float]:
        """The largest difference of each thing that this history has."""
        found = {
            "losses": _difference(self.losses, other.losses),
            "norms": _difference(self.norms, other.norms),
        }
        for name, parameter in self.parameters.items():
            found[name] = _difference(parameter, other.parameters[name])
            grad, expected = self.grads[name], other.grads[name]
            if (grad is None) != (expected is None):
                found[f"{name}.grad is there"] = float("inf")
            elif grad is not None:
                found[f"{name}.grad"] = _difference(grad, expected)
        return found


def _difference(found: Any, expected: Any) -> float:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    largest = (found.double() - expected.double()).abs().amax() if len(found) else 0.0
    return float("inf") if torch.as_tensor(largest).isnan() else float(largest)


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, on every rank."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()  # of replicas: the same memory
    return tensor.clone()


def whole_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Parameters and gradients by name; collective."""
    named = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
    }
    grads = {
        name: None if parameter.grad is None else whole(parameter.grad)
        for name, parameter in named.items()
    }
    return {name: whole(parameter) for name, parameter in named.items()}, grads


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW; plain parameters and DTensors apart, as one call takes one kind."""
    kinds: dict[type, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kinds.setdefault(type(parameter.data), []).append(parameter)
    groups = [{"params": parameters} for parameters in kinds.values()]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True)


Backward = Callable[[int], Tensor]


def train(
    model: nn.Module,
    backward: Backward,
    spec: Spec,
    clip: Callable[[Iterable[Tensor]], Tensor],
) -> History:
    """Train; ``backward`` takes a step to its loss and has gone backward from it."""
    optimizer = adamw(model)
    history = History()
    for step in range(spec.steps):
        optimizer.zero_grad()
        history.losses.append(float(backward(step).detach()))
        history.norms.append(float(clip(model.parameters())))
        if step == spec.steps - 1:
            _, history.grads = whole_state(model)
        optimizer.step()
    history.parameters, _ = whole_state(model)
    return history


@functools.cache
def reference(spec: Spec) -> History:
    """The training in one process, by stock means."""
    model = build(spec)

    def backward(step: int) -> Tensor:
        rows = [
            draw_batch(spec, step, Place(index, len(spec.sequences)))
            for index in range(len(spec.sequences))
        ]
        ids, targets = (torch.cat(parts) for parts in zip(*rows, strict=True))
        loss = loss_of(model(ids), targets, targets.numel())
        loss.backward()
        return loss

    def clip(parameters: Iterable[Tensor]) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, MAX_NORM)

    return train(model, backward, spec, clip)


def with_data(spec: Spec, mesh: automoe.MoEMesh) -> Spec:
    """The same data for another number of data parallel ranks, where that goes."""
    size = Place.of(mesh).size
    if len(spec.sequences) == size:
        return spec
    return replace(spec, sequences=(sum(spec.sequences) // size,) * size)


def train_parallel(
    spec: Spec,
    model: nn.Module,
    mesh: automoe.MoEMesh,
    *,
    micro_batches: int = 1,
    run: Callable[[Tensor], Tensor] | None = None,
    finish: Callable[[], None] | None = None,
) -> History:
    """Train what has been made parallel.

    Args:
        micro_batches: parts of a step, by sequences; gradients travel after the last.
        run: the model as it is called, e.g. compiled.
        finish: called after each backward: averages by hand.
    """
    place = Place.of(mesh)
    # The mean over ranks of what each divides by its share is the mean over tokens.
    denominator = sum(spec.sequences) * SEQ_LEN / (place.size * place.cp_size)
    call = model if run is None else run

    def backward(step: int) -> Tensor:
        parts = zip(
            *(t.chunk(micro_batches) for t in draw_batch(spec, step, place)),
            strict=True,
        )
        losses = []
        for index, (ids, targets) in enumerate(parts):
            if micro_batches > 1:
                last = index + 1 == micro_batches
                model.set_requires_gradient_sync(last)
                model.set_is_last_backward(last)
            losses.append(loss_of(call(ids), targets, denominator))
            losses[-1].backward()
        if finish is not None:
            finish()
        return mean_over(torch.stack(losses).sum().detach(), mesh.dense)

    def clip(parameters: Iterable[Tensor]) -> Tensor:
        return automoe.clip_grad_norm_(parameters, MAX_NORM, mesh=mesh)

    return train(model, backward, spec, clip)


def mean_over(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """Average in place over all dimensions of a mesh."""
    for dim, size in enumerate(mesh.shape):
        dist.all_reduce(value, group=mesh.get_group(dim))
        value /= size
    return value


def check_same(
    found: History, expected: History, tolerance: float = TOLERANCE
) -> float:
    """Raise AssertionError naming what differs; return the largest difference."""
    differences = found.differences(expected)
    bad = {name: value for name, value in differences.items() if value > tolerance}
    assert not bad, f"differences above {tolerance}: {bad}"
    return max(differences.values())


def compare(
    spec: Spec, model: nn.Module, mesh: automoe.MoEMesh, **options: Any
) -> float:
    """Train in parallel and in one process; return the largest difference."""
    spec = with_data(spec, mesh)
    found = train_parallel(spec, model, mesh, **options)
    for module in model.modules():
        state = parallel_state(module)
        if state is not None and state.shared is not None:
            assert state.shared.misses == 0, automoe.explain(model)
    return check_same(found, reference(spec))


# ---- what users write beside automoe.parallelize ----


def units(model: Model) -> Iterator[nn.Module]:
    """What is given to ``fully_shard`` one by one."""
    yield from model.layers.values()
    yield model


def shard_dense(model: Model, mesh: automoe.MoEMesh, **options: Any) -> None:
    """Stock FSDP2 over everything but the experts."""
    for unit in units(model):
        fully_shard(unit, mesh=mesh.dense, **options)


def shard_all(
    model: Model, mesh: automoe.MoEMesh, styles: Any = None, *, nested: bool = True
) -> Model:
    """Experts on ep and FSDP2: with units of their own, or meshes of their own."""
    automoe.parallelize(model, mesh, styles, fully_shard_experts=nested)
    if nested:
        shard_dense(model, mesh)
    else:
        place = automoe.shard_placement_fn(mesh)
        shard_dense(model, mesh, shard_placement_fn=place)
        automoe.set_gradient_divide_factors(model, mesh)
    return model


def average_by_hand(model: nn.Module, mesh: automoe.MoEMesh) -> None:
    """What FSDP does with gradients, for a model without it."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            # Dispatch has summed over ep.
            grad = mean_over(parameter.grad.to_local(), mesh.sparse)
            grad /= mesh.ep.size()
        else:
            mean_over(parameter.grad, mesh.dense)


def tensor_parallel(
    model: Model, tp: DeviceMesh, *, sequence: bool = False, tokens: str = "replicated"
) -> None:
    """Stock tensor parallelism of all but the experts.

    Args:
        sequence: between the layers each rank has a part of every sequence.
        tokens: "sharded" leaves the experts' block such a part; else it gets all.
    """
    part = Shard(1) if sequence else Replicate()
    in_block = part if tokens == "sharded" else Replicate()
    plan: dict[str, Any] = {
        "layers.*.attention.[qkv]": ColwiseParallel(),
        "layers.*.attention.o": RowwiseParallel(output_layouts=part),
        "layers.*.moe.shared_expert.up": ColwiseParallel(input_layouts=in_block),
        "layers.*.moe.shared_expert.down": RowwiseParallel(output_layouts=in_block),
        "head": ColwiseParallel(input_layouts=part, output_layouts=Replicate()),
    }
    if sequence:
        plan |= {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=part),
            "layers.*.*_norm": SequenceParallel(),
            "norm": SequenceParallel(),
            "layers.*.attention": PrepareModuleInput(
                input_layouts=part, desired_input_layouts=Replicate()
            ),
            "layers.*.moe": PrepareModuleInputOutput(
                input_layouts=part,
                desired_input_layouts=in_block,
                use_local_input=True,
                output_layouts=in_block,
                desired_output_layouts=part,
            ),
        }
    if tokens == "sharded":
        # Sums its gradient over the parts.
        plan["layers.*.moe.router.gate"] = SequenceParallel(use_local_output=True)
    parallelize_module(model, tp, plan)
