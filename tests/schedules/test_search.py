from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest

from paci_rt.action import Op, decode
from paci_rt.schedules import FAMILIES, Shape, StepCosts, search
from paci_rt.schedules.lowering import Lowering
from paci_rt.schedules.validate import validate
from support.clock import bubble_rate, longest_rank
from support.marks import slow

# Measured times of the Zero Bubble paper (arXiv 2401.10241, table of profiled times; in ms): stages, micro-batches,
# T_F, T_B, T_W, T_comm. Models of 1.5, 6.2, 14.6 and 28.3 billion parameters, three rows each.
PROFILED = [
    (8, 24, 18.522, 18.086, 9.337, 0.601),
    (8, 32, 18.513, 18.086, 9.331, 0.626),
    (8, 64, 18.546, 18.097, 9.321, 0.762),
    (8, 24, 29.718, 29.444, 19.927, 0.527),
    (8, 32, 29.802, 29.428, 19.530, 0.577),
    (8, 64, 29.935, 29.621, 19.388, 0.535),
    (16, 48, 11.347, 11.248, 8.132, 0.377),
    (16, 64, 11.307, 11.254, 8.101, 0.379),
    (16, 128, 11.325, 11.308, 8.109, 0.378),
    (32, 96, 10.419, 10.207, 7.715, 0.408),
    (32, 128, 10.408, 10.204, 7.703, 0.408),
    (32, 256, 10.402, 10.248, 7.698, 0.460),
]
# The share of activations between I and W by the paper's memory model, 32h / (34h + 5as), for the four models.
STASHES = {18: 32 * 2304 / (34 * 2304 + 5 * 24 * 1024), 29: 32 / 74, 11: 32 / 74, 10: 32 / 74}


def shape_of(row: tuple[int, int, float, float, float, float], **costs: float) -> Shape:
    stages, accumulation, forward, input_grad, weight_grad, hop = row
    fitted = StepCosts((forward,), (input_grad,), (weight_grad,), hop)._replace(**costs)
    return Shape(num_stages=stages, accumulation=accumulation, costs=fitted)


def random_shapes(count: int) -> Iterator[Shape]:
    rng = random.Random(0)
    for _ in range(count):
        stages = rng.choice((1, 2, 3, 4, 6, 8))
        times = [tuple(rng.uniform(low, 2) for _ in range(stages)) for low in (0.5, 0.5, 0)]
        costs = StepCosts(*times, hop=rng.choice((0, 0.1, 3)), stash=rng.choice((0.1, 0.5, 1.0, 2.0)))
        yield Shape(num_stages=stages, accumulation=rng.choice((1, 2, 5, stages, 3 * stages)), costs=costs)


def length(name: str, shape: Shape) -> float:
    """Of the longest stage, by the search's own clock."""
    orders = tuple(
        "".join(action.op.value for action in decode(FAMILIES[name].stream(shape, stage, 1)) if action.op is not Op.U)
        for stage in range(shape.num_stages)
    )
    return search._longest_stage(orders, shape.costs.per_stage(shape.num_stages))


def test_published_bubble_rates() -> None:
    """First row of the paper's table of bubble rates."""
    row = PROFILED[0]
    published = {"1f1b": 0.2431, "zb-h1": 0.1585, "zb-h2": 0.1083, "zb-1p": 0.1585, "zb-2p": 0.0433}
    for name, rate in published.items():
        assert bubble_rate(FAMILIES[name], shape_of(row), row[2:5], row[5]) == pytest.approx(rate, abs=0.002), name


def warm_up_gap(row: tuple[int, int, float, float, float, float]) -> float:
    """Longest wait of a stage for its first I, after as many F as end before it."""
    stages, _, forward, input_grad, _, hop = row
    waits = ((k + 1) * forward + k * (input_grad + 2 * hop) for k in range(stages))
    return max(wait % forward for wait in waits)


@pytest.mark.parametrize("row", [slow(row) if row[0] == 32 else row for row in PROFILED], ids=str)
def test_measured_times_of_the_paper(row: tuple[int, int, float, float, float, float]) -> None:
    """ZB-1p's bubble is that of ZB-H1; ZB-2p has none but the wait for the first I, unless the micro-batches are too
    few: the last stage must start after all forwards of the first and end before all its I."""
    stages, accumulation, forward, input_grad, weight_grad, hop = row
    busy = accumulation * (forward + input_grad + weight_grad)
    through = (stages - 1) * (forward + input_grad + 2 * hop) + accumulation * (forward + input_grad) + weight_grad
    h1 = busy + (stages - 1) * (forward + input_grad - weight_grad + 4 * hop)
    for stash in (StepCosts().stash, STASHES[int(forward)]):
        shape = shape_of(row, stash=stash)
        assert length("zb-1p", shape) == pytest.approx(h1, rel=1e-9)
        rate = 1 - busy / length("zb-2p", shape)
        assert 1 - busy / max(busy, through) - 1e-9 <= rate
        assert rate == pytest.approx(1 - busy / max(busy + warm_up_gap(row), through), abs=0.002)


