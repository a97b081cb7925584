# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism beside every other parallelism trains as one process does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool
from parallel_cases import (
    MAX_NORM,
    TOLERANCE,
    Place,
    average_by_hand,
    check_same,
    compare,
    draw_batch,
    loss_of,
    mean_over,
    moe_mesh,
    reference,
    shard_all,
    shard_dense,
    tensor_parallel,
    train,
    train_parallel,
    user_mesh,
)
from parallel_model import Experts, Model, Spec, build
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import torch_automoe as automoe
from torch_automoe import as_moe_mesh

SPEC = Spec()
EIGHT = Spec(sequences=(1,) * 8)

# ---- what runs on the ranks; each returns the largest difference ----


def fsdp(*, nested: bool = True, micro_batches: int = 1, **options: Any) -> float:
    """FSDP2 or HSDP; options of the mesh and of the model."""
    sizes = ("ep", "dp_replicate", "ep_backend")
    mesh = moe_mesh(**{name: options.pop(name) for name in sizes if name in options})
    spec = replace(SPEC, **options)
    model = shard_all(build(spec), mesh, nested=nested)
    return compare(spec, model, mesh, micro_batches=micro_batches)


def no_fsdp(ep: int) -> float:
    """Whole parameters, averaged by hand as DDP would."""
    mesh, model = moe_mesh(ep=ep), build(SPEC)
    automoe.parallelize(model, mesh, fully_shard_experts=False)
    finish = functools.partial(average_by_hand, model, mesh)
    return compare(SPEC, model, mesh, finish=finish)


def tp(
    spec: Spec,
    *,
    ep: int,
    tokens: str = "replicated",
    nested: bool = True,
    **options: Any,
) -> float:
    """Tensor parallelism, with or without sequence parallelism."""
    mesh, model = moe_mesh(ep=ep, tp=2), build(spec)
    tensor_parallel(model, mesh.tp, tokens=tokens, **options)
    style = automoe.ExpertParallel(tokens=tokens)
    shard_all(model, mesh, {"*": style}, nested=nested)
    waiting = torch._C._distributed_c10d._get_work_registry_size()
    largest = compare(spec, model, mesh)
    # No result of a collective was left without being waited for.
    assert torch._C._distributed_c10d._get_work_registry_size() == waiting
    return largest


def cp(*, ep: int, **sizes: int) -> float:
    """Context parallelism: each rank has a part of every sequence."""
    mesh = moe_mesh(ep=ep, **sizes)
    model = shard_all(build(SPEC), mesh)
    for layer in model.layers.values():
        layer.attention.cp = mesh.cp
    return compare(SPEC, model, mesh)


def stage_of(spec: Spec, index: int) -> Model:
    """One of two stages; parameters have the names of the whole model."""
    model = build(spec)
    del model.layers[str(1 - index)]
    if index == 0:
        model.norm = model.head = None
    else:
        model.embed = None
    return model


