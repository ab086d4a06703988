"""``paci-v``: what its streams are, that they run with small channels, and that its bounds are met and reached."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from paci_rt import schedules
from paci_rt.action import Action, Op, decode
from paci_rt.errors import ScheduleError
from paci_rt.schedules import Shape, StepCosts, policies
from paci_rt.schedules.lowering import Lowering, TiedWeight
from paci_rt.schedules.v_search import find
from paci_rt.schedules.validate import validate
from paci_rt.simulate import Costs, simulate

PACI_V = schedules.get("paci-v")


def shape(ranks: int, accumulation: int, costs: StepCosts | None = None, limit: float | None = None) -> Shape:
    return Shape(
        num_stages=2 * ranks,
        accumulation=accumulation,
        chunks=2,
        placement="v",
        costs=costs or StepCosts(),
        activation_limit=limit,
    )


def some(seed: int) -> tuple[Shape, Costs]:
    """Shapes of all kinds, and costs that their orders are fitted to."""
    rng = random.Random(seed)
    ranks, accumulation = rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 3, 5, 8))
    times = [tuple(rng.choice((1.0, rng.uniform(0.2, 2))) for _ in range(2 * ranks)) for _ in range(3)]
    hop = rng.choice((0.0, 0.05, 0.3, 2.0))
    costs = Costs(forward_s=times[0], input_grad_s=times[1], weight_grad_s=times[2], hop_s=hop)
    return shape(ranks, accumulation, StepCosts(*times, hop), rng.choice((None, None, 1, 2, 3.5))), costs


SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_hold_and_are_reached_and_the_rate_is_the_one_promised(seed: int) -> None:
    of_shape, costs = some(seed)
    ranks = of_shape.ranks
    run = simulate(PACI_V, of_shape, costs, windows=max(12, 240 // of_shape.accumulation))
    found = find(ranks, of_shape.costs, of_shape.activation_limit)
    assert run.steady_utilization == pytest.approx(found.utilization, rel=4e-3)
    for rank in range(ranks):
        assert run.peak_activations[rank] == PACI_V.in_flight_bound(of_shape, rank)
        assert run.peak_activations[rank] <= 2 * (of_shape.activation_limit or 10**9)
        drift, delay = policies.bounds("bounded", PACI_V, of_shape, rank)
        assert max(run.drift[rank]) == drift
        assert max(run.delay[rank]) == delay
    assert max(run.peak_activations.values()) / 2 == found.activations


@pytest.mark.parametrize("seed", SEEDS)
def test_it_runs_with_channels_of_two_messages(seed: int) -> None:
    of_shape, _ = some(seed)
    ties = (TiedWeight(owner_stage=0, owner="a", reader_stage=of_shape.num_stages - 1, reader="b"),)
    validate(Lowering(family=PACI_V, shape=of_shape), capacity=2)
    validate(Lowering(family=PACI_V, shape=of_shape, ties=ties, settles=True), capacity=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_action_comes_once_and_windows_put_together_are_the_stream(seed: int) -> None:
    of_shape, _ = some(seed)
    windows, a = 7, of_shape.accumulation
    for rank in range(of_shape.ranks):
        stream = decode(PACI_V.stream(of_shape, rank, windows))
        parts = [one for k in range(windows) for one in decode(PACI_V.windows(of_shape, rank, k, k + 1, 0))]
        assert [*parts, *decode(PACI_V.drain(of_shape, rank, 0, windows))] == stream
        expected = {Action(stage, op, m) for stage in of_shape.stages_of(rank) for op in (Op.F, Op.I, Op.W)
                    for m in range(windows * a)}  # fmt: skip
        expected |= {Action(stage, Op.U, k) for stage in of_shape.stages_of(rank) for k in range(windows)}
        assert Counter(stream) == Counter(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_gradient_of_the_next_window_is_there_before_an_update(seed: int) -> None:
    """Parameters whose gradients come with I, not with W, need this."""
    of_shape, _ = some(seed)
    a = of_shape.accumulation
    for rank in range(of_shape.ranks):
        begun: Counter[int] = Counter()
        for action in decode(PACI_V.stream(of_shape, rank, 6)):
            if action.op is Op.I:
                begun[action.stage] += 1
            elif action.op in (Op.W, Op.U):
                complete = action.index + 1 if action.op is Op.W else (action.index + 1) * a
                assert begun[action.stage] == complete, action


@pytest.mark.parametrize("start", [1, 3])
def test_after_a_drain_it_starts_as_from_the_beginning(start: int) -> None:
    of_shape = shape(3, 4, StepCosts(hop=0.1))
    for rank in range(3):
        first = decode(PACI_V.windows(of_shape, rank, 0, 3, 0)) + decode(PACI_V.drain(of_shape, rank, 0, 3))
        again = decode(PACI_V.windows(of_shape, rank, start, start + 3, start))
        again += decode(PACI_V.drain(of_shape, rank, start, start + 3))
        shifted = [Action(one.stage, one.op, one.index + start * (1 if one.op is Op.U else 4)) for one in first]
        assert again == shifted


@pytest.mark.parametrize(("ranks", "accumulation", "delay"), [(8, 8, 1), (8, 4, 2), (8, 1, 5), (4, 1, 2), (2, 1, 1)])
def test_equal_times_delay_by_less_than_the_line(ranks: int, accumulation: int, delay: int) -> None:
    of_shape = shape(ranks, accumulation)
    drifts = [policies.bounds("bounded", PACI_V, of_shape, rank)[1] for rank in range(ranks)]
    line = schedules.Shape(num_stages=ranks, accumulation=accumulation)
    assert max(drifts) <= delay <= schedules.get("paci").drift_bound(line, 0)


def test_a_tied_weight_of_the_first_stage_is_complete_before_its_update() -> None:
    for ranks in (1, 2, 3, 5):
        for limit in (None, 1, 2):
            of_shape = shape(ranks, 3, StepCosts(hop=0.2), limit)
            stream = decode(PACI_V.stream(of_shape, 0, 5))
            at = {action: number for number, action in enumerate(stream) if action.op is Op.U}
            last = 2 * ranks - 1
            assert all(at[Action(last, Op.U, k)] < at[Action(0, Op.U, k)] for k in range(5))


def test_two_versions_of_the_weights_need_large_enough_windows() -> None:
    assert policies.resolve(PACI_V, shape(4, 8), "2bw") == "2bw"
    with pytest.raises(ValueError, match="accumulation is 1"):
        policies.resolve(PACI_V, shape(4, 1), "2bw")


def test_what_it_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activation_limit is 0\.5"):
        shape(4, 8, limit=0.5)
    costs = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,))
    with pytest.raises(ValueError, match="activation_limit is 2: paci takes none"):
        simulate(schedules.get("paci"), Shape(num_stages=4, accumulation=8, activation_limit=2), costs)
    with pytest.raises(ValueError, match="placement"):
        simulate(PACI_V, Shape(num_stages=8, accumulation=8, chunks=2), costs)
    with pytest.raises(ValueError, match="slack"):
        simulate(PACI_V, Shape(num_stages=8, accumulation=8, chunks=2, placement="v", slack=1), costs)


def test_a_wrong_order_does_not_pass_the_proof() -> None:
    """The proof that the tests above rely on finds what they look for."""
    family = replace(PACI_V, in_flight_bound=lambda shape, rank: 1)
    with pytest.raises(ScheduleError, match="more than the bound 1"):
        validate(Lowering(family=family, shape=shape(3, 2)))
