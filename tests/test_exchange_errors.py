# SPDX-License-Identifier: Apache-2.0
"""What an all-to-all says when its arguments cannot be right."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool

_CPU = torch.device("cpu")


# ---- ranks that disagree ----


@dataclass(frozen=True)
class Disagreement:
    """What one rank sends to another, and what that one expects instead."""

    sender: int
    receiver: int
    sent: int
    expected: int
    numel: int = 6  # of the other blocks
    form: str = "single"


def _exchange(
    group: dist.ProcessGroup,
    sends: list[int],
    receives: list[int],
    form: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    if form == "list":
        inputs = [torch.ones(n, dtype=dtype) for n in sends]
        outputs = [torch.empty(n, dtype=dtype) for n in receives]
        dist.all_to_all(outputs, inputs, group=group)
    else:
        sent = torch.ones(sum(sends), dtype=dtype)
        received = torch.empty(sum(receives), dtype=dtype)
        dist.all_to_all_single(received, sent, receives, sends, group=group)


def _uses_until_error(use: Callable[[int], None]) -> tuple[int, str, str]:
    """How often it could be used, and the error that came then."""
    for number in range(3):
        try:
            use(number)
        except Exception as error:
            return number, type(error).__name__, str(error)
    return 3, "", "no error"


def disagree(it: Disagreement) -> tuple[int, str, str]:
    """Use a group in which two ranks disagree about sizes, until it fails."""
    group = dist.new_group(backend="automoe")
    rank, size = dist.get_rank(), dist.get_world_size()

    def use(number: int) -> None:
        sends, receives = [it.numel] * size, [it.numel] * size
        if number == 0 and rank == it.sender:
            sends[it.receiver] = it.sent
        if number == 0 and rank == it.receiver:
            receives[it.sender] = it.expected
        _exchange(group, sends, receives, it.form)

    result = _uses_until_error(use)
    # It stays failed, and says so again.
    again = _uses_until_error(lambda number: use(1))
    assert again[0] == 0 and again[2] in result[2] + again[2], again
    _finish(group)
    return result


def disagree_about_dtype(odd: int, form: str) -> tuple[int, str, str]:
    """One rank has blocks of the right size and another dtype."""
    group = dist.new_group(backend="automoe")
    size = dist.get_world_size()

    def use(number: int) -> None:
        is_odd = number == 0 and dist.get_rank() == odd
        dtype = torch.int32 if is_odd else torch.float32
        _exchange(group, [4] * size, [4] * size, form, dtype)

    result = _uses_until_error(use)
    _finish(group)
    return result


def _finish(group: dist.ProcessGroup) -> None:
    """A failed group can be destroyed, and others go on."""
    dist.barrier()
    dist.destroy_process_group(group)
    size = dist.get_world_size()
    _exchange(dist.group.WORLD, [2] * size, [2] * size, "single")


def _check_failures(
    results: list[tuple[int, str, str]], concerned: set[int], words: list[str]
) -> None:
    shown = "\n".join(map(str, results))
    for rank, (uses, kind, text) in enumerate(results):
        assert uses == 0 if rank in concerned else uses <= 1, shown
        assert kind == "ValueError", shown
        for word in words:
            assert word in text, shown
    # All say the same, each with what its own operation waited for.
    common = [re.split(r" \[rank|; the group cannot", text)[0] for *_, text in results]
    assert len(set(common)) == 1, shown


@pytest.mark.parametrize("rank_pool", [[3], [2, 1]], ids=["3", "2+1"], indirect=True)
class TestDisagreement:
    @pytest.mark.parametrize("form", ["single", "list"])
    @pytest.mark.parametrize(
        ("sent", "expected"),
        [(5, 3), (0, 3), (5, 0), (100_000, 99_999), (1, 300_000), (300_000, 1)],
    )
    @pytest.mark.parametrize("pair", [(0, 1), (2, 0), (1, 2)], ids=str)
    def test_about_sizes(
        self,
        rank_pool: RankPool,
        pair: tuple[int, int],
        sent: int,
        expected: int,
        form: str,
    ) -> None:
        it = Disagreement(*pair, sent, expected, form=form)
        results = rank_pool.run(disagree, it)
        words = [
            f"rank {it.sender} sends {sent * 4} bytes",
            f"to rank {it.receiver}",
            f"rank {it.receiver} expects {expected * 4} bytes",
        ]
        _check_failures(results, set(pair), words)

    def test_about_sizes_between_large_blocks(self, rank_pool: RankPool) -> None:
        it = Disagreement(2, 0, 7, 8, numel=200_000)
        results = rank_pool.run(disagree, it)
        _check_failures(results, {0, 2}, ["rank 2 sends 28 bytes"])

    @pytest.mark.parametrize("form", ["single", "list"])
    @pytest.mark.parametrize("odd", [0, 2])
    def test_about_the_dtype(self, rank_pool: RankPool, odd: int, form: str) -> None:
        results = rank_pool.run(disagree_about_dtype, odd, form)
        for uses, kind, text in results:
            assert uses == 0, results
            assert kind == "ValueError", results
            assert f"rank {odd}" in text, results
            assert "Int" in text, results
            assert "Float" in text, results


# ---- arguments of one rank ----


def _single(
    output: torch.Tensor, input: torch.Tensor, out_splits=None, in_splits=None
) -> Callable[[], object]:
    return lambda: dist.all_to_all_single(output, input, out_splits, in_splits)


def _list(outputs: list[torch.Tensor], inputs: list[torch.Tensor]):
    return lambda: dist.all_to_all(outputs, inputs)


def _direct(outputs: list[torch.Tensor], inputs: list[torch.Tensor]):
    """Not through Python's own checks."""
    backend = dist.group.WORLD._get_backend(_CPU)
    if len(outputs) == 1:
        return lambda: backend.alltoall_base(outputs[0], inputs[0], [], [])
    return lambda: backend.alltoall(outputs, inputs)


