# SPDX-License-Identifier: Apache-2.0
"""The reference router against a loop over tokens, and what it counts and brings."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import torch_automoe as automoe

DIM, EXPERTS, TOPK = 8, 12, 3


def make_router(**options: object) -> automoe.Router:
    torch.manual_seed(0)
    router = automoe.Router(DIM, EXPERTS, TOPK, **options).double()
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.randn(EXPERTS) * 0.2)
    return router


def tokens(num_tokens: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, DIM, dtype=torch.float64, generator=generator)


def plain_route(router: automoe.Router, row: Tensor) -> dict[int, float]:
    """The definition for one token, in Python numbers: expert -> weight."""
    logits = router.weight @ row
    if router.bias is not None:
        logits = logits + router.bias
    softmax = router.score_func == "softmax"
    scores = (logits.softmax(0) if softmax else logits.sigmoid()).tolist()
    biased = dict(enumerate(scores))
    if router.expert_bias is not None:
        biased = {i: biased[i] + router.expert_bias[i].item() for i in biased}
    if router.num_groups is not None:
        size = EXPERTS // router.num_groups
        best = 2 if router.group_score == "top2" else 1
        group_scores = {}
        for group in range(router.num_groups):
            members = sorted(biased[group * size + i] for i in range(size))
            group_scores[group] = sum(members[-best:])
        chosen = sorted(group_scores, key=group_scores.get)[-router.topk_groups :]
        biased = {i: score for i, score in biased.items() if i // size in chosen}
    experts = sorted(biased, key=biased.get)[-TOPK:]
    total = sum(scores[i] for i in experts) if router.norm_topk_prob else 1.0
    return {i: scores[i] / total * router.route_scale for i in experts}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_func": "sigmoid", "route_scale": 2.5},
        {"norm_topk_prob": False, "expert_bias": False, "bias": True},
        {"num_groups": 4, "topk_groups": 2},
        {"score_func": "sigmoid", "num_groups": 3, "topk_groups": 1},
        {"num_groups": 4, "topk_groups": 2, "group_score": "max"},
        {"num_groups": 12, "topk_groups": 3},
    ],
    ids=str,
)
def test_router_is_a_loop_over_tokens(options) -> None:
    router = make_router(**options)
    topk_weights, topk_ids = router(tokens())
    assert topk_weights.dtype == torch.float64
    assert topk_ids.dtype == torch.int64
    load = [0] * EXPERTS
    for row, weights, ids in zip(tokens(), topk_weights, topk_ids, strict=True):
        expected = plain_route(router, row)
        assert sorted(ids.tolist()) == sorted(expected)
        for weight, expert in zip(weights.tolist(), ids.tolist(), strict=True):
            assert weight == pytest.approx(expected[expert], abs=1e-12)
            load[expert] += 1
    assert router.num_tokens_per_expert.tolist() == load
    assert router.num_dropped == 0


def test_bias_moves_the_choice_and_never_the_weights() -> None:
    router = make_router(norm_topk_prob=False)
    router.expert_bias.zero_()
    router.expert_bias[5] = 9.0
    topk_weights, topk_ids = router(tokens())
    assert (topk_ids == 5).any(dim=1).all()
    scores = (tokens() @ router.weight.T).softmax(-1)
    assert torch.equal(topk_weights, scores.gather(1, topk_ids))


def test_groups_bound_the_nodes_of_a_token() -> None:
    router = make_router(num_groups=4, topk_groups=2)
    _, topk_ids = router(tokens())
    nodes = [len(set(row)) for row in (topk_ids // 3).tolist()]
    assert max(nodes) == 2
    free = automoe.Router(DIM, EXPERTS, TOPK).double()
    free.load_state_dict(router.state_dict())
    nodes = [len(set(row)) for row in (free(tokens())[1] // 3).tolist()]
    assert max(nodes) == 3


def test_deepseek_v3_router_is_this_router() -> None:
    module = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        hidden_size=DIM,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOPK,
        n_group=4,
        topk_group=2,
    )
    theirs = module.DeepseekV3TopkRouter(config)
    ours = automoe.Router(
        DIM,
        EXPERTS,
        TOPK,
        score_func="sigmoid",
        route_scale=config.routed_scaling_factor,
        num_groups=4,
        topk_groups=2,
    )
    with torch.no_grad():
        theirs.weight.normal_()
        theirs.e_score_correction_bias.normal_(std=0.1)
        ours.weight.copy_(theirs.weight)
        ours.expert_bias.copy_(theirs.e_score_correction_bias)
    x = tokens().float()
    _, their_weights, their_ids = theirs(x)
    our_weights, our_ids = ours(x)

    def dense(weights: Tensor, ids: Tensor) -> Tensor:
        return torch.zeros(len(x), EXPERTS).scatter(1, ids, weights)

    torch.testing.assert_close(
        dense(our_weights, our_ids), dense(their_weights, their_ids)
    )


# ---- capacity ----


@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 1.3, 4.0])
def test_capacity_keeps_the_highest_weights(capacity_factor) -> None:
    router = make_router()
    weights, ids = router(tokens())
    router.capacity_factor = capacity_factor
    kept_weights, kept_ids = router(tokens())
    capacity = -(-capacity_factor * weights.numel() // EXPERTS)
    dropped = 0
    for expert in range(EXPERTS):
        wanted = sorted(weights[ids == expert].tolist(), reverse=True)
        assert (
            sorted(kept_weights[kept_ids == expert].tolist(), reverse=True)
            == (wanted[: int(capacity)])
        )
        dropped += max(0, len(wanted) - int(capacity))
    assert ((kept_ids == ids) | (kept_ids == -1)).all()
    assert (kept_weights[kept_ids == -1] == 0).all()
    assert (kept_ids == -1).sum() == dropped
    assert (dropped == 0) == (capacity_factor == 4.0)
    assert router.num_dropped == dropped
    # Both forwards, dropped picks included: the load that balance has to even out.
    assert router.num_tokens_per_expert.sum() == 2 * weights.numel()


def test_dropped_picks_have_no_gradient() -> None:
    router = make_router(norm_topk_prob=False, capacity_factor=0.5)
    x = tokens().requires_grad_()
    topk_weights, topk_ids = router(x)
    topk_weights.sum().backward()
    expected = tokens().requires_grad_()
    scores = (expected @ router.weight.T).softmax(-1)
    kept = topk_ids >= 0
    (scores.gather(1, topk_ids.clamp(min=0)) * kept).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_equal_weights_are_dropped_from_the_end() -> None:
    router = automoe.Router(DIM, EXPERTS, 1, capacity_factor=1.0)
    x = torch.ones(24, DIM)
    topk_ids = router(x)[1].flatten()
    assert (topk_ids[:2] >= 0).all()
    assert (topk_ids[2:] == -1).all()


# ---- types and state ----


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_are_float32_in_a_bfloat16_model(autocast) -> None:
    router = automoe.Router(DIM, EXPERTS, TOPK)
    router.weight.data = router.weight.data.bfloat16().float()
    x = tokens().bfloat16()
    expected = router(x.float())
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            found = router(x.float())
    else:
        found = router.bfloat16()(x)
    assert found[0].dtype == torch.float32
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_casts_leave_the_bias_wide() -> None:
    router = automoe.Router(DIM, EXPERTS, TOPK)
    router.expert_bias.fill_(1.0009765625)  # not a bfloat16
    router.to(torch.bfloat16).half()
    assert router.weight.dtype == torch.float16
    assert router.expert_bias.dtype == torch.float32
    assert (router.expert_bias == 1.0009765625).all()
    assert router.double().expert_bias.dtype == torch.float64


def test_state_dict_holds_the_bias_and_no_counter() -> None:
    assert set(automoe.Router(4, 3, 1).state_dict()) == {"weight", "expert_bias"}
    router = automoe.Router(4, 3, 1, expert_bias=False, bias=True)
    assert set(router.state_dict()) == {"weight", "bias"}


def test_meta_device_and_reset() -> None:
    router = automoe.Router(DIM, EXPERTS, TOPK, device="meta", dtype=torch.bfloat16)
    router.to_empty(device="cpu")
    router.reset_parameters()
    assert router.expert_bias.dtype == torch.float32
    assert not any(buffer.any() for buffer in router.buffers())
    assert router.weight.std() > 0.1
    router(torch.ones(2, DIM, dtype=torch.bfloat16))


def test_evaluation_counts_nothing() -> None:
    router = make_router(capacity_factor=0.5, z_loss_coef=1.0).eval()
    topk_weights, topk_ids = router(tokens())
    topk_weights.sum().backward()
    assert (topk_ids == -1).any()
    assert router.num_tokens_per_expert.sum() == 0
    assert router.num_dropped == 0
    assert automoe.balance_losses(router) == {"moe/z_loss": 0}


# ---- losses ----

COEFS = {"aux_loss_coef": 0.3, "seq_aux_loss_coef": 0.2, "z_loss_coef": 0.1}


def plain_losses(router: automoe.Router, x: Tensor, num_sequences: int) -> Tensor:
    """The weighted losses, added by hand."""
    logits = x @ router.weight.T
    scores = logits.sigmoid()
    scores = scores / scores.sum(-1, keepdim=True)
    with torch.no_grad():
        topk_ids = (logits.sigmoid() + router.expert_bias).topk(TOPK)[1]
    return (
        0.3 * automoe.load_balancing_loss(scores, topk_ids)
        + 0.2 * automoe.sequence_balance_loss(scores, topk_ids, num_sequences)
        + 0.1 * automoe.router_z_loss(logits)
    )


def test_losses_come_with_the_backward() -> None:
    router = make_router(score_func="sigmoid", norm_topk_prob=False, **COEFS)
    automoe.set_balance_loss_scale(router, 0.5)
    x = tokens().requires_grad_()
    topk_weights, topk_ids = router(x, 4)
    (7 * topk_weights.square().sum()).backward()
    found = [x.grad, router.weight.grad]

    router.weight.grad = None
    x = tokens().requires_grad_()
    weights = (x @ router.weight.T).sigmoid().gather(1, topk_ids)
    loss = 7 * weights.square().sum() + 0.5 * plain_losses(router, x, 4)
    loss.backward()
    torch.testing.assert_close(found, [x.grad, router.weight.grad])

    logged = automoe.balance_losses(router)
    assert list(logged) == ["moe/aux_loss", "moe/seq_aux_loss", "moe/z_loss"]
    pairs = zip(COEFS.values(), logged.values(), strict=True)
    total = sum(coef * value for coef, value in pairs)
    expected = plain_losses(router, tokens(), 4)
    torch.testing.assert_close(total, expected.detach())


def test_logged_losses_are_means_over_layers_and_forwards_with_tokens() -> None:
    layers = nn.ModuleList(make_router(z_loss_coef=0.1) for _ in range(2))
    values = []
    for layer, num_tokens in ((0, 5), (0, 9), (1, 7), (1, 0)):
        layers[layer](tokens(num_tokens))
        if num_tokens:
            logits = tokens(num_tokens) @ layers[layer].weight.T
            values.append(automoe.router_z_loss(logits).item())
    expected = ((values[0] + values[1]) / 2 + values[2]) / 2
    logged = automoe.balance_losses(layers)["moe/z_loss"]
    assert logged.item() == pytest.approx(expected)
    assert automoe.balance_losses(layers)["moe/z_loss"] == 0


def test_no_tokens_give_gradients_of_zero() -> None:
    router = make_router(capacity_factor=1.0, **COEFS)
    topk_weights, topk_ids = router(tokens(0), 0)
    assert topk_weights.shape == topk_ids.shape == (0, TOPK)
    topk_weights.sum().backward()
    assert router.weight.grad.abs().sum() == 0


# ---- activation checkpointing and compiled code ----


def _contexts(saved: CheckpointPolicy) -> object:
    return partial(create_selective_checkpoint_contexts, lambda *_, **__: saved)


CHECKPOINTS = {
    "plain": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective, all saved": {
        "use_reentrant": False,
        "context_fn": _contexts(CheckpointPolicy.MUST_SAVE),
    },
    "selective, none saved": {
        "use_reentrant": False,
        "context_fn": _contexts(CheckpointPolicy.PREFER_RECOMPUTE),
    },
}


def router_outcome(router: automoe.Router, call) -> dict[str, Tensor]:
    """Gradients, counts and losses of one forward and backward."""
    for buffer in (router.num_tokens_per_expert, router.num_dropped):
        buffer.zero_()
    automoe.balance_losses(router)
    router.weight.grad = None
    x = tokens().requires_grad_()
    topk_weights, _ = call(x, 4)
    topk_weights.square().sum().backward()
    return {
        "x": x.grad,
        "weight": router.weight.grad,
        "counts": router.num_tokens_per_expert.clone(),
        "dropped": router.num_dropped.clone(),
        **automoe.balance_losses(router),
    }


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_recompute_counts_once(kind) -> None:
    router = make_router(capacity_factor=1.0, **COEFS)
    expected = router_outcome(router, router)
    assert expected["counts"].sum() == tokens().shape[0] * TOPK
    assert expected["dropped"] > 0
    found = router_outcome(router, partial(checkpoint, router, **CHECKPOINTS[kind]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nested", ["compiled", "checkpoint inside", "outside"])
def test_compiled_router_counts_once(nested) -> None:
    torch._dynamo.reset()
    router = make_router(num_groups=4, topk_groups=2, capacity_factor=1.0, **COEFS)
    expected = router_outcome(router, router)
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    once_more = partial(checkpoint, use_reentrant=False)
    if nested == "compiled":
        call = compiled(router)
    elif nested == "outside":
        call = partial(once_more, compiled(router))
    else:
        call = compiled(lambda x, num_sequences: once_more(router, x, num_sequences))
    found = router_outcome(router, call)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_compiled_router_takes_other_numbers_of_tokens() -> None:
    torch._dynamo.reset()
    router = make_router(capacity_factor=1.1, z_loss_coef=0.1)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for num_tokens in (6, 11, 24):
        found, expected = compiled(tokens(num_tokens)), router(tokens(num_tokens))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim is 0, expected at least 1"),
        ({"top_k": 9}, "top_k is 9, expected 1 to num_experts, which is 8"),
        ({"score_func": "relu"}, "score_func is 'relu', expected one of"),
        ({"group_score": "sum"}, "group_score is 'sum', expected one of"),
        ({"num_groups": 2}, "num_groups is 2 and topk_groups None, expected both"),
        ({"num_groups": 3, "topk_groups": 1}, "num_groups is 3, expected a divisor"),
        ({"num_groups": 4, "topk_groups": 5}, "topk_groups is 5, expected 1 to"),
        ({"num_groups": 8, "topk_groups": 1}, "topk_groups is 1, of 1 experts each"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0, expected more than 0"),
    ],
)
def test_wrong_arguments_are_named(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        automoe.Router(**{"dim": 4, "num_experts": 8, "top_k": 2, **options})