def pp(schedule: str, *, ep: int) -> float:
    """Two stages with ep groups of their own, four micro-batches."""
    mesh = moe_mesh(ep=ep, pp=2)
    index = mesh.pp.get_local_rank()
    spec = replace(SPEC, sequences=(4,) * (dist.get_world_size() // 2))
    model = shard_all(stage_of(spec, index), mesh)
    group = mesh.pp.get_group()
    stage = PipelineStage(model, index, 2, torch.device("cpu"), group=group)
    pipeline = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[schedule](
        stage, 4, loss_fn=lambda logits, ids: loss_of(logits, ids, ids.numel())
    )

    def backward(step: int) -> Tensor:
        ids, targets = draw_batch(spec, step, Place.of(mesh))
        losses: list[Tensor] = []
        if index == 0:
            pipeline.step(ids)
        else:
            pipeline.step(target=targets, losses=losses)
        loss = (
            torch.stack(losses).mean().detach() if losses else ids.new_zeros(()) + 0.0
        )
        loss = loss.double()
        dist.all_reduce(loss, group=group)
        return mean_over(loss, mesh.dense)

    def clip(parameters: Iterable[Tensor]) -> Tensor:
        return automoe.clip_grad_norm_(parameters, MAX_NORM, mesh=mesh)

    return check_same(train(model, backward, spec, clip), reference(spec))


def checkpointing(kind: str, nested: bool) -> float:
    """Activation checkpointing of every layer."""
    options: dict[str, Any] = {"checkpoint_impl": CheckpointImpl.NO_REENTRANT}
    if kind == "reentrant":
        options["checkpoint_impl"] = CheckpointImpl.REENTRANT
    elif kind != "full":
        policy = automoe.checkpoint_policy(save_dispatch=kind == "save dispatch")
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, policy
        )
    mesh, model = moe_mesh(ep=2), build(SPEC)
    for name, layer in model.layers.items():
        model.layers[name] = checkpoint_wrapper(layer, **options)
    return compare(SPEC, shard_all(model, mesh, nested=nested), mesh)


def compiled(what: str) -> float:
    """torch.compile of the experts as one graph, or of the model with breaks."""
    spec = replace(SPEC, layers=1, steps=2)
    mesh, model = moe_mesh(ep=2), build(spec)
    torch._dynamo.reset()
    options: dict[str, Any] = {}
    if what == "experts":
        automoe.parallelize(model, mesh, fully_shard_experts=False)
        experts = model.layers["0"].moe.experts
        experts.compile(backend="aot_eager", fullgraph=True)
        options["finish"] = functools.partial(average_by_hand, model, mesh)
    else:
        shard_all(model, mesh)
        options["run"] = torch.compile(model, backend="eager")
    largest = compare(spec, model, mesh, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    return largest


def offloaded() -> float:
    """Parameters and gradients rest on the CPU, as FSDP means it."""
    mesh, model = moe_mesh(ep=2), build(SPEC)
    policy = CPUOffloadPolicy(pin_memory=False)
    automoe.parallelize(model, mesh, offload_policy=policy)
    shard_dense(model, mesh, offload_policy=policy)
    return compare(SPEC, model, mesh)


def own_mesh(shape: tuple[int, ...], names: tuple[str, ...], style: bool) -> float:
    """A mesh of the user's; with ``style``, the experts too are given by hand."""
    theirs, model = user_mesh(shape, names), build(SPEC)
    mesh = as_moe_mesh(theirs)
    if style:
        plan = {"layers.*.moe.experts": automoe.ExpertParallel()}
        parallelize_module(model, theirs["ep"], plan)
        for layer in model.layers.values():
            experts = layer.moe.experts
            place = lambda parameter: Shard(1)  # noqa: E731
            fully_shard(experts, mesh=theirs["dp"], shard_placement_fn=place)
        automoe.set_gradient_divide_factors(model, theirs)
    else:
        automoe.parallelize(model, theirs)
    shard_dense(model, mesh)
    return compare(SPEC, model, mesh)


def without_gradients(ep: int) -> float:
    """eval and no_grad, before and after training, and a model that is all frozen."""
    mesh = moe_mesh(ep=ep)
    ids, _ = draw_batch(SPEC, 0, Place.of(mesh))
    largest = 0.0
    for frozen in ((), ("",)):
        spec = replace(SPEC, frozen=frozen)
        model, whole = shard_all(build(spec), mesh).eval(), build(spec).eval()
        with torch.no_grad():
            largest = max(largest, float((model(ids) - whole(ids)).abs().max()))
    assert not model(ids).requires_grad
    return largest


def mixed_precision(ep: int) -> dict[str, float]:
    """bf16 parameters, fp32 sums: against the same on ep 1, and against float32."""
    spec = replace(SPEC, dtype=torch.float32, steps=2)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    )
    found = []
    for size in (ep, 1):
        mesh, model = moe_mesh(ep=size), build(spec)
        automoe.parallelize(model, mesh, mp_policy=policy)
        shard_dense(model, mesh, mp_policy=policy)
        found.append(train_parallel(spec, model, mesh))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    ours, alone, exact = *found, reference(spec)
    return {
        "first loss": abs(ours.losses[0] - alone.losses[0]),
        "first norm": abs(ours.norms[0] / alone.norms[0] - 1),
        "second loss": abs(ours.losses[1] - alone.losses[1]),
        "first loss, float32": abs(ours.losses[0] - exact.losses[0]),
        "first norm, float32": abs(ours.norms[0] / exact.norms[0] - 1),
    }


def refusals() -> dict[str, str]:
    """What is said of bad arguments."""
    mesh = moe_mesh(ep=2)
    twice, sharded = shard_all(build(SPEC), mesh), build(SPEC)
    fully_shard(sharded, mesh=mesh.dense)
    odd = torch.nn.ModuleDict({"experts": Experts(4)})
    odd["experts"].bias = torch.nn.Parameter(torch.empty(4, 3))
    calls: dict[str, Callable[[], Any]] = {
        "ep 3": lambda: automoe.init_moe_mesh("cpu", ep=3),
        "ep 0": lambda: automoe.init_moe_mesh("cpu", ep=0),
        "tp 3": lambda: automoe.init_moe_mesh("cpu", ep=1, tp=3),
        "ep over pp": lambda: automoe.init_moe_mesh("cpu", ep=4, pp=2),
        "mesh without ep": lambda: automoe.parallelize(
            build(SPEC), user_mesh((4,), ("dp",))
        ),
        "mesh with tp": lambda: automoe.parallelize(
            build(SPEC), user_mesh((2, 2), ("tp", "ep"))
        ),
        "mesh dp_replicate, ep": lambda: automoe.parallelize(
            build(SPEC), user_mesh((2, 2), ("dp_replicate", "ep"))
        ),
        "no experts": lambda: automoe.parallelize(torch.nn.Linear(2, 2), mesh),
        "twice": lambda: automoe.parallelize(twice, mesh),
        "after fully_shard": lambda: automoe.parallelize(sharded, mesh),
        "odd dimension": lambda: automoe.parallelize(odd, mesh),
        "style of another module": lambda: parallelize_module(
            torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}),
            mesh.ep,
            {"a": automoe.ExpertParallel()},
        ),
        "tokens": lambda: automoe.ExpertParallel(tokens="some"),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        found[name] = str(error.value)
    assert not isinstance(odd["experts"].bias, DTensor), "changed, though refused"
    return found


