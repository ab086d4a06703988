from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from paci_rt import schedules
from paci_rt.action import Op, decode
from paci_rt.schedules import FAMILIES, Shape, StepCosts

GRID = list(itertools.product(range(1, 9), (1, 2, 3, 4, 7, 8, 16), (0, 1, 3)))


def short(name: str, stage: int, windows: int, **shape: Any) -> str:
    stream = decode(schedules.get(name).stream(Shape(**shape), stage, windows))
    return " ".join(f"{action.op.value}{action.index}" for action in stream)


def test_orders_written_out_by_hand() -> None:
    assert short("1f1b", 0, 1, num_stages=3, accumulation=4) == "F0 F1 F2 B0 F3 B1 B2 B3 U0"
    assert short("1f1b", 2, 1, num_stages=3, accumulation=4) == "F0 B0 F1 B1 F2 B2 F3 B3 U0"
    assert short("1f1b", 0, 2, num_stages=4, accumulation=2) == "F0 F1 B0 B1 U0 F2 F3 B2 B3 U1"
    assert short("gpipe", 1, 1, num_stages=3, accumulation=3) == "F0 F1 F2 B0 B1 B2 U0"
    assert short("paci", 0, 2, num_stages=3, accumulation=2) == "F0 F1 F2 B0 F3 B1 U0 B2 B3 U1"
    assert short("paci", 2, 2, num_stages=3, accumulation=2) == "F0 B0 F1 B1 U0 F2 B2 F3 B3 U1"
    assert short("paci", 0, 2, num_stages=2, accumulation=2, slack=1) == "F0 F1 F2 B0 F3 B1 U0 B2 B3 U1"
    assert short("paci", 0, 2, num_stages=3, accumulation=2, slack=(2, 1, 0)) == "F0 F1 F2 F3 B0 B1 U0 B2 B3 U1"
    assert short("paci", 1, 2, num_stages=3, accumulation=2, slack=(2, 1, 0)) == "F0 F1 F2 B0 F3 B1 U0 B2 B3 U1"
    split = "F0 F1 F2 I0 W0 F3 I1 W1 U0 I2 W2 I3 W3 U1"
    assert short("paci-split", 0, 2, num_stages=3, accumulation=2) == split
    assert short("async-1f1b", 0, 3, num_stages=2, accumulation=1) == "F0 F1 B0 U0 F2 B1 U1 B2 U2"


def counted_drift(name: str, stage: int, shape: Shape, windows: int) -> tuple[int, int]:
    """Largest drift and in-flight count of a stream, by walking it."""
    version, at_forward, drift, in_flight = 0, {}, 0, 0
    for action in decode(schedules.get(name).stream(shape, stage, windows)):
        if action.op is Op.F:
            at_forward[action.index] = version
            in_flight = max(in_flight, len(at_forward))
        elif action.op in (Op.B, Op.I):
            drift = max(drift, version - at_forward.pop(action.index))
        elif action.op is Op.U:
            version += 1
    assert version == windows and not at_forward
    return drift, in_flight


@pytest.mark.parametrize(("stages", "accumulation", "slack"), GRID)
def test_paci_drift_is_exactly_the_formula(stages: int, accumulation: int, slack: int) -> None:
    shape = Shape(num_stages=stages, accumulation=accumulation, slack=slack)
    windows = 4 * (stages + slack)
    for stage in range(stages):
        ahead = stages - 1 - stage + (slack if stage < stages - 1 else 0)
        for name in ("paci", "paci-split"):
            drift, in_flight = counted_drift(name, stage, shape, windows)
            assert drift == math.ceil(ahead / accumulation) == FAMILIES[name].drift_bound(shape, stage)
            assert in_flight == ahead + 1 == FAMILIES[name].in_flight_bound(shape, stage)


