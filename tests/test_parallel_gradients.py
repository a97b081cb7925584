# SPDX-License-Identifier: Apache-2.0
"""Silent bugs that gradients of experts are known to suffer from, one test for each.

Each test checks our code, and then that the check fails once the bug is put in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from distributed import RankPool
from gathered_experts import gathered
from parallel_cases import (
    TOLERANCE,
    Place,
    adamw,
    compare,
    draw_batch,
    loss_of,
    moe_mesh,
    shard_all,
    shard_dense,
    tensor_parallel,
)
from parallel_model import Model, Spec, build
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)

import torch_automoe as automoe
from torch_automoe.parallel.experts import ParallelExperts, parallel_state

# Experts on every rank: the stand-in that gathers tokens needs them.
SPEC = Spec(steps=1, num_experts=8)
Bug = Callable[[], AbstractContextManager[object]]


def states(model: Model) -> Iterator[ParallelExperts]:
    """What the experts modules of a model know."""
    for module in model.modules():
        state = parallel_state(module)
        if state is not None:
            yield state


# ---- checks, which raise AssertionError; and the bugs that they have to find ----


def check_scale() -> None:
    for sizes in ({"ep": 2}, {"ep": 4}, {"ep": 2, "dp_replicate": 2}):
        mesh = moe_mesh(**sizes)
        compare(SPEC, shard_all(build(SPEC), mesh), mesh)


def fsdp_scales() -> AbstractContextManager[object]:
    return mock.patch(
        "torch_automoe.parallel.apply.set_gradient_divide_factors", lambda *_: None
    )


def check_one_step() -> None:
    mesh = moe_mesh(ep=4)
    compare(SPEC, shard_all(build(SPEC), mesh), mesh)


def weights_without_gradient() -> AbstractContextManager[object]:
    from torch_automoe.parallel.experts import dispatch_beside

    def dispatch(x: Tensor, weights: Tensor, *args: object) -> object:
        return dispatch_beside(x, weights.detach(), *args)

    return mock.patch("torch_automoe.parallel.experts.dispatch_beside", dispatch)


def check_experts_without_tokens() -> None:
    """All tokens go to the experts of rank 0."""
    spec = replace(SPEC, favourites=2)
    mesh = moe_mesh(ep=4)
    model = shard_all(build(spec), mesh)
    optimizer = adamw(model)
    ids, targets = draw_batch(spec, 0, Place.of(mesh))
    loss_of(model(ids), targets, targets.numel()).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert "exp_avg" in optimizer.state[parameter], f"{name} has no state"
        grad = parameter.grad.to_local()
        if ".experts." in name and mesh.ep.get_local_rank() > 0:
            assert grad.numel() > 0 and not grad.any(), f"{name}: {grad}"


@contextmanager
def gradient_of_none() -> Iterator[None]:
    with (
        mock.patch("torch_automoe.parallel.adapters.touch", lambda out, *_: out),
        mock.patch("torch_automoe.parallel.experts.touch", lambda out, *_: out),
    ):
        yield


def check_tensor_parallel() -> None:
    for ep in (2, 4):
        mesh, model = moe_mesh(ep=ep, tp=2), build(SPEC)
        tensor_parallel(model, mesh.tp)
        automoe.parallelize(model, mesh)
        shard_dense(model, mesh)
        compare(SPEC, model, mesh)


def every_tp_rank_sends() -> AbstractContextManager[object]:
    def all_tokens(self: ParallelExperts, module, args, kwargs) -> object:
        return forward(replace(self, tp=None), module, args, kwargs)

    forward = ParallelExperts.forward
    return mock.patch.object(ParallelExperts, "forward", all_tokens)


def slice_of_own_tokens() -> AbstractContextManager[object]:
    """The backward of taking a part leaves out the parts of other ranks."""
    from torch_automoe.parallel.experts import chunk_of

    return mock.patch(
        "torch_automoe.parallel.experts._own_part",
        lambda tensor, tp: tensor[chunk_of(tensor.shape[0], tp)],
    )


def check_dropped_picks() -> None:
    """Some picks have the id -1, and a weight that is not 0."""
    spec = replace(SPEC, topk=3, drop_below=0.3)
    mesh = moe_mesh(ep=4)
    compare(spec, shard_all(build(spec), mesh), mesh)


def check_logits() -> None:
    for ep in (1, 2, 4):
        mesh = moe_mesh(ep=ep)
        ids, _ = draw_batch(SPEC, 0, Place.of(mesh))
        with torch.no_grad():
            found = shard_all(build(SPEC), mesh)(ids)
            largest = float((found - build(SPEC)(ids)).abs().max())
        assert largest <= TOLERANCE, f"logits differ by {largest} on ep {ep}"


def experts_not_counted() -> AbstractContextManager[object]:
    """The norm takes the experts of a rank for something that all ranks have."""
    return mock.patch(
        "torch_automoe.parallel.clip._copies", lambda grad, stage_size: stage_size
    )


def check_counts() -> None:
    """Tokens per expert of a training step with recomputation."""
    mesh, model = moe_mesh(ep=2), build(SPEC)
    for name, layer in model.layers.items():
        model.layers[name] = checkpoint_wrapper(layer)
    shard_all(model, mesh)
    counts = [state.count_tokens() for state in states(model)]
    ids, targets = draw_batch(SPEC, 0, Place.of(mesh))
    loss_of(model(ids), targets, targets.numel()).backward()
    expected: list[Tensor] = []
    whole = build(SPEC)
    for layer in whole.layers.values():
        layer.moe.router.register_forward_hook(
            lambda _, __, out: expected.append(
                out[0].flatten().bincount(minlength=SPEC.num_experts)
            )
        )
    whole(ids)
    assert all(map(torch.equal, counts, expected)), (counts, expected)


def recompute_counts() -> AbstractContextManager[object]:
    return mock.patch("torch_automoe.parallel.experts.add_once", torch.Tensor.add_)


CHECKS: dict[str, tuple[Callable[[], None], dict[str, Bug]]] = {
    # FSDP averages over the ranks beside ep, while dispatch has summed over ep: the
    # gradients of experts come out ep times too large.
    "expert gradients ep times too large": (
        check_scale,
        {"FSDP's own scale": fsdp_scales},
    ),
    # Tokens are gathered, each rank works on all of them, and the backward takes its
    # slice of its own gradient without a sum over the ranks. Or the other way round:
    # a rank takes its slice of tokens that all ranks have, and the backward leaves the
    # rest without a gradient.
    "gathered tokens, sliced gradient": (
        check_tensor_parallel,
        {
            "slice of gathered tokens": lambda: gathered("slice of tokens"),
            "slice of own tokens": slice_of_own_tokens,
        },
    ),
    # Routing weights travel by a collective that autograd does not know, so that the
    # router learns from nothing but its auxiliary loss.
    "routing weights without gradient": (
        check_one_step,
        {
            "dispatched": weights_without_gradient,
            "gathered": lambda: gathered("weights without gradient"),
        },
    ),
    # Experts without tokens have a gradient of None: optimizers skip them on one rank
    # and not on another.
    "experts without tokens": (
        check_experts_without_tokens,
        {"gradient of None": gradient_of_none},
    ),
    # All ranks of tp have the same tokens and all of them send them.
    "tokens counted tp times": (
        check_tensor_parallel,
        {"every rank sends": every_tp_rank_sends},
    ),
    # Picks that are not for this rank are computed by some expert and masked after:
    # the loss is right, and the router has gradients from them.
    "gradients from masked picks": (
        check_dropped_picks,
        {"masked in value alone": lambda: gathered("masked in value")},
    ),
    # Each rank has the gradient of the routing weights for its own experts, and nobody
    # adds them up; or masked weights make 0 times infinity.
    "router gradients of local experts alone": (
        check_one_step,
        {
            "no sum": lambda: gathered("slice of weights"),
            "nan": lambda: gathered("nan"),
        },
    ),
    # Numbers of experts are not made local ones, outputs are not summed, weights do
    # not belong to the rows: each gives other logits.
    "wrong logits": (
        check_logits,
        {
            "numbers wrap around": lambda: gathered("numbers wrap"),
            "no sum of outputs": lambda: gathered("no sum of outputs"),
            "weights of other rows": lambda: gathered("weights of other rows"),
        },
    ),
    # The norm misses experts of other ranks, so that clipping is too weak.
    "norm misses experts": (
        check_tensor_parallel,
        {"counted once": experts_not_counted},
    ),
    # Activation checkpointing repeats the forward, and the load is counted again.
    "load counted twice": (check_counts, {"recompute counts": recompute_counts}),
}


def verdicts(name: str) -> dict[str, str | None]:
    """What the check says to our code, to a sound stand-in, and to each bug."""
    check, bugs = CHECKS[name]
    variants: dict[str, Bug] = {"ours": nullcontext, "gathered": lambda: gathered(None)}
    variants |= {f"bug: {label}": patch for label, patch in bugs.items()}
    found: dict[str, str | None] = {}
    for key, patch in variants.items():
        with patch():
            try:
                check()
                found[key] = None
            except AssertionError as error:
                found[key] = str(error)
    return found


@pytest.mark.parametrize("rank_pool", [[2, 2]], indirect=True)
@pytest.mark.parametrize("name", list(CHECKS))
def test_check_fails_with_the_bug(rank_pool: RankPool, name: str) -> None:
    of_ranks = rank_pool.run(verdicts, name, deadline=300.0)
    for label in of_ranks[0]:
        texts = [found[label] for found in of_ranks]
        if label.startswith("bug: "):
            assert any(texts), f"{name}: the check does not see '{label}'"
        else:
            assert not any(texts), f"{name}, {label}: {texts}"