# ---- tests ----

DEADLINE = 300.0  # ranks that start import much of torch, beside whatever else runs

EXPECTED_TEXTS = {
    "ep 3": ("ep is 3", "divisor", "4"),
    "ep 0": ("ep is 0", "expected a positive number of ranks"),
    "tp 3": ("cp * tp is 3", "divisor of the number of ranks, 4"),
    "ep over pp": ("ep is 4", "ranks of one stage and replica, 2"),
    "mesh without ep": ("dp=4", 'axis that is named "ep"', "automoe.init_moe_mesh"),
    "mesh with tp": ("('tp', 'ep')", "expected", "automoe.init_moe_mesh"),
    "mesh dp_replicate, ep": ("('dp_replicate', 'ep')", 'expected an axis "dp"'),
    "no experts": ("Linear", "no experts were found", "register_moe_adapter"),
    "twice": ("layers.0.moe.experts", "parallel already", "once"),
    "after fully_shard": ("layers.0.moe.experts", "before fully_shard"),
    "odd dimension": ("bias (4, 3)", "multiple of 2", "larger ep"),
    "style of another module": ("expected parameters", "'weight': (2, 2)"),
    "tokens": ("'some'", '"replicated" or "sharded"'),
}


def case(name: str, fn: Any, *args: Any, **kwargs: Any) -> Any:
    return pytest.param(fn, args, kwargs, id=name)


