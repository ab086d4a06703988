"""The search for an order of stages in a V: what it must reach, how far from the best it is, and that it runs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paci_rt import schedules
from paci_rt.schedules import Shape, StepCosts
from paci_rt.schedules.cycle_time import starts
from paci_rt.schedules.modulo import timetables
from paci_rt.schedules.v_order import order_of
from paci_rt.schedules.v_search import Found, find, little, ticks_of
from paci_rt.simulate import Costs, simulate
from support.exact_v import possible, shortest
from support.marks import slow


def halves(forward: float, input_grad: float, weight_grad: float, hop: float) -> StepCosts:
    """Times of a whole stage, and a hop as a share of its F, for two equal pieces of it."""
    return StepCosts((forward / 2,), (input_grad / 2,), (weight_grad / 2,), hop * forward)


def replayed(ranks: int, costs: StepCosts, limit: float | None, accumulation: int = 8) -> tuple[float, int]:
    """Steady utilization and pieces in flight on the fullest rank, by simulation."""
    shape = Shape(
        num_stages=2 * ranks,
        accumulation=accumulation,
        chunks=2,
        placement="v",
        costs=costs,
        activation_limit=limit,
    )
    times = Costs(
        forward_s=costs.forward, input_grad_s=costs.input_grad, weight_grad_s=costs.weight_grad, hop_s=costs.hop
    )
    windows = 8 + -(-40 * ranks // accumulation)
    found = simulate(schedules.get("paci-v"), shape, times, windows=windows)
    return found.steady_utilization, max(found.peak_activations.values())


TABLE = [
    ((1, 1, 1), 0, {3.5: 1.0}),
    ((1, 1, 1), 0.03, {3.5: 0.950, 4.5: 0.980, 6: 1.0}),
    ((18.5, 18.1, 9.3), 0, {5: 1.0}),
    ((18.5, 18.1, 9.3), 0.03, {5: 0.986, 6: 1.0}),
    ((18.5, 18.1, 9.3), 0.1, {5: 0.934, 6.5: 1.0}),
    ((1, 1.4, 0.6), 0.03, {5.5: 0.920, 6.5: 1.0}),
]


@pytest.mark.parametrize(
    ("times", "hop", "limit", "least"),
    [(times, hop, limit, least) for times, hop, row in TABLE for limit, least in row.items()],
)
def test_eight_ranks_reach_the_known_utilization(
    times: Sequence[float], hop: float, limit: float, least: float
) -> None:
    utilization, pieces = replayed(8, halves(*times, hop), limit)
    assert pieces <= 2 * limit
    assert utilization >= least - 1e-6


@pytest.mark.parametrize(
    ("times", "hop", "activations"),
    [
        ((1, 1, 1), 0, 3),
        ((1, 1, 1), 0.03, 4.5),
        ((18.5, 18.1, 9.3), 0, 5),
        ((18.5, 18.1, 9.3), 0.03, 5),
        ((18.5, 18.1, 9.3), 0.1, 5),
        ((1, 1.4, 0.6), 0.03, 5.5),
    ],
)
def test_full_rate_on_eight_ranks_takes_no_more_than_was_found(
    times: Sequence[float], hop: float, activations: float
) -> None:
    found = find(8, halves(*times, hop))
    assert found.utilization == pytest.approx(1, abs=1e-6)
    assert found.activations <= activations


@pytest.mark.parametrize("limit", [None, slow(28.0), slow(10.0)])
def test_sixty_four_ranks_take_seconds(limit: float | None) -> None:
    begin = time.process_time()
    found = find(64, halves(18.5, 18.1, 9.3, 0.029), limit)
    assert time.process_time() - begin < 60
    assert found.activations <= (limit or 64)
    assert found.utilization >= {None: 0.999, 28.0: 0.5, 10.0: 0.2}[limit]


# --------------------------------------------------------------------------------------------- how far from the best


EXACT = [
    (1, (1, 1, 1), 0.1, 1),
    (2, (1, 1, 1), 0.03, 1),
    (2, (1, 1, 1), 0.03, 1.5),
    slow(2, (18.5, 18.1, 9.3), 0.03, 1.5),
    slow(2, (1, 1.4, 0.6), 0.1, 1.5),
    (2, (18.5, 18.1, 9.3), 0.1, 2),
    slow(3, (1, 1, 1), 0, 1.5),
    slow(3, (1, 1, 1), 0.1, 1.5),
    slow(3, (1, 1, 1), 0.5, 2),
    slow(3, (18.5, 18.1, 9.3), 0.5, 1.5),
]


@pytest.mark.parametrize(("ranks", "times", "hop", "limit"), EXACT)
def test_no_order_at_all_is_faster(ranks: int, times: Sequence[float], hop: float, limit: float) -> None:
    costs = halves(*times, hop).per_stage(2 * ranks)
    ticks, unit = ticks_of(costs, ranks)
    period = round(find(ranks, costs, limit).period / unit)
    assert possible(ticks, period, 2 * limit, costs.stash)
    assert shortest(ticks, 2 * limit, costs.stash, period, 5e-4) >= period * (1 - 1e-3)


@pytest.mark.parametrize(("times", "hop"), [((1, 1, 1), 0.03), ((18.5, 18.1, 9.3), 0.1), ((1, 1.4, 0.6), 0.5)])
@pytest.mark.parametrize("ranks", [2, slow(3)])
def test_no_order_at_full_rate_holds_less(ranks: int, times: Sequence[float], hop: float) -> None:
    costs = halves(*times, hop).per_stage(2 * ranks)
    ticks, _ = ticks_of(costs, ranks)
    found = find(ranks, costs)
    if found.activations > 1:
        below = 2 * found.activations - 1
        assert not possible(ticks, int(ticks.work().max()), below, stash=0.0)  # however many stashes stand beside
        assert possible(ticks, int(ticks.work().max()), below + 1, stash=0.0)


def test_the_exhaustive_search_knows_what_is_possible() -> None:
    """Every order that the search finds at some period is one that it counts as possible there."""
    costs = halves(1, 1.4, 0.6, 0.2).per_stage(4)
    ticks, _ = ticks_of(costs, 2)
    for period in np.linspace(1.0, 1.6, 5) * int(ticks.work().max()):
        tables = timetables(ticks, int(period), 60)
        order = order_of(tables, int(tables.in_flight(int(period)).argmin()), int(period))
        most = max(max(order.in_flight(rank), order.held(rank, 0.4) - 0.4) for rank in range(2))
        assert possible(ticks, int(period), most, 0.4)


# ------------------------------------------------------------------------------------------------------ any costs


def times_of(stages: int) -> st.SearchStrategy[StepCosts]:
    some = st.one_of(st.just(1.0), st.floats(0.01, 3), st.sampled_from([0.0, 50.0]))
    each = st.one_of(st.tuples(some), st.tuples(*([some] * stages)))
    return st.builds(
        StepCosts, each, each, each, st.sampled_from([0.0, 0.05, 0.7, 6.0]), st.sampled_from([0.0, 0.4, 1])
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, StepCosts, float | None]:
    ranks = draw(st.sampled_from([1, 2, 3, 4, 5]))
    return ranks, draw(times_of(2 * ranks)), draw(st.sampled_from([None, 1, 1.5, 2, 3.5]))


def check(ranks: int, costs: StepCosts, limit: float | None) -> Found:
    """An order of all actions that keeps the limit and runs, also with channels for two messages."""
    found = find(ranks, costs, limit)
    order, (ticks, unit) = found.order, ticks_of(costs.per_stage(2 * ranks), ranks)
    for rank, entries in enumerate(order.rounds):
        pieces = {rank, 2 * ranks - 1 - rank}
        assert sorted((op, piece) for op, piece, _ in entries) == sorted((op, one) for op in "FIW" for one in pieces)
        assert entries[0] == ("F", rank, 0)
        assert all(behind >= 0 for _, _, behind in entries)
        if limit is not None:
            assert order.in_flight(rank) <= 2 * limit
            assert order.held(rank, costs.stash) <= 2 * limit + costs.stash + 1e-6
    period = round(found.period / unit)
    for capacity in (None, 2 + ticks.hop // period):  # what is on its way takes room, too
        assert starts(order.waits(ticks, capacity), 6 * ranks, period) is not None
    # Little's law, and no faster than the slowest rank.
    assert 2 * found.activations * period >= little(ticks) - period
    assert period >= int(ticks.work().max())
    return found


@settings(max_examples=12, deadline=None)
@given(problems())
def test_every_order_is_complete_keeps_the_limit_and_runs(problem: tuple[int, StepCosts, float | None]) -> None:
    check(*problem)


@pytest.mark.parametrize(
    ("ranks", "costs", "limit"),
    [
        (4, StepCosts((0.0,), (0.0,), (0.0,)), 2),
        (4, StepCosts((0.0,), (0.0,), (0.0,), hop=1.0), 2),
        (3, StepCosts(hop=50.0), None),
        (4, StepCosts((1.0,) * 3 + (50.0,) + (1.0,) * 4, hop=0.1), None),
        (3, StepCosts(weight_grad=(0.0,)), 1.5),
        (2, StepCosts((1e-9,), (1e9,), (1.0,), hop=1e-3), 1),
        (4, StepCosts((1.0,), (0.125,), (1.0,) * 5 + (50.0,) + (1.0,) * 2, stash=0.0), 1),
    ],
)
def test_odd_costs_have_an_order(ranks: int, costs: StepCosts, limit: float | None) -> None:
    check(ranks, costs, limit)


def test_more_activations_never_cost_time_and_the_search_does_not_change_its_mind() -> None:
    costs = halves(1, 1, 1, 0.06)
    found = [find(4, costs, limit) for limit in (1, 2, 3, None)]
    assert all(one.period >= other.period for one, other in itertools.pairwise(found))
    find.__globals__["_find"].cache_clear()
    assert find(4, costs, 2).order == found[1].order


@pytest.mark.parametrize("limit", [0, 0.9, -1, float("nan"), float("inf"), "4", True])
def test_a_bad_limit_is_named(limit: object) -> None:
    with pytest.raises(ValueError, match=r"activation_limit is .*at least 1"):
        find(4, StepCosts(), limit)  # type: ignore[arg-type]


def test_bad_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"hop 1\) that at full rate .*: give an activation_limit"):
        find(4, StepCosts((0.0,), (0.0,), (0.0,), hop=1.0))
    with pytest.raises(ValueError, match="ranks is 0"):
        find(0, StepCosts())
    with pytest.raises(ValueError, match=r"costs.forward is \(1.0, 1.0\)"):
        find(2, StepCosts((1.0, 1.0)))
