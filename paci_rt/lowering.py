"""From a schedule's compute actions to what each stage really executes, and the proof that it runs to its end.

``lower`` adds the receive before and the send after every computation that crosses a stage boundary. ``validate``
plays all stages' lowered streams against each other, without clocks, and raises with the stage x step grid and the
failing cell marked where a stream cannot run, breaks a dependency, or exceeds the family's own bounds.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paci_rt.action import COMPUTE_OPS, RECV_OPS, Action, Op, dependencies
from paci_rt.errors import ScheduleError
from paci_rt.schedules.base import ScheduleFamily, Shape


@dataclass(frozen=True, kw_only=True)
class TiedWeight:
    """One weight that lives on two stages, such as GPT-2's token embedding and its output head.

    The owner (the earlier stage) holds the optimizer state. The reader, which must be the last stage, sends its
    summed gradient of every window to the owner and receives the updated weight back, both at fixed places in the
    schedule, so that runs stay reproducible and nothing waits in the steady state.

    Attributes:
        owner_stage, owner: stage and parameter name of the copy that is updated.
        reader_stage, reader: stage and parameter name of the copy that follows.
    """

    owner_stage: int
    owner: str
    reader_stage: int
    reader: str


# (channel, sender, receiver): messages on one channel arrive in the order in which they were sent.
Channel = tuple[str, int, int]

_CHANNEL_OF = {
    Op.SEND_F: ("F", +1),
    Op.RECV_F: ("F", -1),
    Op.SEND_B: ("B", -1),
    Op.RECV_B: ("B", +1),
}


def neighbour(action: Action) -> int:
    """The stage at the other end of a ``SEND_F``, ``RECV_F``, ``SEND_B`` or ``RECV_B``."""
    return action.stage + _CHANNEL_OF[action.op][1]


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """Turns a family's windows into executable streams.

    Args:
        family: the schedule.
        shape: its integers.
        ties: weights that live on two stages.
    """

    family: ScheduleFamily
    shape: Shape
    ties: tuple[TiedWeight, ...] = ()

    def __post_init__(self) -> None:
        last = self.shape.num_stages - 1
        for tie in self.ties:
            if not 0 <= tie.owner_stage < tie.reader_stage == last:
                raise ScheduleError(
                    f"tied weight {tie.owner!r} on stage {tie.owner_stage}, read on stage {tie.reader_stage}: "
                    f"the reader must be the last stage ({last}) and the owner an earlier one"
                )

    def window(self, stage: int, k: int, start: int) -> list[Action]:
        """Executable actions of ``stage`` in window ``k`` of a pipeline that was empty before window ``start``."""
        return self._lower(self.family.window(self.shape, stage, k, start), start)

    def drain(self, stage: int, start: int, end: int) -> list[Action]:
        """What is left after window ``end - 1``: backwards, updates, and tied weights still on their way."""
        actions = self._lower(self.family.drain(self.shape, stage, start, end), start)
        if self._reads(stage) and end > start:
            next_forward = end * self.shape.accumulation
            late = (k for k in range(start, end) if self._tied_arrival(k) >= next_forward)
            actions += [Action(stage, Op.RECV_TW, k) for k in late]
        return actions

    def forward_only(self, stage: int, first: int, count: int) -> list[Action]:
        """Evaluation: ``count`` forwards and their messages, numbered from ``first``."""
        return self._lower([Action(stage, Op.F, m) for m in range(first, first + count)], start=None)

    def stream(self, stage: int, windows: int) -> list[Action]:
        """All executable actions of ``stage`` over ``windows`` windows, drain included."""
        actions = [action for k in range(windows) for action in self.window(stage, k, 0)]
        return actions + self.drain(stage, 0, windows)

    def _reads(self, stage: int) -> bool:
        return any(tie.reader_stage == stage for tie in self.ties)

    def _owns(self, stage: int) -> bool:
        return any(tie.owner_stage == stage for tie in self.ties)

    def _tied_arrival(self, k: int) -> int:
        """Micro-batch before whose forward the reader takes over the weight that the owner updated in window ``k``.

        The owner updates right after its forward of micro-batch ``(k+1)a - 1 + w``; the next one that the reader
        sees is the first whose forward can use the new weight without waiting. A flush waits anyway.
        """
        if self.family.flush:
            return (k + 1) * self.shape.accumulation
        ahead = max(self.family.in_flight_bound(self.shape, tie.owner_stage) - 1 for tie in self.ties)
        return (k + 1) * self.shape.accumulation + ahead

    def _lower(self, compute: Iterable[Action], start: int | None) -> list[Action]:
        lowered: list[Action] = []
        last = self.shape.num_stages - 1
        for action in compute:
            stage, op, index = action.stage, action.op, action.index
            if op is Op.F:
                lowered += self._tied_weights_due(action, start)
                if stage > 0:
                    lowered.append(Action(stage, Op.RECV_F, index))
            elif op is Op.B and stage < last:
                lowered.append(Action(stage, Op.RECV_B, index))
            elif op is Op.U and self._owns(stage):
                lowered.append(Action(stage, Op.RECV_TG, index))
            lowered.append(action)
            if op is Op.F and stage < last:
                lowered.append(Action(stage, Op.SEND_F, index))
            elif op is Op.B and stage > 0:
                lowered.append(Action(stage, Op.SEND_B, index))
            elif op is Op.U and self._reads(stage):
                lowered.append(Action(stage, Op.SEND_TG, index))
            if op is Op.U and self._owns(stage):
                lowered.append(Action(stage, Op.SEND_TW, index))
        return lowered

    def _tied_weights_due(self, forward: Action, start: int | None) -> list[Action]:
        if start is None or not self._reads(forward.stage):
            return []
        passed = forward.index - self._tied_arrival(-1)
        window, remainder = divmod(passed, self.shape.accumulation)
        due = remainder == 0 and window - 1 >= start
        return [Action(forward.stage, Op.RECV_TW, window - 1)] if due else []


def validate(lowering: Lowering, *, windows: int | None = None) -> None:
    """Prove that the lowered streams run to their end and keep the family's bounds.

    Args:
        lowering: the schedule and its integers.
        windows: windows to play; by default enough to pass warm-up and reach the steady state.

    Raises:
        ScheduleError: the message ends in the stage x step grid with the failing cell marked.
    """
    shape = lowering.shape
    if windows is None:
        windows = 2 + -(-2 * (shape.num_stages + shape.slack) // shape.accumulation)
    play_streams([lowering.stream(stage, windows) for stage in range(shape.num_stages)], lowering)


def play_streams(streams: Sequence[Sequence[Action]], lowering: Lowering) -> None:
    """Play one stream a stage against each other; see :func:`validate`."""
    player = _Player(streams, lowering)
    progressed = True
    while progressed:
        progressed = False
        for stage in range(len(streams)):
            while player.advance(stage):
                progressed = True
    stuck = [stream[at] for stream, at in zip(streams, player.cursor, strict=True) if at < len(stream)]
    if stuck:
        blocked = ", ".join(map(str, stuck))
        raise ScheduleError(
            f"the schedule deadlocks: nothing can run past {blocked}\n{format_grid(streams, stuck[0], player.cursor)}"
        )
    for channel, queue in player.queues.items():
        if queue:
            raise ScheduleError(f"message {queue[0]} on channel {channel} is sent but never received")


class _Player:
    """Clockless execution: a receive may run once its message lies in the channel; everything else at once."""

    def __init__(self, streams: Sequence[Sequence[Action]], lowering: Lowering) -> None:
        self.streams = streams
        self.lowering = lowering
        self.cursor = [0] * len(streams)
        self.queues: dict[Channel, deque[int]] = {}
        self.done: set[Action] = set()
        self.in_flight: Counter[int] = Counter()
        self.version: Counter[int] = Counter()
        self.version_at_forward: dict[tuple[int, int], int] = {}

    def advance(self, stage: int) -> bool:
        at = self.cursor[stage]
        if at >= len(self.streams[stage]):
            return False
        action = self.streams[stage][at]
        if action.op in RECV_OPS:
            if not self._receive(action):
                return False
        elif action.op in COMPUTE_OPS:
            self._compute(action)
        else:
            for channel in channels(action, self.lowering.ties):
                self.queues.setdefault(channel, deque()).append(action.index)
        self.cursor[stage] = at + 1
        return True

    def _receive(self, action: Action) -> bool:
        queues = [self.queues.get(channel) for channel in channels(action, self.lowering.ties)]
        if not all(queues):
            return False
        for queue in queues:
            assert queue is not None
            if queue[0] != action.index:
                self._fail(action, f"expects message {action.index} but message {queue[0]} comes next")
            queue.popleft()
        return True

    def _compute(self, action: Action) -> None:
        stage, op, index = action.stage, action.op, action.index
        shape, family = self.lowering.shape, self.lowering.family
        if action in self.done:
            self._fail(action, "runs twice")
        for needed in dependencies(action, shape.num_stages, shape.accumulation):
            if needed not in self.done:
                self._fail(action, f"needs {needed}, which has not run")
        self.done.add(action)
        if op is Op.F:
            self.in_flight[stage] += 1
            self.version_at_forward[stage, index] = self.version[stage]
            if self.in_flight[stage] > family.in_flight_bound(shape, stage):
                bound = family.in_flight_bound(shape, stage)
                self._fail(action, f"makes {self.in_flight[stage]} forwards in flight, more than the bound {bound}")
        elif op is Op.B:
            self.in_flight[stage] -= 1
            drift = self.version[stage] - self.version_at_forward.pop((stage, index))
            if drift > family.drift_bound(shape, stage):
                bound = family.drift_bound(shape, stage)
                self._fail(action, f"drifts by {drift} updates, more than the bound {bound}")
        elif op is Op.U:
            if index != self.version[stage]:
                self._fail(action, f"updates window {index} while window {self.version[stage]} is due")
            self.version[stage] += 1

    def _fail(self, action: Action, why: str) -> None:
        raise ScheduleError(f"action {action} {why}\n{format_grid(self.streams, action, self.cursor)}")


def channels(action: Action, ties: Sequence[TiedWeight] = ()) -> list[Channel]:
    """The channels that a send or a receive uses: one, or one a tied weight."""
    stage, op = action.stage, action.op
    if op in _CHANNEL_OF:
        kind, other = _CHANNEL_OF[op][0], neighbour(action)
        return [(kind, stage, other) if op in (Op.SEND_F, Op.SEND_B) else (kind, other, stage)]
    found = []
    for at, tie in enumerate(ties):
        if (op is Op.SEND_TG and tie.reader_stage == stage) or (op is Op.RECV_TG and tie.owner_stage == stage):
            found.append((f"TG{at}", tie.reader_stage, tie.owner_stage))
        elif (op is Op.SEND_TW and tie.owner_stage == stage) or (op is Op.RECV_TW and tie.reader_stage == stage):
            found.append((f"TW{at}", tie.owner_stage, tie.reader_stage))
    return found


def format_grid(
    streams: Sequence[Sequence[Action]],
    failing: Action | None = None,
    cursor: Sequence[int] | None = None,
    *,
    columns: int = 12,
) -> str:
    """The stage x step grid around the failing cell, which stands in ``>...<``; compute actions only.

    A ``|`` stands before the first action that a stage has not finished, where ``cursor`` is given.
    """
    rows: list[list[str]] = []
    mark = 0
    for stage, stream in enumerate(streams):
        cells: list[str] = []
        for at, action in enumerate(stream):
            is_failing = action == failing
            if action.op not in COMPUTE_OPS and not is_failing:
                continue
            if is_failing:
                mark = max(mark, len(cells))
            text = f">{action}<" if is_failing else str(action)
            reached = cursor is not None and at >= cursor[stage] and not any(cell.startswith("|") for cell in cells)
            cells.append("|" + text if reached else text)
        rows.append(cells)
    first = max(0, mark - columns // 2)
    width = max([5, *(len(cell) for row in rows for cell in row[first : first + columns])])
    steps = range(first, min(first + columns, max(map(len, rows), default=0)))
    lines = ["step     " + " ".join(f"{step:>{width}}" for step in steps)]
    for stage, row in enumerate(rows):
        lines.append(f"stage {stage:<3}" + " ".join(f"{cell:>{width}}" for cell in row[first : first + columns]))
    return "\n".join(line.rstrip() for line in lines)
