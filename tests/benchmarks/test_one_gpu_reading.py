"""benchmarks/one_gpu.py: what is read off a trace."""

from __future__ import annotations

import pytest

from onegpu.reading import predict, read, step_costs
from onegpu.run import Case
from paci_rt.action import Op
from paci_rt.simulate import Costs, simulate
from paci_rt.trace import Event
from schedules import Link, read_link

UNEVEN = Costs(
    forward_s=(2.0, 2.5, 2.0), input_grad_s=(2.0, 2.0, 3.0), weight_grad_s=(1.0, 2.0, 1.0), update_s=(0.5,), hop_s=0.25
)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "paci", "gpipe"])
@pytest.mark.parametrize("accumulation", [3, 8])
def test_a_simulated_run_is_read_as_the_simulator_does(schedule: str, accumulation: int) -> None:
    case, windows = Case(schedule=schedule, stages=3, accumulation=accumulation), 3
    played = case.warm_up + windows + case.lag
    sim = simulate(case.family, case.shape, UNEVEN, windows=played + 2, lookahead=False, keep_events=True)
    reading = read(sim.events, case, case.warm_up - 1, case.warm_up - 1 + windows)
    assert reading.micro_batches_per_s == pytest.approx(sim.micro_batches_per_s, rel=1e-9)
    assert reading.utilization == pytest.approx(sim.steady_utilization, rel=1e-9)
    assert reading.took_s[Op.F] == pytest.approx(UNEVEN.forward_s)
    if case.family.split:
        assert reading.took_s[Op.I] == pytest.approx(UNEVEN.input_grad_s)
        assert reading.took_s[Op.W] == pytest.approx(UNEVEN.weight_grad_s)
    else:
        assert reading.took_s[Op.B] == pytest.approx((3.0, 4.0, 4.0))
    assert reading.update_s == pytest.approx((0.5,) * 3) and reading.noise == pytest.approx(0.0)
    link = Link(hop_s=UNEVEN.hop_s, between_s=0.0)
    assert predict(case, reading, link, windows) == pytest.approx(sim.micro_batches_per_s, rel=1e-6)


def test_the_hop_is_read_off_a_run_of_1f1b() -> None:
    case = Case(schedule="1f1b", stages=3, accumulation=4)
    sim = simulate(case.family, case.shape, UNEVEN, windows=4, keep_events=True)
    assert read_link(sim.events).hop_s == pytest.approx(0.25)


def test_step_costs_come_in_milliseconds() -> None:
    case = Case(schedule="zb-h1", stages=3, accumulation=8)
    sim = simulate(case.family, case.shape, UNEVEN, windows=6, keep_events=True)
    costs = step_costs(read(sim.events, case, 1, 4), 0.25)
    assert costs.forward == pytest.approx((2e3, 2.5e3, 2e3)) and costs.weight_grad == pytest.approx((1e3, 2e3, 1e3))
    assert costs.hop == pytest.approx(250.0)


def test_what_an_update_costs_is_what_the_next_action_waits() -> None:
    """F takes 1 s and B 2 s; the F after an update waits 0.7 s for it."""
    now, events = 0.0, []

    def add(stage: int, action: str, seconds: float) -> None:
        nonlocal now
        events.append(Event(stage, f"{stage}{action}", now, now + seconds, 0))
        now += seconds

    for stage in range(2):
        now = 0.0
        for window in range(4):
            for m in range(3 * window, 3 * window + 3):
                add(stage, f"F{m}", 1.7 if m % 3 == 0 and window else 1.0)
                add(stage, f"B{m}", 2.0)
            add(stage, f"U{window}", 0.1)
    reading = read(events, Case(schedule="paci", stages=2, accumulation=3), 0, 3)
    assert reading.took_s[Op.F] == pytest.approx((1.0, 1.0)) and reading.took_s[Op.B] == pytest.approx((2.0, 2.0))
    assert reading.update_s == pytest.approx((0.8, 0.8))
    assert reading.micro_batches_per_s == pytest.approx(9 / (3 * 9.8))
    assert reading.utilization == pytest.approx(1.0)