def check(pool: RankPool, fn: Any, args: tuple, kwargs: dict) -> None:
    assert max(pool.run(fn, *args, deadline=DEADLINE, **kwargs)) <= TOLERANCE


GLOO = {"nodes": [4], "backend": "gloo"}
EMPTY_FIRST, EMPTY_LAST = (0, 2, 2, 2), (2, 2, 2, 0)

FOUR_RANKS = [
    case("fsdp, efsdp 2", fsdp, ep=2),
    case("fsdp, efsdp 1", fsdp, ep=4),
    case("fsdp, ep 1", fsdp, ep=1),
    case("fsdp, mesh of parameters", fsdp, ep=2, nested=False),
    case("fsdp, mesh of parameters, efsdp 1", fsdp, ep=4, nested=False),
    case("fsdp, mesh of parameters, ep 1", fsdp, ep=1, nested=False),
    case("hsdp", fsdp, ep=2, dp_replicate=2),
    case("hsdp, mesh of parameters", fsdp, ep=2, dp_replicate=2, nested=False),
    case("no fsdp, beside ep 2", no_fsdp, ep=2),
    case("no fsdp, beside ep 1", no_fsdp, ep=4),
    case("tp", tp, SPEC, ep=2),
    case("tp, ep 1", tp, SPEC, ep=1),
    case("tp, ep over tp", tp, SPEC, ep=4),
    case("tp, mesh of parameters", tp, SPEC, ep=2, nested=False),
    case("tp, mesh of parameters, ep 1", tp, SPEC, ep=1, nested=False),
    case("tp, mesh of parameters, ep over tp", tp, SPEC, ep=4, nested=False),
    case("sequence parallel", tp, SPEC, ep=2, sequence=True),
    case("sequence parallel, ep over tp", tp, SPEC, ep=4, sequence=True),
    case("tokens sharded", tp, SPEC, ep=4, sequence=True, tokens="sharded"),
    case("cp", cp, ep=2, cp=2),
    case("cp, ep over cp", cp, ep=4, cp=4),
    case("cp, hsdp", cp, ep=2, cp=2, dp_replicate=2),
    case("pp, GPipe", pp, "GPipe", ep=2),
    case("pp, 1F1B", pp, "1F1B", ep=2),
    case("checkpointing", checkpointing, "full", nested=True),
    case("checkpointing, mesh of parameters", checkpointing, "full", nested=False),
    case("checkpointing, reentrant", checkpointing, "reentrant", nested=True),
    case("checkpointing, save plan", checkpointing, "save plan", nested=True),
    case("checkpointing, save dispatch", checkpointing, "save dispatch", nested=True),
    case("compile, experts", compiled, "experts"),
    case("compile, model", compiled, "model"),
    case("accumulation", fsdp, ep=2, sequences=(3,) * 4, micro_batches=3),
    case(
        "accumulation, mesh of parameters",
        fsdp,
        ep=2,
        sequences=(3,) * 4,
        micro_batches=3,
        nested=False,
    ),
    case("offload", offloaded),
    case("5 experts on 4 ranks", fsdp, ep=4, num_experts=5),
    case("3 experts on 4 ranks", fsdp, ep=4, num_experts=3),
    case("3 experts on 4, mesh of parameters", fsdp, ep=4, num_experts=3, nested=False),
    case("3 experts on 2 ranks", fsdp, ep=2, num_experts=3),
    case("3 experts on 2 ranks, hsdp", fsdp, ep=2, dp_replicate=2, num_experts=3),
    case("no tokens on rank 0", fsdp, ep=2, sequences=EMPTY_FIRST),
    case("no tokens on rank 3", fsdp, ep=4, sequences=EMPTY_LAST),
    case("experts without tokens", fsdp, ep=4, num_experts=8, favourites=2),
    case("frozen experts", fsdp, ep=2, frozen=("experts.",)),
    case("frozen router", fsdp, ep=2, frozen=("router",)),
    case(
        "frozen first layer, rank without experts",
        fsdp,
        ep=4,
        num_experts=3,
        frozen=("embed", "layers.0."),
    ),
    case("frozen parts", fsdp, ep=4, frozen=("experts.down", "embed")),
    case("tied experts", fsdp, ep=2, tied=True),
    case("tied experts, efsdp 1", fsdp, ep=4, tied=True, num_experts=3),
    case("own mesh (dp, ep)", own_mesh, (2, 2), ("dp", "ep"), style=False),
    case("own mesh (ep)", own_mesh, (4,), ("ep",), style=False),
    case(
        "own mesh (dp_replicate, dp, ep)",
        own_mesh,
        (2, 1, 2),
        ("dp_replicate", "dp", "ep"),
        style=False,
    ),
    case("parallelize_module", own_mesh, (2, 2), ("dp", "ep"), style=True),
    case("no gradients", without_gradients, ep=2),
    case("no gradients, efsdp 1", without_gradients, ep=4),
]

