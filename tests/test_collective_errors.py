# SPDX-License-Identifier: Apache-2.0
"""Collectives that ranks disagree about, and calls that are not defined."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from collective_values import COMPLEX, FLOAT8, FLOATS, INTEGERS, LARGE, make_op
from distributed import RankPool

_CPU = torch.device("cpu")
_SIZES = {"small": (6, 7), "large": (LARGE, LARGE + 1)}
_ROOTED = ["broadcast", "gather", "scatter", "reduce"]
_REDUCING = ["all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor"]
_ALL = [
    *_ROOTED,
    *_REDUCING[:1],
    *_REDUCING[2:],
    "all_gather",
    "all_gather_into_tensor",
]


@dataclass(frozen=True)
class Call:
    """Arguments of one collective."""

    name: str
    numel: int = 6
    dtype: torch.dtype = torch.float32
    op: str = "SUM"
    root: int = 0

    def __call__(self, group: dist.ProcessGroup) -> None:
        size, is_root = group.size(), group.rank() == self.root
        one = torch.ones(self.numel, dtype=self.dtype)
        all_ = torch.ones(size * self.numel, dtype=self.dtype)
        several = [torch.ones_like(one) for _ in range(size)]
        op = make_op(self.op)
        calls: dict[str, Callable[[], object]] = {
            "barrier": lambda: dist.barrier(group),
            "broadcast": lambda: dist.broadcast(one, group=group, group_src=self.root),
            "gather": lambda: dist.gather(
                one, several if is_root else None, group=group, group_dst=self.root
            ),
            "scatter": lambda: dist.scatter(
                one, several if is_root else None, group=group, group_src=self.root
            ),
            "reduce": lambda: dist.reduce(one, op=op, group=group, group_dst=self.root),
            "all_reduce": lambda: dist.all_reduce(one, op, group=group),
            "all_gather": lambda: dist.all_gather(several, one, group=group),
            "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(
                all_, one, group=group
            ),
            "reduce_scatter": lambda: dist.reduce_scatter(
                one, several, op, group=group
            ),
            "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(
                one, all_, op, group=group
            ),
            "all_to_all": lambda: dist.all_to_all_single(
                torch.empty_like(all_), all_, group=group
            ),
        }
        calls[self.name]()


# ---- what runs on the ranks ----


def disagree(
    call: Call, odd: int, odd_call: Call, timeout: float = 20
) -> tuple[int, str, str]:
    """One rank calls something else; all go on until they are told.

    Returns:
        how many calls of this rank succeeded, and the error that came then.
    """
    group = dist.new_group(backend="automoe", timeout=timedelta(seconds=20))
    Call("barrier")(group)
    backend = group._get_backend(torch.device("cpu"))
    backend.set_timeout(timedelta(seconds=timeout))
    dist.barrier()  # all have left the other one
    first = odd_call if dist.get_rank() == odd else call
    result = 2, "", "no error"
    # A rank that only sends may have ended the first call before.
    for number, use in enumerate([first, Call("all_reduce", numel=3)]):
        try:
            use(group)
        except Exception as error:
            result = number, type(error).__name__, str(error)
            break
    dist.barrier()
    dist.destroy_process_group(group)
    Call("all_reduce")(dist.group.WORLD)
    return result


def call_undefined(calls: list[Call]) -> list[str]:
    """Calls that every rank refuses; the group goes on."""
    texts = []
    for call in calls:
        text = "no error"
        try:
            call(dist.group.WORLD)
        except (ValueError, TypeError) as error:
            text = str(error)
        texts.append(text)
    total = torch.ones(3)
    dist.all_reduce(total)
    assert total.tolist() == [dist.get_world_size()] * 3
    return texts


def _bad_calls() -> dict[str, tuple[Callable[[], object], str]]:
    """Calls that do not pass the checks of one rank, and the words of their errors."""
    backend = dist.group.WORLD._get_backend(_CPU)
    size = dist.get_world_size()
    six, meta = torch.ones(6), torch.ones(6, device="meta")
    sparse = six.to_sparse()
    several = [torch.ones(6) for _ in range(size)]
    gather, scatter = dist.GatherOptions(), dist.ScatterOptions()
    other_root = dist.ReduceOptions()
    other_root.rootRank = size
    gather.rootRank = scatter.rootRank = (dist.get_rank() + 1) % size
    return {
        "few outputs": (
            lambda: backend.allgather([several[1:]], [six]),
            rf"tensor_list has {size - 1} tensors, expected one for each of {size}",
        ),
        "other output": (
            lambda: backend.allgather([[six, *several[1:]]], [torch.ones(7)]),
            "28 bytes, the output for rank 0, .* 24; expected the same",
        ),
        "other dtype": (
            lambda: backend.allgather([several], [six.int()]),
            "tensors of Float and Int, expected one dtype",
        ),
        "size of the output": (
            lambda: backend._allgather_base(six, six),
            f"output has 6 elements, expected those of input, 6, times .* {size}",
        ),
        "size of the input": (
            lambda: backend._reduce_scatter_base(six, six),
            f"input has 6 elements, expected those of output, 6, times .* {size}",
        ),
        "gather_list elsewhere": (
            lambda: backend.gather([several], [six], gather),
            "gather_list is given on rank 0, expected only on the destination, rank 1",
        ),
        "scatter_list elsewhere": (
            lambda: backend.scatter([six], [several], scatter),
            "scatter_list is given on rank 0, expected only on the source, rank 1",
        ),
        "root": (
            lambda: backend.reduce([six], other_root),
            f"the root is {size}, expected a rank of a group of {size}",
        ),
        "two tensors": (
            lambda: backend.broadcast([six, six]),
            "broadcast: got 2 tensors, expected one",
        ),
        "no tensors": (
            lambda: backend.allreduce_coalesced([]),
            "got no tensors",
        ),
        "sparse": (
            lambda: backend.broadcast([sparse]),
            "layout Sparse, expected a dense one",
        ),
        "meta": (lambda: backend.broadcast([meta]), "meta.*expected cpu"),
    }


def make_bad_calls() -> dict[str, str]:
    """Rank 0 makes every bad call; a good one after each shows that nothing is lost.

    Returns:
        by call: the error, where it is not as told.
    """
    wrong = {}
    for name, (call, words) in _bad_calls().items():
        if dist.get_rank() == 0:
            try:
                call()
                wrong[name] = "no error"
            except Exception as error:
                if not (isinstance(error, ValueError) and re.search(words, str(error))):
                    wrong[name] = f"{type(error).__name__}: {error}"
        Call("all_gather")(dist.group.WORLD)
    return wrong


# ---- tests ----


def _check(
    results: list[tuple[int, str, str]],
    odd: int,
    values: tuple[object, object],
    pattern: str = "rank {low} has .*{a}, rank {high} has {b}",
) -> None:
    """Every rank names the odd one and another, each with its value."""
    shown = "\n".join(map(str, results))
    mine, other = values
    for _, kind, text in results:
        assert kind == "ValueError", shown
        named = []
        for rank in {0, 1, 2, 3} - {odd}:
            low, high = sorted([odd, rank])
            a, b = (mine, other) if high == odd else (other, mine)
            wanted = pattern.format(low=low, high=high, a=a, b=b)
            named += re.findall(rf"[: ]{wanted}(?:;|$)", text)
        assert len(named) == 1, shown


@pytest.mark.parametrize("odd", [0, 3])
@pytest.mark.parametrize("rank_pool", [[2, 1, 1]], indirect=True)
class TestDisagreement:
    @pytest.mark.parametrize("size", _SIZES)
    @pytest.mark.parametrize("name", _ALL)
    def test_about_the_size(
        self, rank_pool: RankPool, name: str, size: str, odd: int
    ) -> None:
        numel, other = _SIZES[size]
        call = Call(name, numel)
        odd_call = dataclasses.replace(call, numel=other)
        results = rank_pool.run(disagree, call, odd, odd_call)
        parts = 4 if "all_gather" in name or "reduce_scatter" in name else 1
        _check(results, odd, (4 * parts * numel, 4 * parts * other))

    @pytest.mark.parametrize("name", _ALL)
    def test_about_the_dtype(self, rank_pool: RankPool, name: str, odd: int) -> None:
        call = Call(name)
        odd_call = dataclasses.replace(call, dtype=torch.int32)
        results = rank_pool.run(disagree, call, odd, odd_call)
        _check(results, odd, ("Float", "Int"))

    @pytest.mark.parametrize("name", _REDUCING)
    def test_about_the_operation(
        self, rank_pool: RankPool, name: str, odd: int
    ) -> None:
        call = Call(name)
        odd_call = dataclasses.replace(call, op="MAX")
        results = rank_pool.run(disagree, call, odd, odd_call)
        _check(results, odd, ("SUM", "MAX"))

    @pytest.mark.parametrize("name", _ROOTED)
    def test_about_the_root(self, rank_pool: RankPool, name: str, odd: int) -> None:
        call = Call(name, root=1)
        odd_call = dataclasses.replace(call, root=2)
        # No message shows it where all send to another than the odd one expects:
        # then it is found at the deadline.
        limit = [1.5] if (name, odd) == ("reduce", 0) else []
        results = rank_pool.run(disagree, call, odd, odd_call, *limit)
        _check(results, odd, (1, 2))

    @pytest.mark.parametrize(
        ("name", "other"),
        [
            ("all_reduce", "all_gather"),
            ("all_reduce", "broadcast"),
            ("all_reduce", "all_to_all"),
            ("reduce_scatter", "all_reduce"),
            ("barrier", "all_gather"),
            ("barrier", "reduce"),
        ],
    )
    def test_about_the_collective(
        self, rank_pool: RankPool, name: str, other: str, odd: int
    ) -> None:
        results = rank_pool.run(disagree, Call(name), odd, Call(other))
        pattern = "is {a} on rank {low}, but {b} on rank {high}"
        _check(results, odd, (name, other), pattern)


@pytest.mark.parametrize("rank_pool", [[2, 1, 1]], indirect=True)
@pytest.mark.parametrize(
    ("call", "odd", "other"),
    [
        (Call("reduce", root=1), 0, Call("reduce", root=2)),
        (Call("broadcast"), 0, Call("barrier")),
        (Call("gather"), 3, Call("scatter")),
    ],
    ids=["roots", "broadcast and barrier", "gather and scatter"],
)
def test_disagreements_that_no_message_shows(
    rank_pool: RankPool, call: Call, odd: int, other: Call
) -> None:
    """All wait for one another; at the deadline they compare what they have called."""
    for _, kind, text in rank_pool.run(disagree, call, odd, other, 1.5):
        assert kind == "ValueError", (kind, text)


@pytest.mark.parametrize("rank_pool", [[2, 1]], indirect=True)
class TestArguments:
    def test_undefined_operations_are_refused(self, rank_pool: RankPool) -> None:
        bits = ["BAND", "BOR", "BXOR"]
        undefined = [
            *[(dtype, "SUM") for dtype in FLOAT8],
            *[(dtype, op) for dtype in FLOATS for op in bits],
            *[(dtype, op) for dtype in COMPLEX for op in ["PRODUCT", "MIN", *bits]],
            *[(dtype, "PREMUL_SUM") for dtype in INTEGERS],
            *[(torch.bool, op) for op in ["AVG", "PREMUL_SUM"]],
        ]
        calls = [
            Call(name, dtype=dtype, op=op)
            for name in _REDUCING
            for dtype, op in undefined
        ]
        for texts in rank_pool.run(call_undefined, calls):
            for call, text in zip(calls, texts, strict=True):
                assert call.op in text, (call, text)
                if call.dtype.is_complex:  # of some, torch itself says so
                    assert "is not defined" in text or "complex" in text, (call, text)
                else:
                    assert "is not defined" in text, (call, text)
                if call.dtype in FLOAT8:
                    assert str(call.dtype)[len("torch.") :] in text.lower()

    def test_bad_arguments_are_named_and_change_nothing(
        self, rank_pool: RankPool
    ) -> None:
        wrong, *_ = rank_pool.run(make_bad_calls)
        assert not wrong, "\n".join(f"{name}: {it}" for name, it in wrong.items())
