from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble, ScheduleLoopedBFS

from paci_rt.action import Op, decode
from paci_rt.errors import ScheduleError
from paci_rt.schedules import FAMILIES, ScheduleFamily, Shape
from paci_rt.schedules.lowering import Lowering
from paci_rt.schedules.validate import validate
from support.clock import longest_rank

FAMILY = FAMILIES["interleaved-1f1b"]
SPLIT, BREADTH_FIRST = FAMILIES["interleaved-zb"], FAMILIES["looped-bfs"]
SHAPES = [*itertools.product((1, 2, 3, 4, 8), (1, 2, 3), (1, 2, 3, 4, 6, 8, 16))]


def shape_of(ranks: int, chunks: int, accumulation: int) -> Shape:
    return Shape(num_stages=ranks * chunks, chunks=chunks, accumulation=accumulation)


def stream(ranks: int, chunks: int, accumulation: int, rank: int, windows: int = 1) -> str:
    return " ".join(map(str, decode(FAMILY.stream(shape_of(ranks, chunks, accumulation), rank, windows))))


def test_orders_written_out_by_hand() -> None:
    # Rank 0 has stages 0 and 2, rank 1 stages 1 and 3; 4 and 2 forwards ahead.
    assert stream(2, 2, 4, 0) == ("0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3 2U0 0U0")
    assert stream(2, 2, 4, 1) == ("1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3 3U0 1U0")
    assert stream(1, 2, 2, 0) == "0F0 1F0 1B0 0F1 0B0 1F1 1B1 0B1 1U0 0U0"
    assert stream(2, 2, 2, 0, 2) == ("0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1 2U0 0U0 0F2 0F3 2F2 2F3 2B2 2B3 0B2 0B3 2U1 0U1")


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 3), (2, 4), (4, 4), (4, 12)])
def test_a_single_chunk_is_plain_1f1b(ranks: int, accumulation: int) -> None:
    shape = shape_of(ranks, 1, accumulation)
    for rank in range(ranks):
        assert decode(FAMILY.stream(shape, rank, 2)) == decode(FAMILIES["1f1b"].stream(shape, rank, 2))


@pytest.mark.parametrize(
    ("ranks", "chunks", "groups"), list(itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 2, 3)))
)
def test_all_work_is_done_once_within_the_bounds(ranks: int, chunks: int, groups: int) -> None:
    shape = shape_of(ranks, chunks, ranks * groups)
    for rank in range(ranks):
        actions = decode(FAMILY.stream(shape, rank, 1))
        work = itertools.product(shape.stages_of(rank), range(shape.accumulation))
        assert Counter((a.stage, a.index) for a in actions if a.op is Op.F) == Counter(work)
        in_flight = itertools.accumulate({Op.F: 1, Op.B: -1, Op.U: 0}[action.op] for action in actions)
        assert max(in_flight) == FAMILY.in_flight_bound(shape, rank)
    validate(Lowering(family=FAMILY, shape=shape), capacity=1)


@pytest.mark.parametrize(("ranks", "chunks"), [(2, 2), (4, 2), (4, 3), (8, 2)])
def test_the_bubble_shrinks_with_the_chunks(ranks: int, chunks: int) -> None:
    """Bubble of (P-1) F and B of one chunk, a v-th of a rank's (arXiv 2104.04473, section 2.2)."""
    shape = shape_of(ranks, chunks, 3 * ranks)
    busy = shape.accumulation * chunks * 3.0
    assert longest_rank(FAMILY, shape, (1, 1, 1)) - busy == pytest.approx((ranks - 1) * 3)


def test_micro_batches_come_in_groups_of_ranks() -> None:
    with pytest.raises(ValueError, match=r"accumulation is 6: .* multiple of 4, for example 4 or 8"):
        FAMILY.check(shape_of(4, 2, 6))
    with pytest.raises(ValueError, match=r"accumulation is 3: .* for example 4$"):
        FAMILY.check(shape_of(4, 2, 3))
    FAMILY.check(shape_of(4, 2, 8))
    FAMILY.check(shape_of(1, 2, 3))


