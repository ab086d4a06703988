"""Routes through the package stay short."""

from __future__ import annotations

import pytest

from routes import LIMITS, Tracer, routes


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[int, int]]:
    return routes()


@pytest.mark.parametrize("route", LIMITS)
def test_a_route_crosses_few_borders(found: dict[str, tuple[int, int]], route: str) -> None:
    crossings, files = found[route]
    assert 1 <= files - 1 <= crossings <= LIMITS[route]


def test_a_tracer_that_sees_nothing_counts_nothing() -> None:
    assert Tracer().crossings == {}
