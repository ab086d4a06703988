"""The simulator against closed forms, published numbers and a second, slow and plain, computation."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest

from paci_rt import schedules
from paci_rt.action import Action, Op, decode, dependencies
from paci_rt.errors import ScheduleError
from paci_rt.schedules import Shape, StepCosts, policies
from paci_rt.schedules.base import flush_family
from paci_rt.simulate import Costs, Simulation, metrics, simulate, timeline

UNIT = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,))
PUBLISHED = Costs(forward_s=(18.522,), input_grad_s=(18.086,), weight_grad_s=(9.337,), hop_s=0.601)
UNEVEN = Costs(
    forward_s=(1.0, 2.5, 1.25, 0.5),
    input_grad_s=(1.5, 1.0, 2.0, 1.0),
    weight_grad_s=(0.5, 1.5, 1.0, 0.75),
    update_s=(0.3, 0.1, 0.2, 0.4),
    hop_s=0.2,
    bandwidth_bytes_per_s=8.0,
    message_bytes=(12.0, 4.0, 20.0, 99.0),
    micro_batch_factors=(1.0, 1.3, 0.6),
    noise=0.2,
    seed=5,
)


def run(name: str, stages: int, m: int, costs: Costs = UNIT, **options) -> Simulation:
    of_run = {key: options.pop(key) for key in ("windows", "policy", "lookahead", "keep_events") if key in options}
    family = schedules.get(name)
    if family.takes_costs:
        options["costs"] = StepCosts(costs.forward_s, costs.input_grad_s, costs.weight_grad_s, costs.hop_s)
    return simulate(family, Shape(num_stages=stages, accumulation=m, **options), costs, **of_run)


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


def test_a_timeline_by_hand():
    """Two stages, two micro-batches; the hop takes 0.5 and a message occupies its channel for 2."""
    costs = replace(UNIT, hop_s=0.5, bandwidth_bytes_per_s=5.0, message_bytes=(10.0, 0.0), update_s=(0.25,))
    found = {event.action: (event.start_s, event.end_s) for event in run("gpipe", 2, 2, costs, keep_events=True).events}
    assert found == {
        "0F0": (0.0, 1.0),
        "0F1": (1.0, 2.0),
        "1F0": (3.5, 4.5),  # 1 + 2 + 0.5
        "1F1": (5.5, 6.5),  # the channel is free at 3
        "1B0": (6.5, 8.5),
        "1B1": (8.5, 10.5),
        "1U0": (10.5, 10.75),
        "0B0": (11.0, 13.0),
        "0B1": (13.0, 15.0),
        "0U0": (15.0, 15.25),
    }


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


# ------------------------------------------------------------------------------------------------------ two ways, same


def plainly(name: str, shape: Shape, costs: Costs, windows: int) -> dict[str, tuple[float, float]]:
    """Start and end of every action, by a recursion on what each one waits for; no noise."""
    family = schedules.get(name)
    streams = [decode(family.stream(shape, rank, windows)) for rank in range(shape.ranks)]
    before = {later: earlier for stream in streams for earlier, later in itertools.pairwise(stream)}
    sent_before, last = {}, {}
    for rank, stream in enumerate(streams):
        for action in stream:
            forward = action.op is Op.F
            if action.op in (Op.F, Op.B, Op.I) and 0 <= action.stage + (1 if forward else -1) < shape.num_stages:
                sent_before[action] = last.get((rank, forward))
                last[rank, forward] = action
    known: dict[Action, tuple[float, float]] = {}

    def at(name: str, stage: int) -> float:
        values = getattr(costs, name)
        return values[stage] if len(values) > 1 else values[0]

    def sent(action: Action) -> float:
        stage = action.stage if action.op is Op.F else action.stage - 1
        free = sent(sent_before[action]) if sent_before[action] else 0.0
        return max(span(action)[1], free) + at("message_bytes", stage) / costs.bandwidth_bytes_per_s

    def span(action: Action) -> tuple[float, float]:
        if action not in known:
            start = span(before[action])[1] if action in before else 0.0
            for needed in dependencies(action, shape.num_stages, shape.accumulation, split=family.split):
                if needed.stage == action.stage:
                    start = max(start, span(needed)[1])
                else:
                    start = max(start, sent(needed) + (costs.hop_s if shape.ranks > 1 else 0.0))
            names = {"F": ["forward_s"], "I": ["input_grad_s"], "W": ["weight_grad_s"], "U": ["update_s"]}
            names["B"] = [*names["I"], *names["W"]]
            factor = 1.0 if action.op is Op.U else costs.micro_batch_factors[action.index % 3]
            known[action] = (start, start + sum(at(name, action.stage) for name in names[action.op.value]) * factor)
        return known[action]

    return {str(action): span(action) for stream in streams for action in stream}


CASES = [
    ("paci", {"accumulation": 3, "slack": 1}, 4),
    ("1f1b", {"accumulation": 5}, 2),
    ("gpipe", {"accumulation": 6}, 2),
    ("zb-h1", {"accumulation": 6}, 2),
    ("zb-h2", {"accumulation": 8}, 2),
    ("zb-2p", {"accumulation": 8}, 1),
    ("interleaved-1f1b", {"accumulation": 4, "chunks": 2}, 2),
    ("interleaved-1f1b", {"accumulation": 4, "chunks": 4}, 1),
    ("pipedream-2bw", {"accumulation": 4}, 3),
    ("async-1f1b", {"accumulation": 1}, 9),
]


@pytest.mark.parametrize(("name", "options", "windows"), CASES)
def test_equal_to_a_plain_computation(name, options, windows):
    shape, costs = Shape(num_stages=4, **options), replace(UNEVEN, noise=0.0)
    expected = plainly(name, shape, costs, windows)
    events = simulate(schedules.get(name), shape, costs, windows=windows, keep_events=True).events
    assert len(events) == len(expected)
    for event in events:
        assert (event.start_s, event.end_s) == pytest.approx(expected[event.action], rel=1e-12), event.action
    order = [(event.start_s, event.stage) for event in events]
    assert order == sorted(order)


@pytest.mark.parametrize(("name", "options", "windows"), CASES)
@pytest.mark.parametrize("costs", [UNEVEN, replace(UNEVEN, bandwidth_bytes_per_s=math.inf)])
def test_both_ways_to_play_are_equal_to_the_bit(name, options, windows, costs):
    shape, family = Shape(num_stages=4, **options), schedules.get(name)
    starts = []
    for way in (timeline.play_one_by_one, timeline.play_all_at_once):
        work = timeline.Work(family, shape, costs, windows, family.policies[0], False)
        assert len(way(work)) == 0
        starts.append(work.start)
    assert starts[0][-2] > 1
    assert np.array_equal(*starts)


def test_many_ranks_take_the_way_of_arrays(monkeypatch):
    simulation = run("paci", 40, 4, PUBLISHED, windows=30)
    monkeypatch.setattr(timeline, "RANKS_FOR_ARRAYS", 1000)
    monkeypatch.setattr(timeline, "play_all_at_once", None)
    assert run("paci", 40, 4, PUBLISHED, windows=30) == simulation


def test_noise_is_seeded_and_has_its_size():
    costs = replace(UNIT, noise=0.25)
    events = run("gpipe", 2, 4000, costs, keep_events=True).events
    forwards = np.array([event.end_s - event.start_s for event in events if "F" in event.action])
    assert forwards.min() > 0
    # 8,000 draws: five standard errors of a mean and of a standard deviation of 0.25.
    assert forwards.mean() == pytest.approx(1.0, abs=5 * 0.25 / 8000**0.5)
    assert forwards.std() == pytest.approx(0.25, abs=5 * 0.25 / 8000**0.5)
    assert run("gpipe", 2, 10, costs) == run("gpipe", 2, 10, costs)
    assert run("gpipe", 2, 10, costs).makespan_s != run("gpipe", 2, 10, replace(costs, seed=1)).makespan_s


def test_factors_by_micro_batch():
    events = run("1f1b", 1, 4, replace(UNIT, micro_batch_factors=(1.0, 3.0)), keep_events=True).events
    assert [event.end_s - event.start_s for event in events] == [1.0, 2.0, 3.0, 6.0, 1.0, 2.0, 3.0, 6.0, 0.0]


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


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"forward_s": (-1.0,)}, "forward_s is -1.0: give a finite number of at least 0"),
        ({"forward_s": (1.0, math.nan)}, "forward_s of stage 1 is nan"),
        ({"weight_grad_s": (math.inf,)}, "weight_grad_s is inf"),
        ({"input_grad_s": ()}, "input_grad_s is (): give a tuple"),
        ({"input_grad_s": 3.0}, "input_grad_s is 3.0: give a tuple"),
        ({"update_s": ("1",)}, "update_s is '1'"),
        ({"hop_s": -0.5}, "hop_s is -0.5"),
        ({"hop_s": math.inf}, "hop_s is inf"),
        ({"bandwidth_bytes_per_s": 0.0}, "bandwidth_bytes_per_s is 0.0: give a number above 0"),
        ({"noise": math.nan}, "noise is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_costs_are_named(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        replace(UNIT, **options)


def test_what_does_not_fit_together_is_named():
    for field in ("forward_s", "weight_bytes"):
        with pytest.raises(ValueError, match=f"{field} has 3 values for 4 stages"):
            run("1f1b", 4, 4, replace(UNIT, **{field: (1.0, 1.0, 1.0)}))
    with pytest.raises(ValueError, match="windows is 0"):
        run("1f1b", 4, 4, windows=0)
    with pytest.raises(ValueError, match="slack is 1: 1f1b takes no slack"):
        run("1f1b", 4, 4, slack=1)
    with pytest.raises(ValueError, match="chunks is 2: zb-h1 takes no chunks"):
        run("zb-h1", 4, 4, chunks=2)
    with pytest.raises(ValueError, match="accumulation is 4: pipedream updates after every micro-batch"):
        run("pipedream", 4, 4)
    with pytest.raises(ValueError, match="accumulation is 3: interleaved-1f1b"):
        run("interleaved-1f1b", 4, 3, chunks=2)
    with pytest.raises(ValueError, match="at least 7 micro-batches per window"):
        run("pipedream-2bw", 8, 4)
    with pytest.raises(ValueError, match="unknown policy 'stach': did you mean 'stash'"):
        run("paci", 4, 4, policy="stach")


def of_words(*ranks: str):
    """A flush schedule from streams such as ``"0F0 0B0"``, one a rank."""
    from paci_rt.action import encode

    streams = [[Action.parse(word) for word in words.split()] for words in ranks]
    codes = [np.concatenate([encode(a.stage, a.op, a.index) for a in stream]) for stream in streams]
    return flush_family("by-hand", lambda shape, rank: codes[rank], lambda shape, rank: shape.accumulation)


@pytest.mark.parametrize("ranks_for_arrays", [1, 100])
@pytest.mark.parametrize(
    ("streams", "stuck"),
    [
        (("0F0 0F1 0B0 0B1", "1F1 1B1 1F0 1B0"), None),  # another order on each rank is no deadlock here
        (("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"), "0B0, 1F1"),
        (("0B0 0F0 0F1 0B1", "1F0 1B0 1F1 1B1"), "0B0, 1F0"),
        (("0F0 0F1 0B0", "1F0 1B0 1F1 1B1"), "0U0"),  # one backward is missing
    ],
)
def test_orders_that_cannot_run(monkeypatch, ranks_for_arrays, streams, stuck):
    monkeypatch.setattr(timeline, "RANKS_FOR_ARRAYS", ranks_for_arrays)
    family, shape = of_words(*streams), Shape(num_stages=2, accumulation=2)
    if stuck is None:
        assert simulate(family, shape, UNIT).busy_s == {0: 6.0, 1: 6.0}
        return
    with pytest.raises(ScheduleError, match=f"by-hand deadlocks: nothing can run past {stuck};"):
        simulate(family, shape, UNIT)


@pytest.mark.parametrize(
    ("first", "why"),
    [
        ("0F0 0F0 0F1 0B0 0B1", "action 0F0 in the stream of rank 0 runs twice"),
        ("0F0 1F1 0B0 0B1", "action 1F1 in the stream of rank 0 does not belong there"),
        ("0F0 0F2 0B0 0B1", "action 0F2 in the stream of rank 0 does not belong there"),
    ],
)
def test_streams_that_are_none(first, why):
    with pytest.raises(ScheduleError, match=why):
        simulate(of_words(first, "1F0 1B0 1F1 1B1"), Shape(num_stages=2, accumulation=2), UNIT)