def torchs(cls: type, shape: Shape, rank: int) -> list[str]:
    """Torch's order of the same integers, in our words; no process group is needed to compute it."""
    groups = max(1, shape.accumulation // shape.ranks)
    me = SimpleNamespace(
        _stages=[None] * shape.chunks, n_local_stages=shape.chunks, pp_group_size=shape.ranks,
        _n_microbatches=shape.accumulation, microbatches_per_round=shape.accumulation // groups,
    )  # fmt: skip
    order = [action for action in cls._calculate_single_rank_operations(me, rank) if action is not None]
    return [str(action) for action in order]


def computed(family: ScheduleFamily, shape: Shape, rank: int) -> list[str]:
    return [str(action) for action in decode(family.stream(shape, rank, 1)) if action.op is not Op.U]


@pytest.mark.parametrize(("ranks", "chunks", "accumulation"), SHAPES)
def test_the_split_order_is_torchs(ranks: int, chunks: int, accumulation: int) -> None:
    shape = shape_of(ranks, chunks, accumulation)
    if accumulation % max(1, accumulation // ranks):
        with pytest.raises(ValueError, match=f"accumulation is {accumulation}: interleaved-zb .*for example"):
            SPLIT.check(shape)
        return
    SPLIT.check(shape)
    for rank in range(ranks):
        ours = computed(SPLIT, shape, rank)
        assert ours == torchs(ScheduleInterleavedZeroBubble, shape, rank)
        in_flight = itertools.accumulate({"F": 1, "I": -1}.get(one.lstrip("0123456789")[0], 0) for one in ours)
        assert max(in_flight) == SPLIT.in_flight_bound(shape, rank)
        pending = itertools.accumulate({"I": 1, "W": -1}.get(one.lstrip("0123456789")[0], 0) for one in ours)
        assert max(pending) == min(rank + 1, accumulation * chunks)
    validate(Lowering(family=SPLIT, shape=shape))


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 3), (2, 4), (4, 4), (4, 12)])
def test_a_single_chunk_of_the_split_order_is_zb_h1(ranks: int, accumulation: int) -> None:
    for rank in range(ranks):
        shape = shape_of(ranks, 1, accumulation)
        assert computed(SPLIT, shape, rank) == computed(FAMILIES["zb-h1"], shape, rank)


@pytest.mark.parametrize(("ranks", "chunks", "accumulation"), SHAPES)
def test_breadth_first_is_torchs_but_for_the_order_of_a_stages_backwards(
    ranks: int, chunks: int, accumulation: int
) -> None:
    shape = shape_of(ranks, chunks, accumulation)
    for rank in range(ranks):
        ours, theirs = computed(BREADTH_FIRST, shape, rank), torchs(ScheduleLoopedBFS, shape, rank)
        half = chunks * accumulation
        assert ours[:half] == theirs[:half] and BREADTH_FIRST.in_flight_bound(shape, rank) == half
        for at in range(half, 2 * half, accumulation):
            assert ours[at : at + accumulation] == theirs[at : at + accumulation][::-1]
    validate(Lowering(family=BREADTH_FIRST, shape=shape))


@pytest.mark.parametrize(("ranks", "chunks", "groups"), [(2, 2, 1), (2, 2, 4), (4, 2, 2), (4, 3, 3), (8, 2, 4)])
def test_the_split_order_has_a_third_of_the_bubble_and_fewer_activations(ranks: int, chunks: int, groups: int) -> None:
    """Where F, I and W take equally long, P-1 of them instead of P-1 F and B; breadth first waits as 1F1B does."""
    shape = shape_of(ranks, chunks, groups * ranks)
    busy = shape.accumulation * chunks * 3.0
    bubbles = [longest_rank(family, shape, (1, 1, 1)) - busy for family in (FAMILY, SPLIT, BREADTH_FIRST)]
    assert bubbles == pytest.approx([3 * (ranks - 1), ranks - 1, 3 * (ranks - 1)])
    assert SPLIT.in_flight_bound(shape, 0) == ranks * chunks
    assert SPLIT.in_flight_bound(shape, 0) <= FAMILY.in_flight_bound(shape, 0)


def test_breadth_first_needs_room_for_what_runs_ahead() -> None:
    """The last rank sends to the first, which takes nothing before it is through with its own chunk."""
    for ranks, room in itertools.product((2, 3, 4), (1, 2, 3)):
        most = (room + 1) * ranks - 1
        validate(Lowering(family=BREADTH_FIRST, shape=shape_of(ranks, 2, most)), capacity=room)
        with pytest.raises(
            ScheduleError, match=rf"deadlocks with channels of {room} messages?: .*; use fewer .*'gloo'"
        ):
            validate(Lowering(family=BREADTH_FIRST, shape=shape_of(ranks, 2, most + 1)), capacity=room)
