# SPDX-License-Identifier: Apache-2.0
"""What plan, dispatch and combine say when their arguments cannot be right."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool

import torch_automoe as automoe

_POOLS = {
    "3": {"nodes": [3]},
    "2+1": {"nodes": [2, 1]},
    "gloo": {"nodes": [3], "backend": "gloo"},
}
_Uses = tuple[int, str, str]


def _ids(tokens: int = 4, topk: int = 2, dtype=torch.int32) -> torch.Tensor:
    return torch.arange(tokens * topk, dtype=dtype).view(tokens, topk) % 6


# ---- ranks that disagree, and ids of no expert ----


def _plan_changes() -> dict[str, tuple[dict, list[str]]]:
    """What the odd rank passes to plan, and the words that every error needs."""
    negative, large = _ids(), _ids(dtype=torch.int64)
    negative[2, 1] = -2
    large[3, 0] = 1 << 40
    return {
        "E": ({"num_experts": 7}, ["num_experts", "6", "7"]),
        "K": ({"topk_ids": _ids(topk=3)}, ["topk", "2", "3"]),
        "map": ({"reduction_map": [5, 5, 0]}, ["reduction_map"]),
        "id below -1": ({"topk_ids": negative}, ["topk_ids[2][1] is -2", "0 to 5"]),
        "id above": ({"topk_ids": large}, [f"topk_ids[3][0] is {1 << 40}", "0 to 5"]),
    }


def _row_changes() -> dict[str, tuple[dict, list[str]]]:
    """What the odd rank passes to dispatch, and the words that every error needs."""
    half = torch.zeros(4, 2, dtype=torch.float16)
    return {
        "H": ({"x": torch.zeros(4, 7)}, ["bytes in a row", "20", "28"]),
        "dtype": ({"x": torch.zeros(4, 5).double()}, ["Float", "Double"]),
        "weights": ({"topk_weights": half}, ["bytes in a weight", "4", "2"]),
        "no weights": ({"topk_weights": None}, ["bytes in a weight", "4", "0"]),
    }


def _refusals() -> dict[str, tuple[str, dict, list[str]]]:
    """Operator, what the odd rank passes, and the words that every error needs."""
    return {
        "ids: dtype": ("plan", {"topk_ids": _ids().float()}, ["topk_ids", "Float"]),
        "ids: shape": ("plan", {"topk_ids": _ids()[0]}, ["topk_ids", "[2]"]),
        "map": ("plan", {"reduction_map": [0, 1]}, ["reduction_map", "2 labels"]),
        "x: tokens": ("dispatch", {"x": torch.zeros(3, 5)}, ["x", "[3, 5]", "4"]),
        "x: device": (
            "dispatch",
            {"x": torch.zeros(4, 5, device="meta")},
            ["x[0] is on meta", "cpu"],
        ),
        "weights": (
            "dispatch",
            {"topk_weights": torch.zeros(4, 3)},
            ["topk_weights", "[4, 3]", "[4, 2]"],
        ),
        "rows": ("combine", {"expert_out": torch.zeros(1, 5)}, ["rows", "[1, 5]"]),
    }


def refuse_alone(name: str, odd: int, group: dist.ProcessGroup) -> Callable:
    """One rank passes what it can see itself to be wrong."""
    plan = automoe.plan(_ids(), num_experts=6, group=group)
    operator, odd_arguments, _ = _refusals()[name]

    def use(is_odd: bool) -> None:
        arguments = {
            "plan": {"topk_ids": _ids(), "num_experts": 6, "group": group},
            "dispatch": {"x": torch.zeros(4, 5), "topk_weights": None, "plan": plan},
            "combine": {
                "expert_out": torch.zeros(plan.num_recv_tokens, 5),
                "plan": plan,
            },
        }[operator]
        getattr(automoe, operator)(**{**arguments, **(odd_arguments if is_odd else {})})

    return use


def disagree_in_plan(name: str, odd: int, group: dist.ProcessGroup) -> Callable:
    """One rank passes something else to plan."""

    def use(is_odd: bool) -> None:
        arguments = {"topk_ids": _ids(), "num_experts": 6}
        arguments.update(_plan_changes()[name][0] if is_odd else {})
        automoe.plan(group=group, **arguments)

    return use


def disagree_in_dispatch(name: str, odd: int, group: dist.ProcessGroup) -> Callable:
    """One rank has other rows or weights."""
    plan = automoe.plan(_ids(), num_experts=6, group=group)

    def use(is_odd: bool) -> None:
        arguments = {"x": torch.zeros(4, 5), "topk_weights": torch.zeros(4, 2)}
        arguments.update(_row_changes()[name][0] if is_odd else {})
        automoe.dispatch(plan=plan, **arguments)

    return use


def disagree_in_combine(name: str, odd: int, group: dist.ProcessGroup) -> Callable:
    """One rank has rows of another length or type."""
    plan = automoe.plan(_ids(), num_experts=6, group=group)

    def use(is_odd: bool) -> None:
        columns = 6 if is_odd and name == "H" else 5
        dtype = torch.float64 if is_odd and name == "dtype" else torch.float32
        rows = torch.zeros(plan.num_recv_tokens, columns, dtype=dtype)
        automoe.combine(rows, plan)

    return use


def disagree_about_calls(name: str, odd: int, group: dist.ProcessGroup) -> Callable:
    """One rank takes another plan, or calls another operator."""
    first = automoe.plan(_ids(), num_experts=6, group=group)
    second = automoe.plan(_ids().flip(0), num_experts=6, group=group)

    def use(is_odd: bool) -> None:
        plan = second if is_odd and name == "plan" else first
        if is_odd and name == "operator":
            automoe.combine(torch.zeros(plan.num_recv_tokens, 5), plan)
        else:
            automoe.dispatch(torch.zeros(4, 5), None, plan)

    return use


def use_until_error(make_use: Callable, name: str, odd: int) -> _Uses:
    """Uses of a new group before the error, its type and text."""
    group = dist.new_group()
    use = make_use(name, odd, group)
    # A failure ends whatever a slower rank still does in this group.
    dist.barrier()
    found = 3, "", "no error"
    for number in range(3):
        try:
            use(number == 0 and dist.get_rank() == odd)
        except Exception as error:
            found = number, type(error).__name__, str(error)
            break
    # A failed group can be destroyed, and others go on.
    dist.barrier()
    dist.destroy_process_group(group)
    automoe.plan(_ids(), num_experts=6)
    return found


def _check(
    results: list[_Uses], words: list[str], odd: int, *, names_itself: bool = True
) -> None:
    shown = "\n".join(map(str, results))
    for rank, (uses, kind, text) in enumerate(results):
        # Who exchanges nothing with the odd rank may learn of it one use later.
        assert uses <= 1, shown
        assert kind == "ValueError", shown
        for word in words:
            assert word in text, f"{word!r} is missing:\n{shown}"
        if rank != odd or names_itself:
            assert re.search(rf"\brank {odd}\b", text), shown
    assert any(uses == 0 for uses, *_ in results), shown


@pytest.mark.parametrize(
    "rank_pool",
    [pytest.param(options, id=name) for name, options in _POOLS.items()],
    indirect=True,
)
class TestDisagreement:
    @pytest.mark.parametrize("name", [*_plan_changes()])
    def test_in_plan(self, rank_pool: RankPool, name: str) -> None:
        results = rank_pool.run(use_until_error, disagree_in_plan, name, 1)
        alone = name.startswith("id")  # its own mistake is no disagreement
        _check(results, _plan_changes()[name][1], 1, names_itself=not alone)

    @pytest.mark.parametrize("name", [*_refusals()])
    def test_refused_by_one(self, rank_pool: RankPool, name: str) -> None:
        results = rank_pool.run(use_until_error, refuse_alone, name, 1)
        # It learns of its own mistake, the others of whose it is.
        _check(results, _refusals()[name][2], 1, names_itself=False)

    @pytest.mark.parametrize("name", [*_row_changes()])
    def test_in_dispatch(self, rank_pool: RankPool, name: str) -> None:
        results = rank_pool.run(use_until_error, disagree_in_dispatch, name, 2)
        _check(results, _row_changes()[name][1], 2)

    @pytest.mark.parametrize(
        ("name", "words"),
        [("H", ["bytes in a row", "20", "24"]), ("dtype", ["float32", "float64"])],
    )
    def test_in_combine(self, rank_pool: RankPool, name: str, words: list[str]) -> None:
        results = rank_pool.run(use_until_error, disagree_in_combine, name, 0)
        _check(results, words, 0)

    @pytest.mark.parametrize(
        ("name", "words"), [("plan", ["plan"]), ("operator", ["combine", "dispatch"])]
    )
    def test_about_the_call(
        self, rank_pool: RankPool, name: str, words: list[str]
    ) -> None:
        results = rank_pool.run(use_until_error, disagree_about_calls, name, 2)
        _check(results, words, 2)


# ---- arguments that are wrong on every rank ----


def _bad_calls() -> dict[str, tuple[Callable[[], object], list[str]]]:
    """Calls in a group of three ranks, and the words that their errors need."""
    ids, x = _ids(), torch.zeros(4, 5)
    plan = automoe.plan(ids, num_experts=6)
    rows = torch.zeros(plan.num_recv_tokens, 5)
    ones = torch.ones(plan.num_recv_tokens)
    sorted_rows, how = automoe.permute(x, ids, num_experts=6)

    def make_plan(topk_ids: torch.Tensor = ids, **options: object):
        return lambda: automoe.plan(topk_ids, **{"num_experts": 6, **options})

    def send(x: object, topk_weights: torch.Tensor | None = None):
        return lambda: automoe.dispatch(x, topk_weights, plan)

    def add(rows: torch.Tensor, weights: torch.Tensor | None = None):
        return lambda: automoe.combine(rows, plan, weights)

    fp8 = x.to(torch.float8_e4m3fn).requires_grad_()
    return {
        "ids: dtype": (make_plan(ids.float()), ["topk_ids", "Float", "Int or Long"]),
        "ids: shape": (make_plan(ids[0]), ["topk_ids", "[2]", "(T, K)"]),
        "ids: K = 0": (make_plan(ids[:, :0]), ["topk_ids", "[4, 0]", "K > 0"]),
        "E": (make_plan(num_experts=0), ["num_experts is 0", "expected 1"]),
        "align": (make_plan(align=0), ["align is 0", "expected 1"]),
        "max_recv_tokens": (
            make_plan(max_recv_tokens=-3),
            ["max_recv_tokens is -3", "None or at least 0"],
        ),
        "map: length": (
            make_plan(reduction_map=[0, 1]),
            ["reduction_map", "2 labels", "3 ranks"],
        ),
        "map: label": (make_plan(reduction_map=[0, -1, 0]), ["reduction_map[1] is -1"]),
        "group: name": (make_plan(group="none such"), ["'none such'", "process group"]),
        "group: type": (make_plan(group=3), ["group is 3", "expected a ProcessGroup"]),
        "x: tokens": (send(x[:3]), ["x", "[3, 5]", "4 of them"]),
        "x: no dimension": (send(torch.tensor(1.0)), ["x", "[]"]),
        "x: none": (send([]), ["xs is empty"]),
        "x: second": (send((x, x[:2])), ["x", "[2, 5]", "4 of them"]),
        "x: fp8 gradient": (send(fp8), ["x[0]", "float8_e4m3fn", "gradient"]),
        "weights: shape": (
            send(x, torch.ones(4, 3)),
            ["topk_weights", "[4, 3]", "[4, 2]"],
        ),
        "weights: dtype": (send(x, ids), ["topk_weights", "Int", "Float"]),
        "x: device": (send(x.to("meta")), ["x[0] is on meta", "expected cpu"]),
        "rows: count": (add(rows[:-1]), ["rows", f"{len(rows)} of them"]),
        "rows: dtype": (add(rows.int()), ["rows", "Int", "Float"]),
        "rows: device": (add(rows.to("meta")), ["expert_out is on meta", "cpu"]),
        "combine weights": (add(rows, ones[:-1]), ["weights", f"[{len(rows)}]"]),
        "permute: tokens": (
            lambda: automoe.permute(x[:3], ids, num_experts=6),
            ["x", "[3, 5]", "4"],
        ),
        "permute: id": (
            lambda: automoe.permute(x, ids, num_experts=3),
            ["topk_ids[1][1] is 3", "0 to 2"],
        ),
        "unpermute: rows": (
            lambda: automoe.unpermute(sorted_rows[1:], how),
            ["rows", f"{len(sorted_rows)}"],
        ),
    }  # fmt: skip


def make_bad_calls() -> dict[str, list[str]]:
    """Make every bad call; a good one after each shows that nothing is lost.

    Returns:
        by call: its error, and the words that it lacks.
    """
    found = {}
    plan = automoe.plan(_ids(), num_experts=6)
    for name, (call, words) in _bad_calls().items():
        text = "no error"
        try:
            call()
        except ValueError as error:
            text = str(error)
        found[name] = [text, *(word for word in words if word not in text)]
        automoe.combine(automoe.dispatch(torch.ones(4, 5), None, plan)[0], plan)
    return found


@pytest.mark.parametrize(
    "rank_pool", [[2, 1], {"nodes": [3], "backend": "gloo"}], indirect=True
)
def test_bad_arguments_are_named_and_change_nothing(rank_pool: RankPool) -> None:
    for found in rank_pool.run(make_bad_calls):
        lacking = {name: it for name, it in found.items() if len(it) > 1}
        assert not lacking, "\n".join(f"{name}: {it}" for name, it in lacking.items())


def plan_without_group() -> str:
    """plan where there is no process group."""
    try:
        automoe.plan(_ids(), num_experts=6)
    except ValueError as error:
        return str(error)
    return "no error"


def test_no_process_group() -> None:
    with RankPool([1], backend=None) as pool:
        (text,) = pool.run(plan_without_group)
    assert "no default process group" in text and "init_process_group" in text
