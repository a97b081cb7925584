# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all Python tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from distributed import RankPool, RankServer


@pytest.fixture(scope="session", autouse=True)
def _rank_server() -> Iterator[None]:
    """End the process that forks ranks at the end of the run."""
    yield
    RankServer.close_shared()


@pytest.fixture(scope="module")
def rank_pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """A RankPool, parametrised by its shape or by its arguments.

    @pytest.mark.parametrize("rank_pool", [[1, 1], [3, 3, 2]], indirect=True)
    @pytest.mark.parametrize("rank_pool", [{"nodes": [4], "backend": "gloo"}], ...)
    """
    options = request.param
    if not isinstance(options, dict):
        options = {"nodes": options}
    with RankPool(**options) as pool:
        yield pool


@pytest.fixture(scope="module")
def make_rank_pool() -> Iterator[Callable[..., RankPool]]:
    """Make pools inside tests; the same arguments give the same pool again.

    Only the latest pool is alive, so that a test run never holds many idle ranks.
    """
    current: dict[str, RankPool] = {}

    def make(nodes, **options) -> RankPool:
        key = repr((list(nodes), sorted(options.items())))
        if key not in current:
            while current:
                current.popitem()[1].close()
            current[key] = RankPool(nodes, **options)
        return current[key]

    yield make
    while current:
        current.popitem()[1].close()
