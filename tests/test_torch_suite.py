# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own CPU suite for process groups, unmodified, on backend "automoe"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch_suite
import torch_suite_frozen as frozen_lists
from torch_suite_frozen import EXPECTED_FAILURES, SuiteRunner

# None: this minor version of torch has no list yet. Then the tests of the newest that
# has one must run, and whatever else there is.
OWN = frozen_lists.load_frozen(frozen_lists.torch_minor())
FROZEN = OWN or frozen_lists.newest_frozen()


def _cases() -> list[object]:
    """All tests that run; each is quick at the two smallest world sizes of its own."""
    cases, seen = [], Counter()
    for world_size in frozen_lists.WORLD_SIZES:
        for test, skipped in frozen_lists.frozen_reasons(FROZEN, world_size).items():
            if skipped:
                continue
            marks = [pytest.mark.slow] if seen[test] >= 2 else []
            seen[test] += 1
            case = (world_size, test)
            cases.append(pytest.param(*case, id=f"{world_size}-{test}", marks=marks))
    return cases


@pytest.fixture(scope="module")
def runners() -> Iterator[dict[int, SuiteRunner]]:
    """A runner for each world size; its process starts when a test needs it."""
    with ExitStack() as stack:
        yield {
            world_size: stack.enter_context(SuiteRunner(world_size))
            for world_size in frozen_lists.WORLD_SIZES
        }


@pytest.mark.parametrize(("world_size", "test"), _cases())
def test_suite(runners: dict[int, SuiteRunner], world_size: int, test: str) -> None:
    problem = frozen_lists.problem(runners[world_size].run(test), world_size)
    assert not problem, problem


@pytest.mark.parametrize("world_size", frozen_lists.WORLD_SIZES)
def test_nothing_else_runs(runners: dict[int, SuiteRunner], world_size: int) -> None:
    runner = runners[world_size]
    reasons = runner.list()
    expected = frozen_lists.frozen_reasons(FROZEN, world_size)
    if OWN is not None:
        assert reasons == expected
        executed = list(reasons.values()).count("")
        assert executed == OWN["count"][str(world_size)]
        assert runner.substitutions == OWN["substitutions"]
        return
    assert all(runner.substitutions[gate] for gate in torch_suite.GATES)
    for test, reason in reasons.items():
        if not reason and expected.get(test) != "":
            problem = frozen_lists.problem(runner.run(test), world_size)
            assert not problem, f"{test}: {problem}"


def test_a_test_that_hangs_fails_and_says_where(monkeypatch) -> None:
    monkeypatch.setattr(torch_suite, "TEST_SECONDS", 0)
    with SuiteRunner(2) as runner:
        for _ in range(2):
            # One of its ranks waits for a second: it is there when it is asked.
            result = runner.run("test_barrier_timeout_full_group")
            problem = frozen_lists.problem(result, 0)
            assert "timed out" in problem and " in _run\n" in problem


def test_a_process_that_dies_is_started_anew() -> None:
    with SuiteRunner(2) as runner:
        with pytest.raises(AssertionError, match="has gone\n(.|\n)*no_such_test"):
            runner.run("test_no_such_test")
        assert runner.run("test_get_rank")["outcome"] == "passed"


EXPECTED, (FAILS_WITH, _) = next(iter(EXPECTED_FAILURES.items()))


@pytest.mark.parametrize(
    ("outcome", "text", "groups", "test", "says"),
    [
        ("passed", "", 2, "a", ""),
        ("skipped", "no GPU", 0, "a", "expected to run: no GPU"),
        ("failed", "Traceback", 2, "a", "Traceback"),
        ("passed", "", 1, "a", "1 groups of our backend"),
        ("failed", f"xx {FAILS_WITH} xx", 2, EXPECTED, ""),
        ("passed", "", 2, EXPECTED, "passed, expected to fail"),
        ("failed", "another reason", 2, EXPECTED, f"with {FAILS_WITH!r}\nanother"),
    ],
)
def test_problem_of_a_result(outcome, text, groups, test, says) -> None:
    result = {"test": test, "outcome": outcome, "text": text, "groups": groups}
    problem = frozen_lists.problem(result, 2)
    assert bool(problem) == bool(says)
    assert says in problem


def test_a_frozen_list_gives_back_what_it_was_made_of(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(frozen_lists, "LISTS", tmp_path)
    reasons = {
        2: {"a": "", "b": "small", "c": "GPU"},
        8: {"a": "", "b": "", "c": "GPU"},
    }
    frozen = frozen_lists.freeze(reasons, {"gate": 1})
    assert frozen["count"] == {"2": 1, "8": 2}
    frozen_lists.save_frozen("2.9", frozen)
    frozen_lists.save_frozen("2.10", {**frozen, "substitutions": {"gate": 0}})
    assert frozen_lists.load_frozen("2.11") is None
    assert frozen_lists.load_frozen("2.9") == frozen
    newer = frozen_lists.load_frozen("2.10")
    assert newer["tests_of"] == "2.9" and newer["substitutions"] == {"gate": 0}
    assert frozen_lists.newest_frozen() == newer
    for world_size, expected in reasons.items():
        assert frozen_lists.frozen_reasons(newer, world_size) == expected