@pytest.mark.parametrize("slack", [(3, 2, 1, 0), (0, 1, 0, 0), (0, 1, 2, 0), (5, 0, 1, 0), (9, 9, 3, 0)])
def test_slack_by_stage_has_its_drift_by_stage(slack: tuple[int, ...]) -> None:
    for accumulation in (1, 2, 3, 5, 8):
        shape = Shape(num_stages=4, accumulation=accumulation, slack=slack)
        for stage, more in enumerate(slack):
            ahead = 3 - stage + more
            drift, in_flight = counted_drift("paci", stage, shape, 30)
            assert drift == math.ceil(ahead / accumulation) == FAMILIES["paci"].drift_bound(shape, stage)
            assert in_flight == ahead + 1 == FAMILIES["paci"].in_flight_bound(shape, stage)


def test_drift_of_the_worked_examples() -> None:
    for accumulation, expected in ((1, [7, 6, 5, 4, 3, 2, 1, 0]), (4, [2, 2, 2, 1, 1, 1, 1, 0])):
        shape = Shape(num_stages=8, accumulation=accumulation)
        assert [counted_drift("paci", stage, shape, 40)[0] for stage in range(8)] == expected


def test_flush_schedules_never_drift_and_hold_what_they_say() -> None:
    for stages, accumulation in itertools.product((1, 2, 5), (1, 2, 8)):
        shape = Shape(num_stages=stages, accumulation=accumulation)
        for stage in range(stages):
            assert counted_drift("1f1b", stage, shape, 3) == (0, min(stages - stage, accumulation))
            assert counted_drift("gpipe", stage, shape, 3) == (0, accumulation)


@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if family.flush))
def test_flush_schedules_repeat_window_by_window(name: str) -> None:
    family = FAMILIES[name]
    shape = Shape(num_stages=4, accumulation=4, chunks=family.chunks, placement=family.placement)
    for rank in range(shape.ranks):
        one, three = (decode(family.stream(shape, rank, windows)) for windows in (1, 3))
        assert len(three) == 3 * len(one) and decode(family.drain(shape, rank, 0, 3)) == []
        for window in range(3):
            part = three[window * len(one) : (window + 1) * len(one)]
            moved = [(a.stage, a.op, a.index + (window if a.op is Op.U else 4 * window)) for a in one]
            assert [(a.stage, a.op, a.index) for a in part] == moved
        assert {a.op for a in one} == {Op.F, Op.U, *((Op.I, Op.W) if family.split else (Op.B,))}
        assert [a.stage for a in one if a.op is Op.U] == list(reversed(shape.stages_of(rank)))


def test_every_schedule_of_the_comparison_is_there() -> None:
    expected = "gpipe 1f1b interleaved-1f1b interleaved-zb looped-bfs zb-h1 zb-h2 zb-1p zb-2p async-1f1b pipedream"
    in_a_v = ("zb-v", "dualpipe-v", "v-half", "v-min")
    assert set(FAMILIES) == {*expected.split(), *in_a_v, "pipedream-2bw", "paci", "paci-split"}
    assert all(schedules.get(name).name == name for name in FAMILIES)


def test_unknown_names_suggest_the_nearest() -> None:
    assert schedules.get("PACI") is FAMILIES["paci"]
    with pytest.raises(ValueError, match=r"unknown schedule 'pacy'.*'paci'"):
        schedules.get("pacy")
    with pytest.raises(ValueError, match=r"unknown schedule 'zb2p'.*'zb-2p'"):
        schedules.get("zb2p")


@pytest.mark.parametrize("bad", [{"num_stages": 0}, {"accumulation": 0}, {"slack": -1}, {"accumulation": 2.5}])
def test_bad_integers_are_named(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Shape(**{"num_stages": 2, "accumulation": 2, **bad})


def test_step_costs_are_written_and_read_back() -> None:
    costs = StepCosts((1.5,), (1.0, 2.0), (0.25,), 0.125, 0.5)
    assert costs.text() == "1.5,1:2,0.25,0.125,0.5" and StepCosts.parse(costs.text()) == costs
    assert StepCosts.parse("1,2,3") == StepCosts((1.0,), (2.0,), (3.0,))
    for bad in ("", "1,2", "1,2,x", "1,2,-3", "1,2,3,4:5", "1,2,3,4,5,6", "nan,1,1"):
        with pytest.raises(ValueError, match="is not FORWARD,I,W"):
            StepCosts.parse(bad)