def _bad_calls() -> dict[str, tuple[Callable[[], object], list[str]]]:
    """Calls in a group of three ranks, and the words that their errors need."""
    six, ones = torch.empty(6), torch.ones(6)
    whole = torch.ones(12)
    wide = torch.ones(3, 4)
    three = [torch.ones(2) for _ in range(3)]
    more = [torch.empty(2) for _ in range(3)]
    meta = torch.ones(6, device="meta")
    metas = [torch.ones(2, device="meta") for _ in range(3)]
    calls = {
        "input not contiguous": (
            _single(torch.empty(3, 2), wide[:, ::2]),
            ["input of shape [3, 2]", "strides [4, 2]", "input.contiguous()"],
        ),
        "output not contiguous": (
            _single(wide.t()[:3], torch.ones(3, 3)),
            ["output of shape [3, 3]", "output.contiguous()"],
        ),
        "sum of input splits": (
            _single(six, ones, [2, 2, 2], [2, 2, 1]),
            ["input_split_sizes has 3 entries that sum to 5", "input.size(0), 6"],
        ),
        "sum of output splits": (
            _single(six, ones, [2, 2, 4], [2, 2, 2]),
            ["output_split_sizes has 3 entries that sum to 8", "output.size(0), 6"],
        ),
        "number of splits": (
            _single(six, ones, [2, 2, 2], [3, 3]),
            ["input_split_sizes has 2 entries", "expected 3"],
        ),
        "negative split": (
            _single(six, ones, [-1, 5, 2], [2, 2, 2]),
            ["output_split_sizes holds -1", ">= 0"],
        ),
        "equal split": (
            _single(torch.empty(4), torch.ones(4)),
            ["input.size(0) is 4", "multiple of the group's 3 ranks"],
        ),
        "no dimension": (
            _single(torch.tensor(1.0), torch.tensor(1.0)),
            ["input has no dimension to split"],
        ),
        "dtypes": (
            _direct([six], [torch.ones(6, dtype=torch.int64)]),
            ["output is Float", "dtype of input, Long"],
        ),
        "same memory": (_single(ones, ones), ["output and input share memory"]),
        "overlap": (
            _single(whole[:6], whole[4:10]),
            ["output and input share memory"],
        ),
        "own block": (
            _single(six, ones, [1, 3, 2], [2, 2, 2]),
            ["rank 0 sends 8 bytes to itself", "expects 4"],
        ),
        "meta": (_direct([six], [meta]), ["a tensor is on meta", "expected cpu"]),
        "list: outputs missing": (
            _list(more[:2], three),
            ["got 2 output and 3 input tensors", "3 ranks"],
        ),
        "list: inputs missing": (
            _list(more, three[:1]),
            ["got 3 output and 1 input tensors", "3 ranks"],
        ),
        "list: dtypes": (
            _direct(more, [three[0], three[1], three[2].long()]),
            ["all_to_all: got tensors of Long and Float", "expected one dtype"],
        ),
        "list: overlap": (
            _list([more[0], three[2], more[1]], three),
            ["output and input share memory"],
        ),
        "list: meta": (
            _direct(more, metas),
            ["a tensor is on meta", "expected cpu"],
        ),
        "list: own block": (
            _list([torch.empty(3), *more[:2]], three),
            ["rank 0 sends 8 bytes to itself", "expects 12"],
        ),
    }
    if torch.cuda.is_available():
        cuda = ones.cuda()
        calls["cuda"] = (_direct([six], [cuda]), ["input is on cuda", "expected cpu"])
    return calls


def make_bad_calls() -> dict[str, list[str]]:
    """Rank 0 makes every bad call; a good one after each shows that nothing is lost.

    Returns:
        by call: its error, and the words that it lacks.
    """
    found = {}
    size = dist.get_world_size()
    for name, (call, words) in _bad_calls().items():
        if dist.get_rank() == 0:
            text = "no error"
            try:
                call()
            except Exception as error:
                text = str(error)
            found[name] = [text, *(word for word in words if word not in text)]
        _exchange(dist.group.WORLD, [2] * size, [2] * size, "single")
    return found


@pytest.mark.parametrize("rank_pool", [[2, 1]], indirect=True)
def test_bad_arguments_are_named_and_change_nothing(rank_pool: RankPool) -> None:
    found, *_ = rank_pool.run(make_bad_calls)
    assert len(found) >= 19
    lacking = {name: it for name, it in found.items() if len(it) > 1}
    assert not lacking, "\n".join(f"{name}: {it}" for name, it in lacking.items())
