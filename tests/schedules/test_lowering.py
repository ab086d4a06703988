from __future__ import annotations

import itertools

import pytest

from paci_rt.action import Action, Op
from paci_rt.errors import ScheduleError
from paci_rt.schedules import FAMILIES, Shape, StepCosts
from paci_rt.schedules.lowering import Lowering, TiedWeight, format_grid
from paci_rt.schedules.validate import play_streams, validate
from support.marks import slow


def lowering(
    name: str, stages: int, accumulation: int, slack: int = 0, tied: bool = False, chunks: int = 1
) -> Lowering:
    ties = (TiedWeight(owner_stage=0, owner="a", reader_stage=stages - 1, reader="b"),) if tied else ()
    placement = FAMILIES[name].placement
    shape = Shape(num_stages=stages, accumulation=accumulation, slack=slack, chunks=chunks, placement=placement)
    FAMILIES[name].check(shape)
    return Lowering(family=FAMILIES[name], shape=shape, ties=ties)


def streams(low: Lowering, windows: int = 3) -> list[list[Action]]:
    return [low.stream(stage, windows) for stage in range(low.shape.num_stages)]


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [False, True])
def test_every_schedule_runs_to_its_end(name: str, tied: bool) -> None:
    slacks = (0, 2) if FAMILIES[name].takes_slack else (0,)
    chunks = (1, 2, 3) if FAMILIES[name].takes_chunks else (FAMILIES[name].chunks,)
    for ranks, accumulation, slack, v in itertools.product((1, 2, 3, 5, 8), (1, 2, 3, 8), slacks, chunks):
        if FAMILIES[name].takes_chunks:
            accumulation *= ranks
        validate(lowering(name, ranks * v, accumulation, slack, tied and ranks * v > 1, v))


@pytest.mark.parametrize("name", [slow(name) if FAMILIES[name].takes_chunks else name for name in sorted(FAMILIES)])
def test_channels_of_few_messages_are_enough_where_hops_are_short(name: str) -> None:
    chunks = (1, 2, 4) if FAMILIES[name].takes_chunks else (FAMILIES[name].chunks,)
    for ranks, accumulation, v in itertools.product((1, 2, 3, 4, 8), (1, 2, 4, 24), chunks):
        if FAMILIES[name].takes_chunks:
            accumulation *= ranks
        # Several stages a rank, which takes what comes to one when it is through with the other.
        room = {"interleaved-zb": ranks, "looped-bfs": accumulation}.get(name, 1)
        validate(lowering(name, ranks * v, accumulation, chunks=v), capacity=room)


def test_schedules_that_run_far_ahead_need_room_for_it() -> None:
    low = lowering("paci", 4, 4, slack=3)
    with pytest.raises(ScheduleError, match="deadlocks with channels of 1 message"):
        validate(low, capacity=1)
    validate(low, capacity=2)
    long_hops = Shape(num_stages=4, accumulation=8, costs=StepCosts(hop=3.0))
    with pytest.raises(ScheduleError, match="deadlocks with channels of 2 messages"):
        validate(Lowering(family=FAMILIES["zb-2p"], shape=long_hops), capacity=2)
    validate(Lowering(family=FAMILIES["zb-2p"], shape=long_hops), capacity=4)


def test_split_and_interleaved_backwards_send_where_they_should() -> None:
    middle = lowering("zb-h1", 3, 1).stream(1, 1)
    assert " ".join(map(str, middle)) == "1RECV_F0 1F0 1SEND_F0 1RECV_B0 1I0 1SEND_B0 1W0 1U0"
    late = " ".join(map(str, lowering("paci-split", 3, 2).stream(1, 1)))
    assert late.endswith("1RECV_B1 1I1 1SEND_B1 1W1 1U0")
    first = lowering("interleaved-1f1b", 4, 2, chunks=2).stream(0, 1)
    assert " ".join(map(str, first)) == (
        "0F0 0SEND_F0 0F1 0SEND_F1 2RECV_F0 2F0 2SEND_F0 2RECV_F1 2F1 2SEND_F1 "
        "2RECV_B0 2B0 2SEND_B0 2RECV_B1 2B1 2SEND_B1 0RECV_B0 0B0 0RECV_B1 0B1 2U0 0U0"
    )


