"""Flushed schedules in a V: their orders, beside torch's, and what they take."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

from paci_rt.action import Op, decode
from paci_rt.errors import ScheduleError
from paci_rt.schedules import FAMILIES, ScheduleFamily, Shape
from paci_rt.schedules.lowering import Lowering, TiedWeight
from paci_rt.schedules.v_blocks import HALF, LEAST, PERIOD, building_block
from paci_rt.schedules.validate import validate
from paci_rt.simulate import Costs, simulate
from support.clock import longest_rank

FLUSHED = ("zb-v", "v-half", "v-min", "dualpipe-v")
TORCHS = {"zb-v": ScheduleZBVZeroBubble, "dualpipe-v": ScheduleDualPipeV}
SHAPES = [*itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4, 5, 8, 16, 17))]


def shape_of(ranks: int, accumulation: int) -> Shape:
    return Shape(num_stages=2 * ranks, accumulation=accumulation, chunks=2, placement="v")


def computed(family: ScheduleFamily, shape: Shape, rank: int) -> list[str]:
    return [str(action) for action in decode(family.stream(shape, rank, 1)) if action.op is not Op.U]


def torchs(cls: Any, ranks: int, accumulation: int, rank: int) -> list[str]:
    """Torch's order of the same integers, in our words: a whole backward is I and W."""
    me = SimpleNamespace(pp_group_size=ranks, _n_microbatches=accumulation, num_stages=2 * ranks)
    found: list[str] = []
    for action in cls._calculate_single_rank_operations(me, rank):
        for part in () if action is None else action.sub_actions or (action,):
            text = str(part)
            found += [text.replace("B", "I"), text.replace("B", "W")] if "B" in text else [text]
    return found


@pytest.mark.parametrize(
    ("name", "ranks", "accumulation"),
    [
        *(("zb-v", *shape) for shape in SHAPES),
        *(("dualpipe-v", *shape) for shape in SHAPES if shape[1] >= 2 * shape[0]),  # torch takes no fewer
    ],
)
def test_the_order_is_torchs(name: str, ranks: int, accumulation: int) -> None:
    for rank in range(ranks):
        ours = computed(FAMILIES[name], shape_of(ranks, accumulation), rank)
        assert ours == torchs(TORCHS[name], ranks, accumulation, rank)


@pytest.mark.parametrize("name", FLUSHED)
@pytest.mark.parametrize(("ranks", "accumulation"), SHAPES)
def test_all_work_is_done_once_within_the_bounds_and_in_few_messages(name: str, ranks: int, accumulation: int) -> None:
    family, shape = FAMILIES[name], shape_of(ranks, accumulation)
    for rank in range(ranks):
        actions = [one for one in decode(family.stream(shape, rank, 1)) if one.op is not Op.U]
        for stage, op in itertools.product(shape.stages_of(rank), (Op.F, Op.I, Op.W)):
            order = [one.index for one in actions if one.stage == stage and one.op is op]
            assert order == list(range(accumulation))  # sums of gradients are a plain loop's, bit for bit
        in_flight = itertools.accumulate({Op.F: 1, Op.I: -1}.get(one.op, 0) for one in actions)
        assert max(in_flight) == family.in_flight_bound(shape, rank)
        assert Counter(one.op for one in actions)[Op.W] == 2 * accumulation
    ties = (TiedWeight(owner_stage=0, owner="a", reader_stage=2 * ranks - 1, reader="b"),)
    validate(Lowering(family=family, shape=shape, ties=ties, settles=True), capacity=2)


def test_zb_v_has_no_bubble_where_all_take_equally_long() -> None:
    for ranks, accumulation in itertools.product((1, 2, 3, 4, 8), (16, 17, 32)):
        shape = shape_of(ranks, accumulation)
        assert longest_rank(FAMILIES["zb-v"], shape, (1, 1, 1)) == pytest.approx(accumulation * 6.0)
        assert {FAMILIES["zb-v"].in_flight_bound(shape, rank) for rank in range(ranks)} == {2 * ranks}


@pytest.mark.parametrize(("name", "steps", "share"), [("v-half", HALF, 1 / 2), ("v-min", LEAST, 1 / 3)])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_blocks_hold_a_share_of_what_1f1b_holds(name: str, steps: Any, share: float, ranks: int) -> None:
    """In pieces: 2P whole-rank halves under 1F1B; the turns of the V and its last rank take a few more."""
    block = building_block(ranks, steps)
    for rank in range(ranks):
        assert len({at % PERIOD for at in block.times(rank)}) == 4
    most = max(FAMILIES[name].in_flight_bound(shape_of(ranks, 4 * ranks), rank) for rank in range(ranks))
    assert most <= 2 * ranks * share + 2
    least = min(FAMILIES[name].in_flight_bound(shape_of(ranks, 4 * ranks), rank) for rank in range(ranks))
    assert most - least <= 1  # the same on all ranks
    assert block.longest / PERIOD <= most


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
def test_less_memory_costs_time_and_more_micro_batches_pay_for_it(ranks: int) -> None:
    shape, unit = shape_of(ranks, 8 * ranks), Costs(forward_s=(0.5,), input_grad_s=(0.5,), weight_grad_s=(0.5,))
    whole = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,))
    bubbles = [simulate(FAMILIES[name], shape, unit).bubble_rate for name in ("zb-v", "v-half", "v-min")]
    line = simulate(FAMILIES["1f1b"], Shape(num_stages=ranks, accumulation=8 * ranks), whole).bubble_rate
    assert bubbles[0] == pytest.approx(0, abs=1e-9) and bubbles[0] < bubbles[1] <= bubbles[2] + 1e-9
    assert bubbles[2] < line


def test_too_much_to_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"building blocks is computed for at most 50,000 actions.*or use zb-v"):
        FAMILIES["v-min"].check(shape_of(100, 1000))
    FAMILIES["zb-v"].check(shape_of(100, 1000))


def test_messages_at_the_turn_take_no_time_and_no_channel() -> None:
    """One rank: a V of two stages never waits for a message, however long hops and transfers are."""
    slow = Costs(
        forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,), hop_s=50.0, bandwidth_bytes_per_s=1.0,
        message_bytes=(70.0,),
    )  # fmt: skip
    for name in FLUSHED:
        assert simulate(FAMILIES[name], shape_of(1, 4), slow).makespan_s == pytest.approx(24)
    two = simulate(FAMILIES["zb-v"], shape_of(2, 1), slow)
    # Down and up for forwards and for gradients, nothing between stages 1 and 2; F, I, and the W of stages 2 and 0.
    assert two.makespan_s == pytest.approx(4 * (50 + 70) + 4 + 4 + 2)
    assert simulate(FAMILIES["zb-v"], shape_of(30, 4), slow).makespan_s > 0  # by arrays


@pytest.mark.parametrize("capacity", [1, 2])
def test_only_messages_between_ranks_need_room(capacity: int) -> None:
    validate(Lowering(family=FAMILIES["zb-v"], shape=shape_of(1, 8)), capacity=capacity)
    circle = Shape(num_stages=2, accumulation=8, chunks=2)
    validate(Lowering(family=FAMILIES["looped-bfs"], shape=circle), capacity=capacity)
    two = Shape(num_stages=4, accumulation=8, chunks=2)
    with pytest.raises(ScheduleError, match="deadlocks"):
        validate(Lowering(family=FAMILIES["looped-bfs"], shape=two), capacity=capacity)
