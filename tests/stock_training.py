# SPDX-License-Identifier: Apache-2.0
"""Cases of stock_cases: FSDP, DDP, sharded optimizers, pipelines. All run on ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from stock_cases import Groups, groups_of
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import (
    default_hooks,
    powerSGD_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import (
    PeriodicModelAverager,
)
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

STEPS = 3
WIDTH = 12


class Net(nn.Module):
    """A few layers whose sizes divide by nothing, a buffer, and two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.left = nn.Linear(WIDTH, 7, bias=False)
        self.right = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor, branch: str = "both") -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        out = x.new_zeros(len(x), 7)
        if branch != "right":
            out = out + self.left(x)
        if branch != "left":
            out = out + self.right(x)
        return out


def make_net(dtype: torch.dtype = torch.float64) -> Net:
    """The same weights on every rank and in every case."""
    torch.manual_seed(7)
    return Net().to(dtype)


def batch(index: int, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs that differ by their index, which is mostly a rank, and by step."""
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = STEPS,
    branches: Iterable[str] = ("both",),
    accumulate: bool = False,
    clip: float | None = None,
) -> list[Tensor]:
    """Take steps on this rank's batches; returns the losses.

    Args:
        branches: of the net, one a step, in turn, shifted by rank.
        accumulate: each step adds a batch within ``no_sync`` before the last one.
        clip: the gradients' norm to this.
    """
    rank, branches, losses = dist.get_rank(), list(branches), []
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        branch = branches[(step + rank) % len(branches)]
        optimizer.zero_grad()
        if accumulate:
            with model.no_sync():
                model(batch(rank, 50 + step, dtype), branch).square().mean().backward()
        loss = model(batch(rank, step, dtype), branch).square().mean()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def values(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, whole."""
    return {
        name: (it.full_tensor() if isinstance(it, DTensor) else it).detach().clone()
        for name, it in model.state_dict().items()
    }


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """An optimizer with state."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


# ---- FSDP ----


def fsdp2(
    groups: Groups,
    shape: tuple[int, ...] = (4,),
    *,
    reshard: bool | int = True,
    mixed: bool = False,
    divide: float | None = None,
    force_sum: bool = False,
    clip: float | None = None,
) -> object:
    """fully_shard over a mesh of any shape: two dimensions are HSDP.

    In float32: gradients of other dtypes than that and bfloat16 are summed and divided
    apart, these are averaged by AVG, or by PREMUL_SUM if there is a divide factor.

    Args:
        divide: a divide factor of the gradients.
        force_sum: neither AVG nor PREMUL_SUM.
    """
    model = make_net(torch.float32)
    options: dict = {"mesh": groups.mesh(*shape), "reshard_after_forward": reshard}
    if mixed:
        # BatchNorm's statistics stay as they are, so its weights do too.
        fully_shard(model.norm, **options)
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    for layer in (model.first, model.left, model.right):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, nn.Linear | Net):
            if force_sum:
                module.set_force_sum_reduction_for_comms(True)
            if divide is not None:
                module.set_gradient_divide_factor(divide)
    losses = train(model, sgd(model.parameters()), clip=clip)
    return losses, values(model)


def fsdp2_divided(groups: Groups, divide: float) -> tuple[object, object]:
    """What fsdp2 with a divide factor comes to, and the same without FSDP."""
    found = fsdp2(groups, divide=divide)
    # BatchNorm sees one rank's batch, so each batch has buffers of its own.
    model = make_net(torch.float32)
    optimizer, losses = sgd(model.parameters()), []
    size, rank = dist.get_world_size(), dist.get_rank()
    buffers = [copy.deepcopy(dict(model.named_buffers())) for _ in range(size)]
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(size):
            _load_buffers(model, buffers[index])
            loss = model(batch(index, step, torch.float32)).square().mean()
            (loss / divide).backward()
            buffers[index] = copy.deepcopy(dict(model.named_buffers()))
            if index == rank:
                losses.append(loss.detach())
        optimizer.step()
    _load_buffers(model, buffers[rank])
    return found, (losses, values(model))


def refuses_divided(backend: str) -> str:
    """The error of fsdp2 with a divide factor by a backend without PREMUL_SUM."""
    try:
        fsdp2(groups_of(backend), divide=3.0)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def _load_buffers(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def fsdp1(groups: Groups, strategy: str) -> object:
    """FullyShardedDataParallel; its hybrid strategy takes two groups."""
    chosen = ShardingStrategy[strategy]
    group: object = groups.world
    if chosen is ShardingStrategy.HYBRID_SHARD:
        mesh = groups.mesh(2, 2)
        group = (mesh.get_group(1), mesh.get_group(0))
    model = FullyShardedDataParallel(
        make_net(),
        group,
        chosen,
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    losses = train(model, sgd(model.parameters()))
    with FullyShardedDataParallel.summon_full_params(model):
        return losses, values(model)


# ---- DDP ----


def ddp(
    groups: Groups,
    *,
    branches: tuple[str, ...] = ("both",),
    accumulate: bool = False,
    **options: object,
) -> object:
    """DistributedDataParallel in several buckets, with buffers."""
    model = DistributedDataParallel(
        make_net(), process_group=groups.world, bucket_cap_mb=0.0005, **options
    )
    optimizer = sgd(model.parameters())
    losses = train(model, optimizer, branches=branches, accumulate=accumulate)
    return losses, values(model)


HOOKS: dict[str, Callable[[Groups], tuple[object, Callable]]] = {
    "allreduce": lambda it: (it.world, default_hooks.allreduce_hook),
    "fp16": lambda it: (it.world, default_hooks.fp16_compress_hook),
    "power_sgd": lambda it: (_power_sgd(it), powerSGD_hook.powerSGD_hook),
    "fp16_power_sgd": lambda it: (
        _power_sgd(it),
        default_hooks.fp16_compress_wrapper(powerSGD_hook.powerSGD_hook),
    ),
}


def _power_sgd(groups: Groups) -> powerSGD_hook.PowerSGDState:
    return powerSGD_hook.PowerSGDState(
        groups.world,
        matrix_approximation_rank=2,
        start_powerSGD_iter=2,
        min_compression_rate=0.5,
    )


def ddp_hook(groups: Groups, hook: str, bucket_mb: float = 25) -> object:
    """A communication hook, which chains on the futures of collectives.

    In one bucket by default: PowerSGD waits for a future within a callback of another,
    and gloo, which has two threads a group, hangs with several buckets.
    """
    model = DistributedDataParallel(
        make_net(torch.float32), process_group=groups.world, bucket_cap_mb=bucket_mb
    )
    model.register_comm_hook(*HOOKS[hook](groups))
    losses = train(model, sgd(model.parameters()), steps=5)
    return losses, values(model)


def nested_futures(groups: Groups) -> tuple[object, object]:
    """PowerSGD in several buckets, twice: many callbacks wait for other futures."""
    torch.manual_seed(5)
    first = ddp_hook(groups, "power_sgd", 0.0005)
    torch.manual_seed(5)
    return first, ddp_hook(groups, "power_sgd", 0.0005)


def ddp_join(groups: Groups) -> object:
    """Ranks with more batches go on while those that ran out shadow them."""
    model = DistributedDataParallel(make_net(), process_group=groups.world)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.SGD, process_group=groups.world, lr=0.05
    )
    model.eval()  # BatchNorm in training synchronises buffers from a missing rank
    losses = []
    with dist.algorithms.join.Join([model, optimizer]):
        for step in range(2 + dist.get_rank()):
            optimizer.zero_grad()
            loss = model(batch(dist.get_rank(), step)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return losses, values(model)


def post_local_sgd(groups: Groups) -> object:
    """Gradients over half of the ranks; models averaged over all now and then."""
    model = DistributedDataParallel(make_net(), process_group=groups.world)
    state = PostLocalSGDState(groups.world, groups.halves, start_localSGD_iter=1)
    model.register_comm_hook(state, post_localSGD_hook)
    averager = PeriodicModelAverager(2, warmup_steps=1, process_group=groups.world)
    optimizer = PostLocalSGDOptimizer(sgd(model.parameters()), averager)
    losses = train(model, optimizer, steps=4)
    return losses, values(model)


def zero_optimizer(groups: Groups, *, views: bool) -> object:
    """ZeroRedundancyOptimizer under DDP, and its state collected on a rank."""
    model = DistributedDataParallel(make_net(), process_group=groups.world)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        torch.optim.AdamW,
        process_group=groups.world,
        parameters_as_bucket_view=views,
        lr=0.05,
        eps=1e-3,  # the bias before BatchNorm has no gradient but rounding
    )
    losses = train(model, optimizer)
    optimizer.consolidate_state_dict(to=1)
    state = {}
    if dist.get_rank() == 1:
        state = optimizer.state_dict()["state"]
    return losses, values(model), state


# ---- pipelines ----


def pipeline(groups: Groups, schedule: str) -> object:
    """Two steps of a pipeline over all ranks; the last stage has the loss."""
    from torch.distributed.pipelining import PipelineStage, schedules

    kind = schedules.get_schedule_class(schedule)
    rank, size = dist.get_rank(), dist.get_world_size()
    single = issubclass(kind, schedules.PipelineScheduleSingle)
    stages_of = [rank] if single else [rank, rank + size]
    if schedule in ("ZBVZeroBubble", "DualPipeV"):
        stages_of = [rank, 2 * size - 1 - rank]
    count = size if single else 2 * size
    torch.manual_seed(3)
    layers = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(count)
    ]
    mine = [layers[index] for index in stages_of]
    stages = [
        PipelineStage(layer, index, count, torch.device("cpu"), group=groups.world)
        for index, layer in zip(stages_of, mine, strict=True)
    ]
    runner = kind(
        stages[0] if single else stages,
        n_microbatches=2 * size,
        loss_fn=nn.functional.mse_loss,
    )
    return _run_pipeline(runner, mine, stages_of, count)


def _run_pipeline(runner, mine, stages_of: list[int], count: int) -> object:
    size = 2 * dist.get_world_size()
    parameters = [it for layer in mine for it in layer.parameters()]
    optimizer, results = sgd(parameters), []
    for step in range(2):
        optimizer.zero_grad()
        torch.manual_seed(40 + step)
        x = torch.randn(3 * size, WIDTH, dtype=torch.float64)
        target = torch.randn(3 * size, WIDTH, dtype=torch.float64)
        first, last = 0 in stages_of, count - 1 in stages_of
        losses: list[Tensor] = []
        inputs = (x,) if first else ()
        options = {"target": target, "losses": losses} if last else {}
        output = runner.step(*inputs, **options)
        optimizer.step()
        results += [it.detach() for it in losses]
        results += [output.detach()] if last else []
    return results, [it.detach() for it in parameters]


pipeline.counted = False  # sends and receives only
