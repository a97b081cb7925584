# SPDX-License-Identifier: Apache-2.0
"""A row of the table of kernels_bench.py."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Row:
    """One contender on one job.

    Attributes:
        part: "kernels", "hops", "launches" or "overlap".
        ranks, nodes: how many exchange it.
        bytes: of rows, read and written; of hops, those that go to experts.
        gbps: bytes / median, GB of 1e9.
        of_copy: the median of a copy of as many bytes / this median.
        ratio: of launches, the median / that of an empty chain; of overlap, what was
            hidden / what can be.
        wrong: elements of the result that are not what they must be.
    """

    part: str
    job: str
    contender: str
    hidden: int
    bytes: int | None
    median_us: float
    p99_us: float
    gbps: float | None
    of_copy: float | None = None
    ratio: float | None = None
    wrong: int = 0
    ranks: int = 1
    nodes: int = 1
    times_us: list[float] = field(default_factory=list)
