"""When each action runs: by hand, against a second, slow and plain, computation, and orders that cannot run."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from paci_rt import schedules
from paci_rt.action import Action, Op, decode, dependencies
from paci_rt.errors import ScheduleError
from paci_rt.schedules import Shape
from paci_rt.schedules.base import flush_family
from paci_rt.simulate import Costs, simulate, timeline
from support.simulated import PUBLISHED, UNEVEN, UNIT, run


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
            to = action.stage + (1 if forward else -1)
            if action.op in (Op.F, Op.B, Op.I) and 0 <= to < shape.num_stages and shape.rank_of(to) != rank:
                channel = rank, shape.rank_of(to), forward
                sent_before[action] = last.get(channel)
                last[channel] = action
    known: dict[Action, tuple[float, float]] = {}

    def at(name: str, stage: int) -> float:
        values = getattr(costs, name)
        return values[stage] if len(values) > 1 else values[0]

    def sent(action: Action) -> float:
        if action not in sent_before:  # it stays on its rank
            return span(action)[1]
        stage = action.stage if action.op is Op.F else action.stage - 1
        free = sent(sent_before[action]) if sent_before[action] else 0.0
        return max(span(action)[1], free) + at("message_bytes", stage) / costs.bandwidth_bytes_per_s

    def span(action: Action) -> tuple[float, float]:
        if action not in known:
            start = span(before[action])[1] if action in before else 0.0
            for needed in dependencies(action, shape.num_stages, shape.accumulation, split=family.split):
                if shape.rank_of(needed.stage) == shape.rank_of(action.stage):  # handed over
                    start = max(start, span(needed)[1])
                else:
                    start = max(start, sent(needed) + (costs.hop_s if needed in sent_before else 0.0))
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
    ("paci-v", {"accumulation": 3, "chunks": 2, "placement": "v"}, 4),
    ("paci-v", {"accumulation": 2, "chunks": 2, "placement": "v", "activation_limit": 1}, 4),
    ("zb-v", {"accumulation": 6, "chunks": 2, "placement": "v"}, 2),
    ("zb-v", {"accumulation": 4, "chunks": 2, "placement": "v"}, 2),
    ("v-half", {"accumulation": 5, "chunks": 2, "placement": "v"}, 2),
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