def test_both_clocks_agree() -> None:
    for row, name in itertools.product(PROFILED[:8:3], ("zb-h1", "zb-h2", "zb-1p", "zb-2p")):
        assert length(name, shape_of(row)) == pytest.approx(
            longest_rank(FAMILIES[name], shape_of(row), row[2:5], row[5])
        )


def test_no_longer_than_by_hand_and_within_the_memory() -> None:
    for shape in random_shapes(150):
        stages, stash = shape.num_stages, shape.costs.stash
        lengths = {name: length(name, shape) for name in ("zb-h1", "zb-1p", "zb-h2", "zb-2p")}
        if stash <= 1:  # else the hand-written ones need more memory than they are given
            assert lengths["zb-1p"] <= lengths["zb-h1"] * (1 + 1e-9)
            assert lengths["zb-2p"] <= lengths["zb-h2"] * (1 + 1e-9)
        assert lengths["zb-2p"] <= lengths["zb-1p"] * (1 + 1e-9)
        for (name, limit), stage in itertools.product((("zb-1p", stages), ("zb-2p", 2 * stages)), range(stages)):
            change = {Op.F: 1, Op.I: stash - 1, Op.W: -stash, Op.U: 0}
            stream = decode(FAMILIES[name].stream(shape, stage, 1))
            held = list(itertools.accumulate(change[action.op] for action in stream))
            assert max(held) <= limit + max(0, stash - 1) + 1e-6
            for op in (Op.F, Op.I, Op.W):
                assert [action.index for action in stream if action.op is op] == list(range(shape.accumulation))


def test_searched_schedules_run_to_their_end() -> None:
    for shape, name in itertools.product(random_shapes(60), ("zb-1p", "zb-2p")):
        validate(Lowering(family=FAMILIES[name], shape=shape))


def test_the_order_follows_from_the_shape_alone() -> None:
    shape = shape_of(PROFILED[0])
    first = [FAMILIES["zb-2p"].stream(shape, stage, 2).tolist() for stage in range(8)]
    search._search.cache_clear()
    assert first == [FAMILIES["zb-2p"].stream(shape, stage, 2).tolist() for stage in range(8)]
    costs = StepCosts(*(tuple(1024 * t for t in times) for times in shape.costs[:3]), hop=1024 * shape.costs.hop)
    other_unit = Shape(num_stages=8, accumulation=24, costs=costs)
    assert first == [FAMILIES["zb-2p"].stream(other_unit, stage, 2).tolist() for stage in range(8)]
    one_each = StepCosts(*(times * 8 for times in shape.costs[:3]), hop=shape.costs.hop)
    assert first == [
        FAMILIES["zb-2p"].stream(Shape(num_stages=8, accumulation=24, costs=one_each), stage, 2).tolist()
        for stage in range(8)
    ]


@pytest.mark.parametrize("slow", [1, 2, 3])
def test_the_search_fits_uneven_stages(slow: int) -> None:
    """One stage takes half as long again: ZB-2p never makes it wait, the orders made for even stages do."""
    forward = tuple(1.5 if stage == slow else 1.0 for stage in range(4))
    costs = StepCosts(forward, forward, tuple(time / 2 for time in forward), hop=0.05)
    shape = Shape(num_stages=4, accumulation=12, costs=costs)
    busy = 12 * 3.75
    assert length("zb-2p", shape) == pytest.approx(busy, rel=1e-9)
    assert length("zb-h2", shape) > 1.005 * busy
    assert length("zb-1p", shape) < 0.99 * length("zb-h1", shape)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"forward": (1.0, 2.0)}, r"costs.forward is \(1.0, 2.0\)"),
        ({"input_grad": (-1.0,)}, "costs.input_grad"),
        ({"weight_grad": (math.nan,)}, "costs.weight_grad"),
        ({"forward": ()}, "costs.forward"),
        ({"hop": math.inf}, "costs.hop is inf"),
        ({"stash": -0.1}, "costs.stash is -0.1"),
    ],
)
def test_impossible_costs_are_named(bad: dict[str, object], named: str) -> None:
    shape = Shape(num_stages=3, accumulation=4, costs=StepCosts()._replace(**bad))
    with pytest.raises(ValueError, match=named):
        FAMILIES["zb-1p"].check(shape)
