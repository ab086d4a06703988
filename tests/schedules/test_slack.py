"""In-flight slack: the formula of the period against the simulator, least slack against all others, and what is
refused."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from paci_rt import schedules
from paci_rt.action import Action, Op
from paci_rt.errors import ScheduleError
from paci_rt.planner.stage_costs import loops
from paci_rt.schedules import AUTO, FAMILIES, Shape, plan_slack, steady_period
from paci_rt.schedules.lowering import Lowering
from paci_rt.schedules.slack import Loops, check_slack, parse_slack, slack_by_stage, slack_text, warm_ups
from paci_rt.schedules.validate import validate
from paci_rt.simulate import Costs, Simulation, simulate

DESIGN = Path(__file__).resolve().parents[2] / "docs" / "method" / "slack.md"


def random_slack(rng: random.Random, stages: int) -> tuple[int, ...]:
    """Any that runs: warm-ups that never grow along the pipeline, and at least those of the strict order."""
    slack = [0]
    for _ in range(stages - 1):
        slack.insert(0, max(0, slack[0] - 1 + rng.choice((0, 0, 1, 1, 1, 2, 3))))
    return tuple(slack)


def random_costs(rng: random.Random, stages: int, **more: float) -> Costs:
    def times(low: float, high: float) -> tuple[float, ...]:
        return tuple(rng.uniform(low, high) for _ in range(stages))

    return Costs(
        forward_s=times(0.2, 2), input_grad_s=times(0.2, 2), weight_grad_s=times(0, 2), hop_s=rng.uniform(0, 2), **more
    )


def late_period(name: str, shape: Shape, costs: Costs, micro_batches: int) -> float:
    """Seconds a micro-batch, late in a long run."""
    windows = micro_batches // shape.accumulation
    ends = simulate(schedules.get(name), shape, costs, windows=windows, lookahead=False).window_end_s
    last = windows - 2 - -(-shape.most_ahead // shape.accumulation)
    first = last // 2
    return (ends[last] - ends[first]) / ((last - first) * shape.accumulation)


# ---------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("seed", range(60))
def test_the_period_is_what_the_simulator_settles_to(seed: int) -> None:
    rng = random.Random(seed)
    stages, a = rng.choice((1, 2, 3, 4, 5, 8)), rng.choice((1, 2, 3, 4))
    name = rng.choice(("paci", "paci-split"))
    costs = random_costs(rng, stages)
    shape = Shape(num_stages=stages, accumulation=a, slack=rng.choice((0, 1, random_slack(rng, stages))))
    period = loops(costs, [False] * stages, split=name == "paci-split").period(shape.slack)
    assert late_period(name, shape, costs, 3000) == pytest.approx(period, rel=1e-3)


@pytest.mark.parametrize("seed", range(30))
def test_with_the_slack_that_is_planned_nobody_waits_for_links(seed: int) -> None:
    rng = random.Random(100 + seed)
    stages, name = rng.choice((2, 3, 4, 6, 8)), rng.choice(("paci", "paci-split"))
    costs = random_costs(rng, stages)
    if seed % 3 == 0:  # equal stages leave no room at all
        costs = Costs(forward_s=(1.0,), input_grad_s=(1.2,), weight_grad_s=(0.8,), hop_s=costs.hop_s)
    waits = loops(costs, [False] * stages, split=name == "paci-split")
    slack = waits.plan(tolerance=0.0)
    assert waits.period(slack) == pytest.approx(waits.shortest_period, rel=1e-9)
    shape = Shape(num_stages=stages, accumulation=rng.choice((1, 3, 4)), slack=slack)
    assert late_period(name, shape, costs, 2000) == pytest.approx(waits.shortest_period, rel=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_messages_that_fill_their_link_are_part_of_it(seed: int) -> None:
    """Size over bandwidth is latency, and one message at a time besides; recomputed forwards are work."""
    rng = random.Random(200 + seed)
    stages = rng.choice((2, 3, 5))
    sizes = tuple(rng.uniform(0, 4) for _ in range(stages))
    costs = random_costs(rng, stages, bandwidth_bytes_per_s=1.0, message_bytes=sizes, micro_batch_factors=(1.0,))
    again = [stage < stages - 1 for stage in range(stages)]
    waits = loops(costs, again, split=False)
    for slack in (0, waits.plan(tolerance=0.0)):
        shape = Shape(num_stages=stages, accumulation=2, slack=slack)
        run = simulate(schedules.get("paci"), shape, costs, windows=1000, policy="recompute").window_end_s
        assert (run[900] - run[450]) / 900 == pytest.approx(waits.period(slack), rel=1e-3)
    assert waits.period(waits.plan(tolerance=0.0)) == pytest.approx(waits.shortest_period, rel=1e-9)
    assert waits.shortest_period >= max(sizes[:-1])


@pytest.mark.parametrize("seed", range(20))
def test_updates_add_what_the_slowest_stage_spends_on_them_at_most(seed: int) -> None:
    rng = random.Random(300 + seed)
    stages, a = rng.choice((2, 3, 4, 6)), rng.choice((1, 2, 4, 7))
    plain = random_costs(rng, stages)
    updates = tuple(rng.uniform(0, 3) for _ in range(stages))
    costs = replace(plain, update_s=updates)
    waits = loops(plain, [False] * stages, split=False)
    shape = Shape(num_stages=stages, accumulation=a, slack=rng.choice((0, 2, waits.plan())))
    found = late_period("paci", shape, costs, 2800)
    stage_s = zip(plain.forward_s, plain.input_grad_s, plain.weight_grad_s, updates, strict=True)
    least = max(forward + input_grad + weight_grad + update / a for forward, input_grad, weight_grad, update in stage_s)
    assert max(least, waits.period(shape.slack)) * (1 - 1e-3) <= found
    assert found <= (waits.period(shape.slack) + max(updates) / a) * (1 + 1e-3)


# ------------------------------------------------------------------------------------------------------------- planning


def all_slacks(stages: int, most: int) -> Iterator[tuple[int, ...]]:
    for slack in itertools.product(range(most + 1), repeat=stages - 1):
        each = (*slack, 0)
        if all(after <= here + 1 for here, after in itertools.pairwise(each)):
            yield each


@pytest.mark.parametrize("seed", range(25))
def test_no_stage_could_do_with_less(seed: int) -> None:
    """Of all slack that keeps the period, the planned one is the least on every stage."""
    rng = random.Random(400 + seed)
    stages = rng.choice((2, 3, 4))
    times = [rng.choice((1.0, 2.0, rng.uniform(0.5, 3))) for _ in range(stages)]
    hops = [rng.choice((0.0, 0.5, rng.uniform(0, 2))) for _ in range(stages - 1)]
    late = [rng.choice((0.0, time / 3)) for time in times]
    tolerance = rng.choice((0.0, 0.05, 0.3))
    planned = plan_slack(times, hops, after_send=late, tolerance=tolerance)
    target = max(times) * (1 + tolerance) * (1 + 1e-9)
    assert steady_period(times, hops, planned, after_send=late) <= target
    enough = [each for each in all_slacks(stages, 6) if steady_period(times, hops, each, after_send=late) <= target]
    assert planned in enough
    assert planned == tuple(map(min, zip(*enough, strict=True)))


def test_plans_by_hand() -> None:
    forward, whole = 1.0, 3.0
    strict = 8 * [whole]
    assert plan_slack(strict, 7 * [0.0]) == 8 * (0,)
    # Two forwards between neighbours hide up to half a period, three up to a whole one.
    for hop, more in ((0.25 * forward, 1), (0.5 * forward, 1), (whole / 2, 1), (whole / 2 + 0.1, 2), (whole, 2)):
        expected = tuple(more * stage for stage in range(7, -1, -1))
        assert plan_slack(strict, 7 * [hop], tolerance=0.0)[-2:] == expected[-2:]
        if hop in (0.25, 0.5, 1.5, 3.0):
            assert plan_slack(strict, 7 * [hop], tolerance=0.0) == expected
    assert steady_period(strict, 7 * [0.5]) == pytest.approx(3 + 2 * 0.5 * 7 / 8)
    assert steady_period(strict, 7 * [0.5], 3) == pytest.approx(3 + 2 * 0.5 * 6 / 7)  # what one number can do at best
    assert plan_slack(strict, 7 * [0.017]) == 8 * (0,)  # less than a hundredth is not worth it
    # While W runs, the gradient travels: half a W is hidden for nothing.
    assert plan_slack(strict, 7 * [0.5], after_send=8 * [1.0], tolerance=0.0) == 8 * (0,)
    assert plan_slack(strict, 7 * [0.51], after_send=8 * [1.0], tolerance=0.0) != 8 * (0,)
    # Quick stages before a slow one have time to wait; what a slow link in the middle takes, all before it give.
    assert plan_slack([1, 1, 3, 3], [0.4, 0.4, 0.0]) == (0, 0, 0, 0)
    assert plan_slack([3, 3, 3, 3], [0, 1, 0]) == (1, 1, 0, 0)
    assert plan_slack([1, 1, 3, 3], [0, 2.0, 0]) == (0, 1, 0, 0)  # one number for all could not say it
    assert plan_slack([3.0], []) == (0,)
    assert plan_slack([0.0, 0.0], [1.0]) == (0, 0)


def test_choices_lead_from_none_to_all() -> None:
    rng = random.Random(5)
    for stages in (1, 2, 4, 8):
        waits = Loops([rng.uniform(1, 3) for _ in range(stages)], [rng.uniform(0, 2) for _ in range(stages - 1)])
        found = waits.choices()
        periods = [waits.period(slack) for slack in found]
        assert found[0] == 0 and slack_by_stage(found[-1], stages) == waits.plan(tolerance=0.0)
        assert all(after < before * 0.99 + 1e-12 for before, after in itertools.pairwise(periods[:-1]))
        assert periods == sorted(periods, reverse=True) and periods[-1] == pytest.approx(waits.shortest_period)
        for before, after in itertools.pairwise(found):
            pairs = zip(slack_by_stage(before, stages), slack_by_stage(after, stages), strict=True)
            assert all(one <= other for one, other in pairs)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (([], []), {}, "stage_times is empty"),
        (([1, 1], [1, 1]), {}, "hops has 2 values for 2 stages: give one per link, 1"),
        (([1, -1], [1]), {}, "stage_times has -1"),
        (([1, 1], [float("nan")]), {}, "hops has nan"),
        (([1, 1], [float("inf")]), {}, "hops has inf"),
        (([1, "1"], [1]), {}, "stage_times has '1'"),
        (([1, 1], [1]), {"tolerance": -0.1}, "tolerance is -0.1"),
        (([1, 1], [1]), {"least_period": -1}, "least_period has -1"),
        (([1, 1], [1]), {"after_send": [1]}, "after_send must give each stage"),
        (([1, 1], [1]), {"after_send": [2, 0]}, "after_send must give each stage"),
    ],
)
def test_what_cannot_be_planned(arguments, options, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        plan_slack(*arguments, **options)


# ---------------------------------------------------------------------------------------------------- what can be slack


def test_the_one_form_in_which_slack_is_kept() -> None:
    same = [((2, 2, 2, 0), 2), ([0, 0, 0, 0], 0), ([1, 0, 0, 0], (1, 0, 0, 0))]
    fewer = [((-1, -1, -1, 0), (-1, -1, -1, 0)), ((-3, -2, -1, 0), (-3, -2, -1, 0)), ((1, -1, 0, 0), (1, -1, 0, 0))]
    for given, kept in [(3, 3), (0, 0), ((3, 2, 1, 0), (3, 2, 1, 0)), *same, *fewer]:
        shape = Shape(num_stages=4, accumulation=2, slack=given)  # type: ignore[arg-type]
        assert shape.slack == kept == check_slack(given, 4) and type(shape.slack) is type(kept)
        assert [shape.warm_up(stage) for stage in range(4)] == list(warm_ups(kept, 4))
        assert parse_slack(slack_text(kept)) == kept
    assert Shape(num_stages=4, accumulation=2, slack=(1, 1, 1, 0)) == Shape(num_stages=4, accumulation=2, slack=1)
    assert check_slack((5, 0), 2) == 5 and check_slack((0,), 1) == 0
    assert parse_slack("auto") == AUTO
    for text in ("", "x", "1,", "1,,0", "1.5", "Auto", "1;0"):
        with pytest.raises(ValueError, match="is not a slack: write 2, or one number per stage such as"):
            parse_slack(text)


@pytest.mark.parametrize(
    ("slack", "words"),
    [
        (-1, "slack is -1: give an integer of at least 0"),
        (True, "slack is True"),
        (1.0, "slack is 1.0"),
        ("auto", "slack is 'auto'"),
        (None, "slack is None"),
        ((), "which is for 0 stages, and there are 4"),
        ((1, 0), "slack is 1,0, which is for 2 stages, and there are 4"),
        ((1, 1, 1, 1), "slack is 1,1,1,1: the last stage waits for no gradient, so end with 0"),
        ((1, -3, 0, 0), "slack is 1,-3,0,0: stage 1 runs 2 forwards ahead without any, so give it at least -2"),
        ((-4, 0, 0, 0), "stage 0 runs 3 forwards ahead without any, so give it at least -3"),
        ((-2, 0, 0, 0), "stage 1 would run 2 forwards ahead, and stage 0 before it only 1, .*give stage 0 at least -1"),
        ((0, 0, 0, -1), "slack is 0,0,0,-1: stage 3 runs 0 forwards ahead"),
        ((1, 0.0, 0, 0), "slack is 1,0.0,0,0"),
        ((0, 2, 0, 0), "stage 1 would run 4 forwards ahead, and stage 0 before it only 3, .*give stage 0 at least 1"),
        ((0, 1, 3, 0), "stage 2 would run 4 forwards ahead, and stage 1 before it only 3, .*give stage 1 at least 2"),
    ],
)
def test_what_is_no_slack(slack, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words) as caught:
        Shape(num_stages=4, accumulation=2, slack=slack)
    assert "\n" not in str(caught.value)


def test_exactly_the_orders_that_are_taken_run_to_their_end() -> None:
    """All slack of three stages: what :func:`check_slack` refuses for its order does deadlock, and nothing else."""
    for slack in itertools.product(range(-2, 4), range(-1, 4), (0,)):
        shape = Shape(num_stages=3, accumulation=2)
        object.__setattr__(shape, "slack", slack)
        for name in ("paci", "paci-split"):
            lowering = Lowering(family=FAMILIES[name], shape=shape)
            if slack[1] <= slack[0] + 1:
                assert check_slack(slack, 3) in (slack, slack[0])
                validate(lowering, windows=12)
            else:
                with pytest.raises(ValueError, match="it would wait for ever"):
                    check_slack(slack, 3)
                with pytest.raises(ScheduleError, match="deadlocks"):
                    validate(lowering, windows=12)


def test_room_in_the_channels() -> None:
    """Half the difference of the warm-ups is what it takes to run."""
    for slack in all_slacks(4, 3):
        shape = Shape(num_stages=4, accumulation=3, slack=slack)
        ahead = [shape.warm_up(stage) for stage in range(4)]
        room = max(1, max(-(-(here - after) // 2) for here, after in itertools.pairwise(ahead)))
        lowering = Lowering(family=FAMILIES["paci"], shape=shape)
        validate(lowering, capacity=room)
        if room > 1:
            with pytest.raises(ScheduleError, match=f"deadlocks with channels of {room - 1} message"):
                validate(lowering, capacity=room - 1)


@pytest.mark.parametrize("seed", range(10))
def test_messages_on_their_way(seed: int) -> None:
    """Once warm, a channel never holds more than one message more than its ends are apart, whatever the times: with
    that much room, no send ever waits."""
    rng = random.Random(500 + seed)
    stages = rng.choice((2, 3, 4))
    slack = random_slack(rng, stages)
    costs = random_costs(rng, stages, noise=1.0, seed=seed)
    shape = Shape(num_stages=stages, accumulation=3, slack=slack)
    ahead = [shape.warm_up(stage) for stage in range(stages)]
    run = simulate(schedules.get("paci"), shape, costs, windows=60, keep_events=True)
    for link in range(stages - 1):
        room = ahead[link] - ahead[link + 1] + 1
        for op, sender, receiver in ((Op.F, link, link + 1), (Op.B, link + 1, link)):
            found = most_on_the_way(run, op, sender, receiver, range(ahead[0] + 1, 180 - ahead[0]))
            assert 1 <= found <= room


def most_on_the_way(run: Simulation, op: Op, sender: int, receiver: int, micro_batches: range) -> int:
    """Messages sent and not yet taken, right after one of ``micro_batches`` has been sent."""
    moments = []
    for event in run.events:
        action = Action.parse(event.action)
        if action.op is op and action.stage == sender:
            moments.append((event.end_s, 1, action.index))
        elif action.op is op and action.stage == receiver:
            moments.append((event.start_s, -1, -1))
    moments.sort()
    held = itertools.accumulate(change for _, change, _ in moments)
    return max(count for count, (*_, index) in zip(held, moments, strict=True) if index in micro_batches)


# ------------------------------------------------------------------------------------------------------- what it costs


def table_rows() -> list[list[str]]:
    """What docs/method/slack.md shows, computed: 8 stages, 8 micro-batches, F : I : W = 1 : 1 : 1."""
    rows = []
    for hop in (0.0, 0.25, 0.5):
        costs = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,), hop_s=hop)
        planned = plan_slack([3.0] * 8, [hop] * 7)
        orders = [("paci", 0, "strict")]
        orders += [("paci", planned[0], "uniform"), ("paci", planned, "planned")] if hop else []
        orders += [("paci-split", 0, "strict")]
        for name, slack, kind in orders:
            shape = Shape(num_stages=8, accumulation=8, slack=slack)
            run = simulate(schedules.get(name), shape, costs, windows=400, lookahead=False)
            rows.append(
                [
                    f"{hop:.0%}".replace("%", " %"),
                    f"`{name}`, {kind}" + (f" {slack_text(slack)}" if slack else ""),
                    f"{run.steady_utilization:.3f}",
                    f"{run.micro_batches_per_s * 3:.3f}",
                    str(run.peak_activations[0]),
                    str(run.max_drift),
                ]
            )
    return rows


def test_the_table_in_the_docs_is_what_the_simulator_says() -> None:
    text = DESIGN.read_text()
    shown = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in text.split("## In-flight slack")[1].split("\n## ")[0].splitlines()
        if line.startswith("|") and "---" not in line
    ]
    assert shown[1:] == table_rows()


def test_half_a_forward_of_latency_is_hidden() -> None:
    for hop, name, utilization, _throughput, _activations, _drift in table_rows():
        if "planned" in name or "split" in name or hop == "0 %":
            assert float(utilization) >= 0.97
        else:
            assert float(utilization) < 0.9