def test_a_middle_stage_receives_before_and_sends_after() -> None:
    stream = lowering("1f1b", 3, 1).stream(1, 1)
    assert " ".join(map(str, stream)) == "1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0 1SEND_B0 1U0"


def test_windows_and_drain_put_together_are_the_whole_stream() -> None:
    low = lowering("paci", 4, 3, tied=True)
    for stage in range(4):
        parts = [action for k in range(5) for action in low.window(stage, k, 0)] + low.drain(stage, 0, 5)
        assert parts == low.stream(stage, 5)
        restarted = low.window(stage, 5, 5) + low.drain(stage, 5, 6)  # after a drain the pipeline starts empty
        assert [a.op for a in restarted] == [a.op for a in low.stream(stage, 1)]


def test_the_failing_cell_is_marked_in_the_grid() -> None:
    low = lowering("1f1b", 2, 2)
    broken = streams(low)
    at = broken[1].index(Action(1, Op.B, 0))
    broken[1].insert(0, broken[1].pop(at))  # a backward before its forward
    with pytest.raises(ScheduleError, match=r"1B0 needs 1F0") as caught:
        play_streams(broken, low)
    grid = str(caught.value).splitlines()
    assert grid[1].startswith("step")
    assert ">1B0<" in grid[3] and ">" not in grid[2]


def test_a_deadlock_is_found_before_anything_starts() -> None:
    low = lowering("1f1b", 2, 2)
    broken = streams(low)
    broken[0] = [action for action in broken[0] if str(action) != "0SEND_F1"]
    with pytest.raises(ScheduleError, match=r"deadlocks.*1RECV_F1"):
        play_streams(broken, low)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda stream: stream.insert(stream.index(Action(0, Op.U, 0)), Action(0, Op.U, 0)), "runs twice|due"),
        (lambda stream: stream.remove(Action(0, Op.U, 0)), "updates window 1 while window 0 is due"),
        (lambda stream: stream.insert(0, stream.pop(stream.index(Action(0, Op.U, 1)))), "needs 0B2"),
    ],
)
def test_updates_out_of_place_are_refused(edit, why) -> None:  # type: ignore[no-untyped-def]
    low = lowering("paci", 2, 2)
    broken = streams(low)
    edit(broken[0])
    with pytest.raises(ScheduleError, match=why):
        play_streams(broken, low)


def test_bounds_are_checked_against_what_is_counted() -> None:
    relaxed = streams(lowering("paci", 3, 1, slack=2))
    with pytest.raises(ScheduleError, match="in flight, more than the bound 2"):
        play_streams(relaxed, lowering("paci", 3, 1))


def test_a_message_nobody_receives_is_an_error() -> None:
    low = lowering("1f1b", 2, 1)
    broken = streams(low, 1)
    broken[0].append(Action(0, Op.SEND_F, 1))
    with pytest.raises(ScheduleError, match="never received"):
        play_streams(broken, low)


def test_the_reader_of_a_tied_weight_must_be_the_last_stage() -> None:
    shape = Shape(num_stages=3, accumulation=2)
    tie = TiedWeight(owner_stage=0, owner="a", reader_stage=1, reader="b")
    with pytest.raises(ScheduleError, match="last stage"):
        Lowering(family=FAMILIES["paci"], shape=shape, ties=(tie,))


def test_the_grid_shows_compute_actions_only() -> None:
    low = lowering("paci", 2, 2)
    grid = format_grid(streams(low))
    assert "SEND" not in grid and grid.count("\n") == 2 and "0U0" in grid
