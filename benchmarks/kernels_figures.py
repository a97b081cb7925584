# SPDX-License-Identifier: Apache-2.0
"""The figures that kernels_bench.py has to show on a GPU, and their bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernels_row import Row

_LEAST_HIDDEN = 2048
_WIDE = f"at H >= {_LEAST_HIDDEN}"


@dataclass(frozen=True)
class Figure:
    """The worst of some rows, and what is expected of it.

    Attributes:
        name: what it is; docs/gpu.md says of which rows.
        bound: such as ">= 0.85".
        value: None: no row has it.
        row: the worst one.
        holds: None: not measured, or not on a GPU.
        needs: by what it would be measured.
    """

    name: str
    bound: str
    value: float | None
    row: str | None
    holds: bool | None
    needs: str


Value = Callable[[Row, list[Row]], float | None]


def _of_copy(row: Row, _: list[Row]) -> float | None:
    return row.of_copy


def _ratio(row: Row, _: list[Row]) -> float | None:
    return row.ratio


def _of_torch(row: Row, rows: list[Row]) -> float | None:
    """The time of torch's fastest way / that of the row."""
    times = [
        other.median_us
        for other in rows
        if (other.part, other.job, other.hidden) == (row.part, row.job, row.hidden)
        and other.contender.startswith("torch")
    ]
    return min(times) / row.median_us if times else None


@dataclass(frozen=True)
class _Claim:
    name: str
    part: str
    job: str  # how it begins
    contender: str  # the same
    value: Value
    bound: float
    least_hidden: int = 0
    at_most: bool = False
    needs: str = "the rows of kernels"

    def figure(self, rows: list[Row], on_gpu: bool) -> Figure:
        found = []
        for row in rows:
            value = self.value(row, rows) if self._is_of(row) else None
            if value is not None:
                found.append((value, row))
        bound = f"{'<=' if self.at_most else '>='} {self.bound:g}"
        if not found:
            return Figure(self.name, bound, None, None, None, self.needs)
        pick = max if self.at_most else min
        value, row = pick(found, key=lambda pair: pair[0])
        good = value <= self.bound if self.at_most else value >= self.bound
        text = f"H={row.hidden}, ranks: {row.ranks}, nodes: {row.nodes}"
        holds = good if on_gpu else None
        return Figure(self.name, bound, value, text, holds, self.needs)

    def _is_of(self, row: Row) -> bool:
        return (
            row.part == self.part
            and row.job.startswith(self.job)
            and row.contender.startswith(self.contender)
            and row.hidden >= self.least_hidden
        )


def _claims() -> list[_Claim]:
    claims = []
    for job, contender in (
        ("gather", "automoe dispatch"),
        ("reduce", "automoe combine"),
    ):
        for name, value, bound in (
            ("of the copy's rate", _of_copy, 0.85),
            ("of torch's best rate", _of_torch, 1.0),
        ):
            claims.append(
                _Claim(
                    f"{job} {_WIDE}, {name}", "kernels", job, contender, value, bound,
                    least_hidden=_LEAST_HIDDEN,
                    needs=f"the rows of kernels {_WIDE}",
                )
            )  # fmt: skip
    claims.append(
        _Claim(
            "launches, of the empty chain's time", "launches", "", "automoe", _ratio,
            3.0, at_most=True, needs="--launches on a CUDA device",
        )
    )  # fmt: skip
    for name, job, contender, needs in (
        ("a dispatch", "dispatch", "both", ""),
        ("the chunks of moe", "moe", "moe in", " --nodes 2"),
    ):
        claims.append(
            _Claim(
                f"overlap of {name} {_WIDE}, of what can hide",
                "overlap", job, contender, _ratio, 0.8,
                least_hidden=_LEAST_HIDDEN,
                needs=f"--overlap{needs} {_WIDE}",
            )
        )  # fmt: skip
    return claims


def make_figures(rows: list[Row], on_gpu: bool) -> list[Figure]:
    """All figures; those without rows have no value."""
    return [claim.figure(rows, on_gpu) for claim in _claims()]


def figure_line(figure: Figure) -> str:
    """One line of text, which starts with #."""
    start = f"# figure: {figure.name}: "
    bound = f"expected {figure.bound}"
    if figure.value is None:
        return f"{start}not measured ({bound}): needs {figure.needs}"
    outcomes = {True: "holds", False: "MISSED", None: "says nothing: not on a GPU"}
    outcome = outcomes[figure.holds]
    return f"{start}{figure.value:.3f} ({figure.row}; {bound}): {outcome}"
