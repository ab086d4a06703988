"""Numbers of simulated runs against closed forms and published numbers."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from paci_rt.action import Action, Op
from paci_rt.schedules import policies
from paci_rt.simulate import Costs, Simulation, metrics
from support.simulated import PUBLISHED, UNIT, run


def longest(simulation: Simulation, costs: Costs) -> float:
    """C, from the bubble rate, for stages that are all alike."""
    work = costs.forward_s[0] + costs.input_grad_s[0] + costs.weight_grad_s[0]
    return simulation.accumulation * work / (1 - simulation.bubble_rate)


# ------------------------------------------------------------------------------------------------ published, by hand


@pytest.mark.parametrize(
    ("stages", "m", "expected"), [(4, 8, (33, 27, 24)), (8, 24, (93, 79, 72))], ids=["4 stages", "8 stages"]
)
def test_unit_times(stages, m, expected):
    for name, length in zip(("1f1b", "zb-h1", "zb-h2"), expected, strict=True):
        assert longest(run(name, stages, m), UNIT) == pytest.approx(length, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "rate"), [("1f1b", 0.2431), ("zb-h1", 0.1585), ("zb-1p", 0.1585), ("zb-h2", 0.1083), ("zb-2p", 0.0433)]
)
def test_published_bubble_rates(name, rate):
    assert round(run(name, 8, 24, PUBLISHED).bubble_rate, 4) == pytest.approx(rate, abs=1e-4)


def test_closed_forms_of_the_bubble():
    """C - m T, with hops and without, for weight halves no longer than the others."""
    rng = random.Random(3)
    for case in range(40):
        p = rng.choice((2, 3, 4, 5, 8))
        m = p * rng.randint(2, 5)
        f, i = rng.uniform(1, 3), rng.uniform(1, 3)
        w, c = rng.uniform(0.3, 1) * min(f, i), rng.uniform(0, 0.1) * (case % 3)
        costs = Costs(forward_s=(f,), input_grad_s=(i,), weight_grad_s=(w,), hop_s=c)
        for name, bubble in (
            ("1f1b", (p - 1) * (f + i + w) + (2 * (p - 1) * m / p + 2 * (p - 2)) * c),
            ("zb-h1", (p - 1) * (f + i - w) + 4 * (p - 1) * c),
            ("zb-h2", (p - 1) * (f + i - 2 * w) + 2 * (p - 1) * c),
        ):
            simulation = run(name, p, m, costs)
            assert longest(simulation, costs) - m * (f + i + w) == pytest.approx(bubble, abs=1e-9 * m), (name, p, m)
            again = run(name, p, m, costs, windows=3)
            assert again.bubble_rate == pytest.approx(simulation.bubble_rate, rel=1e-9)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_interleaving_divides_the_bubble(chunks):
    p, m = 4, 8
    simulation = run("interleaved-1f1b", p * chunks, m, chunks=chunks)
    assert simulation.bubble_rate == pytest.approx((p - 1) / (chunks * m + p - 1), rel=1e-12)
    assert len(simulation.peak_activations) == p
    assert simulation.peak_activations[p - 1] == (p * (chunks - 1) + 1 if chunks > 1 else 1)


# --------------------------------------------------------------------------------------------------- asynchronous ones


@pytest.mark.parametrize(("stages", "a"), [(2, 1), (4, 2), (8, 4), (8, 16), (30, 4)])
def test_paci_has_no_bubbles_in_its_steady_part(stages, a):
    simulation = run("paci", stages, a, windows=2 * math.ceil(stages / a) + 6)
    assert simulation.steady_windows >= 4
    assert simulation.steady_utilization == pytest.approx(1.0, abs=1e-12)
    assert simulation.micro_batches_per_s == pytest.approx(1 / 3, rel=1e-12)
    assert simulation.peak_activations == {rank: stages - rank for rank in range(stages)}


def test_updates_are_part_of_the_steady_time():
    simulation = run("paci", 4, 4, replace(UNIT, update_s=(2.0,)), windows=20)
    assert simulation.steady_utilization == pytest.approx(1.0, abs=1e-12)
    assert simulation.micro_batches_per_s == pytest.approx(4 / 14, rel=1e-12)
    for windows in (1, 2, 5):  # a flush: 8 micro-batches in 11 times 3, and the update
        flush = run("1f1b", 4, 8, replace(UNIT, update_s=(2.0,)), windows=windows)
        assert flush.micro_batches_per_s == pytest.approx(8 / 35)
        assert flush.steady_utilization == pytest.approx(26 / 35)
        assert flush.bubble_rate == pytest.approx(9 / 33)


@pytest.mark.parametrize("slack", [0, 1, 3])
@pytest.mark.parametrize("a", [1, 2, 4, 7])
def test_drift_is_the_formula(a, slack):
    p, windows = 6, 24
    simulation = run("paci", p, a, slack=slack, windows=windows)
    for rank in range(p):
        ahead = p - 1 - rank + (slack if rank < p - 1 else 0)
        assert max(simulation.drift[rank]) == math.ceil(ahead / a)
        assert sum(simulation.drift[rank].values()) == windows * a
        assert simulation.drift[rank] == simulation.delay[rank]
        # In the steady part every a-th micro-batch crosses one update more than those before it.
        assert set(simulation.drift[rank]) <= set(range(math.ceil(ahead / a) + 1))
    assert simulation.max_drift == math.ceil((p - 1 + slack) / a) == simulation.max_delay


def test_versions_of_every_asynchronous_schedule():
    p, windows = 8, 30
    eager = run("async-1f1b", p, 1, windows=windows)
    assert [max(eager.drift[rank]) for rank in range(p)] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert eager.weight_versions == dict.fromkeys(range(p), 1)
    costs = replace(UNIT, weight_bytes=tuple(10.0 * (stage + 1) for stage in range(p)))
    kept = run("pipedream", p, 1, costs, windows=windows)
    assert all(kept.drift[rank] == {0: windows} for rank in range(p))
    assert [max(kept.delay[rank]) for rank in range(p)] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert kept.weight_versions == {rank: p - rank for rank in range(p)}
    assert kept.extra_weight_bytes == {rank: (p - 1 - rank) * 10.0 * (rank + 1) for rank in range(p)}
    double = run("pipedream-2bw", p, 8, costs, windows=5)
    assert all(double.drift[rank] == {0: 40} for rank in range(p))
    assert all(double.delay[rank] == {0: 8, 1: 32} for rank in range(p))
    assert double.extra_weight_bytes == {rank: 10.0 * (rank + 1) for rank in range(p)}
    assert (double.max_drift, double.max_delay) == (0, 1)
    flush = run("1f1b", p, 8, windows=3)
    assert flush.drift == flush.delay == {rank: {0: 24} for rank in range(p)}
    for policy, held in (("stash", [3, 3, 3, 2, 2, 2, 2, 1]), ("predict", [1] * p)):
        simulation = run("paci", p, 4, costs, windows=12, policy=policy)
        assert list(simulation.weight_versions.values()) == held
        extra = [count - 1 for count in held] if policy == "stash" else [1] * (p - 1) + [0]
        assert list(simulation.extra_weight_bytes.values()) == [10.0 * (r + 1) * n for r, n in enumerate(extra)]
        assert (simulation.max_drift, simulation.max_delay) == ((0, 2) if policy == "stash" else (2, 2))


def test_versions_on_the_events():
    for policy in ("bounded", "stash", "2bw"):
        events = run("paci", 3, 2, windows=4, policy=policy, keep_events=True).events
        updates, at_forward = [0] * 3, {}
        for event in sorted(events, key=lambda event: (event.start_s, event.action[1:] != "U")):
            action = Action.parse(event.action)
            current = updates[action.stage]
            if action.op is Op.F:
                expected = policies.forward_version(policy, action.index // 2, current, 0)
                at_forward[action.stage, action.index] = expected
            elif action.op is Op.B:
                expected = policies.backward_version(policy, at_forward[action.stage, action.index], current)
            else:
                expected = current
                updates[action.stage] += 1
            assert (event.action, event.version) == (event.action, expected)
        assert updates == [4, 4, 4]


def test_versions_for_arrays_are_those_of_the_policies():
    window, current = (grid.ravel() for grid in np.meshgrid(range(6), range(6)))
    for policy in policies.POLICIES:
        one_by_one = [policies.forward_version(policy, k, v, 0) for k, v in zip(window, current, strict=True)]
        assert metrics.forward_versions(policy, window, current).tolist() == one_by_one


def test_hops_and_slack():
    """Loops over k links take one hop more per micro-batch and link, there and back, shared by the k + 1 rounds."""
    hop = 0.5
    costs = replace(UNIT, hop_s=hop)
    for p in (2, 4, 8):
        simulation = run("paci", p, 4, costs, windows=400)
        assert simulation.steady_utilization == pytest.approx(3 / (3 + 2 * hop * (p - 1) / p), rel=1e-3)
        slack = run("paci", p, 4, costs, windows=400, slack=1)
        # Slack on all stages but the last relieves the loops that end there.
        assert slack.steady_utilization == pytest.approx(3 / (3 + 2 * hop * (p - 2) / (p - 1)), rel=1e-3)
    assert run("paci", 2, 4, costs, windows=20, slack=1).steady_utilization == pytest.approx(1.0, abs=1e-12)


# -------------------------------------------------------------------------------------------------------------- memory


def test_peaks_in_units_and_bytes():
    costs = replace(UNIT, activation_bytes=(100.0,), stash_bytes=(40.0,), input_bytes=(7.0,))
    flush = run("1f1b", 4, 8, costs)
    assert list(flush.peak_activations.values()) == [4, 3, 2, 1]
    assert list(flush.peak_activation_bytes.values()) == [400.0, 300.0, 200.0, 100.0]
    split = run("zb-h1", 4, 8, costs)
    assert list(split.peak_activations.values()) == [4, 3, 2, 1]
    assert list(split.peak_stashes.values()) == [1, 2, 3, 4]  # the stage's own W follows its I
    assert list(split.peak_activation_bytes.values()) == [400.0, 340.0, 280.0, 220.0]
    assert list(run("zb-h2", 4, 8, costs).peak_activations.values()) == [7, 5, 3, 1]
    again = run("paci", 4, 4, costs, windows=6, policy="recompute")
    assert list(again.peak_activation_bytes.values()) == [n * 7.0 + 93.0 for n in (4, 3, 2, 1)]
    assert again.busy_s[0] == 24 * 4.0  # a second forward each
    assert again.busy_s[3] == 24 * 3.0  # not where a backward follows its forward at once
    for options in ({"policy": "predict"}, {}, {"lookahead": True}):  # paci looks ahead of its own
        late = run("paci", 4, 4, replace(costs, predict_s=(0.5,)), windows=6, **options)
        assert late.busy_s[0] == 24 * 3.0 + 0.5 * sum(n for delay, n in late.delay[0].items() if delay)
        assert late.busy_s[3] == 24 * 3.0
    plain = run("paci", 4, 4, replace(costs, predict_s=(0.5,), weight_bytes=(8.0,)), windows=6, lookahead=False)
    assert plain.busy_s[0] == 24 * 3.0
    assert list(plain.extra_weight_bytes.values()) == [0.0] * 4
    with pytest.raises(ValueError, match="look-ahead under 1f1b: it flushes"):
        run("1f1b", 4, 4, lookahead=True)
    assert run("zb-h1", 4, 8, costs, policy="recompute").busy_s[0] == 8 * 4.0
    chunks = run("interleaved-1f1b", 4, 4, replace(costs, activation_bytes=(1.0, 10.0, 100.0, 1000.0)), chunks=2)
    assert chunks.peak_activations == {0: 5, 1: 3}
    assert chunks.peak_activation_bytes == {0: 203.0, 1: 1020.0}  # F0 F1 of either stage, one more F


def test_a_thousand_stages():
    """More stages than micro-batches: every forward is over before the first stage's first update."""
    simulation = run("paci", 1000, 8, windows=12)
    assert simulation.makespan_s == (96 + 999) * 3.0
    assert simulation.max_drift == 11


def test_nothing_takes_time():
    simulation = run("1f1b", 2, 2, Costs(forward_s=(0.0,), input_grad_s=(0.0,), weight_grad_s=(0.0,)))
    assert (simulation.makespan_s, simulation.bubble_rate, simulation.steady_utilization) == (0.0, 0.0, 0.0)


def test_json():
    found = json.loads(json.dumps(run("paci", 3, 2, windows=4, keep_events=True).to_json()))
    assert found["peak_activations"] == [3, 2, 1]
    assert found["drift"][2] == {"0": 8}
    assert found["window_end_s"][-1] == found["makespan_s"]
    assert "events" not in found
