"""The proof that a lowered schedule runs to its end: its streams played against each other, without a clock.

Channels have the transport's real capacity. Where a stream cannot run, breaks a dependency, or exceeds the family's
bounds, an error has the rank x step grid with the failing cell marked.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import NoReturn

from paci_rt.action import COMPUTE_OPS, RECV_OPS, Action, Op, dependencies
from paci_rt.errors import ScheduleError
from paci_rt.schedules import limits
from paci_rt.schedules.channel import Channel
from paci_rt.schedules.lowering import Lowering, format_grid, stage_channels


def validate(lowering: Lowering, *, windows: int | None = None, capacity: int | None = None) -> None:
    """Prove that the lowered streams run to their end and keep the family's bounds.

    Args:
        lowering: the schedule and its integers.
        windows: windows to play; by default enough to pass warm-up and reach the steady state.
        capacity: messages that fit into a channel before its next send waits; None where a send never waits.

    Raises:
        ScheduleError: the message ends in the rank x step grid with the failing cell marked.
    """
    shape = lowering.shape
    if windows is None:
        held = max(lowering.family.in_flight_bound(shape, rank) for rank in range(shape.ranks))
        ahead = 0 if lowering.family.flush else 2 * held
        windows = 2 + -(-ahead // shape.accumulation)
    size = shape.num_stages * shape.accumulation * windows * (3 if lowering.family.split else 2)
    limits.check_actions(
        size, "a schedule is checked over", limits.MOST_CHECKED, "micro-batches, stages or forwards of slack"
    )
    play_streams([lowering.stream(rank, windows) for rank in range(shape.ranks)], lowering, capacity)


def play_streams(streams: Sequence[Sequence[Action]], lowering: Lowering, capacity: int | None = None) -> None:
    """Play one stream per rank against each other; see :func:`validate`."""
    player = _Player(streams, lowering, capacity)
    progressed = True
    while progressed:
        progressed = False
        for rank in range(len(streams)):
            while player.advance(rank):
                progressed = True
    stuck = [stream[at] for stream, at in zip(streams, player.cursor, strict=True) if at < len(stream)]
    if stuck:
        blocked = ", ".join(map(str, stuck))
        full, remedy = "", ""
        if capacity is not None:
            full = f" with channels of {capacity} message{'s' if capacity > 1 else ''}"
            remedy = "; use fewer micro-batches, or a transport whose channels hold more, such as 'gloo'"
        raise ScheduleError(
            f"the schedule deadlocks{full}: nothing can run past {blocked}{remedy}\n"
            f"{format_grid(streams, stuck[0], player.cursor)}"
        )
    for channel, queue in player.queues.items():
        if queue:
            raise ScheduleError(f"message {queue[0]} on channel {channel} is sent but never received")


class _Player:
    """Runs streams without a clock.

    A receive may run once its message lies in the channel, a send once there is room, everything else at once.
    """

    def __init__(self, streams: Sequence[Sequence[Action]], lowering: Lowering, capacity: int | None) -> None:
        self.streams = streams
        self.lowering = lowering
        self.capacity = capacity
        self.cursor = [0] * len(streams)
        stages = range(lowering.shape.num_stages)
        self.channels = [
            stage_channels(stage, len(stages), lowering.ties, settles=lowering.settles) for stage in stages
        ]
        self.queues: dict[Channel, deque[int]] = {
            channel: deque() for table in self.channels for found in table.values() for channel in found
        }
        self.done: set[Action] = set()
        self.in_flight: Counter[int] = Counter()  # by rank
        self.version: Counter[int] = Counter()  # by stage, as the next
        self.version_at_forward: dict[tuple[int, int], int] = {}

    def advance(self, rank: int) -> bool:
        at = self.cursor[rank]
        if at >= len(self.streams[rank]):
            return False
        action = self.streams[rank][at]
        if action.op in RECV_OPS:
            if not self._receive(action):
                return False
        elif action.op in COMPUTE_OPS:
            self._compute(action)
        elif not self._send(action):
            return False
        self.cursor[rank] = at + 1
        return True

    def _send(self, action: Action) -> bool:
        queues = self._queues(action)
        if not all(map(self._has_room, self.channels[action.stage][action.op])):
            return False
        for queue in queues:
            queue.append(action.index)
        return True

    def _has_room(self, channel: Channel) -> bool:
        if self.capacity is None or len(self.queues[channel]) < self.capacity:
            return True
        rank_of = self.lowering.shape.rank_of  # what stays on a rank is handed over, however much there is
        return bool(rank_of(channel.sender) == rank_of(channel.receiver))

    def _receive(self, action: Action) -> bool:
        queues = self._queues(action)
        if not all(queues):
            return False
        for queue in queues:
            if queue[0] != action.index:
                self._fail(action, f"expects message {action.index} but message {queue[0]} comes next")
            queue.popleft()
        return True

    def _queues(self, action: Action) -> list[deque[int]]:
        found = self.channels[action.stage].get(action.op)
        if found is None:
            self._fail(action, "has no stage at its other end")
        return [self.queues[channel] for channel in found]

    def _compute(self, action: Action) -> None:
        stage, op, index = action.stage, action.op, action.index
        shape, family = self.lowering.shape, self.lowering.family
        rank = shape.rank_of(stage)
        if action in self.done:
            self._fail(action, "runs twice")
        for needed in dependencies(action, shape.num_stages, shape.accumulation, split=family.split):
            if needed not in self.done:
                self._fail(action, f"needs {needed}, which has not run")
        self.done.add(action)
        if op is Op.F:
            self.in_flight[rank] += 1
            self.version_at_forward[stage, index] = self.version[stage]
            bound = family.in_flight_bound(shape, rank)
            if self.in_flight[rank] > bound:
                self._fail(action, f"makes {self.in_flight[rank]} forwards in flight, more than the bound {bound}")
        elif op in (Op.B, Op.I):
            self.in_flight[rank] -= 1
            drift = self.version[stage] - self.version_at_forward.pop((stage, index))
            bound = family.drift_bound(shape, rank)
            if drift > bound:
                self._fail(action, f"drifts by {drift} updates, more than the bound {bound}")
        elif op is Op.U:
            if index != self.version[stage]:
                self._fail(action, f"updates window {index} while window {self.version[stage]} is due")
            self.version[stage] += 1

    def _fail(self, action: Action, why: str) -> NoReturn:
        raise ScheduleError(f"action {action} {why}\n{format_grid(self.streams, action, self.cursor)}")