ON_GLOO = [
    case("fsdp", fsdp, ep=2),
    case("fsdp, mesh of parameters", fsdp, ep=2, nested=False),
    case("automoe on ep alone", fsdp, ep=2, ep_backend="automoe"),
    case("automoe on all of ep", fsdp, ep=4, ep_backend="automoe"),
    case("hsdp", fsdp, ep=2, dp_replicate=2),
    case("sequence parallel", tp, SPEC, ep=4, sequence=True),
    case("cp", cp, ep=2, cp=2),
    case("pp", pp, "1F1B", ep=2),
    case("3 experts on 4 ranks", fsdp, ep=4, num_experts=3),
    case("no tokens on rank 0", fsdp, ep=2, sequences=EMPTY_FIRST),
]

EIGHT_RANKS = [
    case("dp 2, ep 2, tp 2", tp, EIGHT, ep=2),
    case("dp 2, ep 4 over tp 2", tp, EIGHT, ep=4, sequence=True),
    case("pp 2, ep 4", pp, "1F1B", ep=4),
    case("pp 2, ep 2, dp 2", pp, "GPipe", ep=2),
]


@pytest.mark.parametrize("rank_pool", [[2, 2]], indirect=True)
class TestFourRanks:
    @pytest.mark.parametrize(("fn", "args", "kwargs"), FOUR_RANKS)
    def test_equals_one_process(self, rank_pool: RankPool, fn, args, kwargs) -> None:
        check(rank_pool, fn, args, kwargs)

    @pytest.mark.parametrize("ep", [2, 4])
    def test_mixed_precision(self, rank_pool: RankPool, ep: int) -> None:
        found = rank_pool.run(mixed_precision, ep, deadline=DEADLINE)[0]
        # Where nothing has been rounded on the way, ep changes no bit of the loss; sums
        # of bf16 gradients are taken in another order. Two steps on, Adam has made of
        # that what a step of bf16 makes.
        assert found["first loss"] <= 1e-6
        assert found["first norm"] <= 1e-3
        assert found["second loss"] <= 1e-2
        assert found["first loss, float32"] <= 2e-2
        assert found["first norm, float32"] <= 2e-2


@pytest.mark.parametrize(
    "rank_pool", [{"nodes": [4], "backend": "gloo"}], indirect=True
)
@pytest.mark.parametrize(("fn", "args", "kwargs"), ON_GLOO)
def test_equals_one_process_on_gloo(rank_pool: RankPool, fn, args, kwargs) -> None:
    check(rank_pool, fn, args, kwargs)


@pytest.mark.parametrize("rank_pool", [[4, 4]], indirect=True)
@pytest.mark.parametrize(("fn", "args", "kwargs"), EIGHT_RANKS)
def test_equals_one_process_on_8_ranks(rank_pool: RankPool, fn, args, kwargs) -> None:
    check(rank_pool, fn, args, kwargs)
