"""From a schedule's compute actions to what each stage executes: with sends and receives.

``Lowering`` adds the receive before and the send after every computation that crosses a stage boundary.
``stage_channels`` says over which channels they go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paci_rt.action import COMPUTE_OPS, Action, Op, decode
from paci_rt.errors import ScheduleError
from paci_rt.schedules.base import ScheduleFamily, Shape, check_placement
from paci_rt.schedules.channel import Channel


@dataclass(frozen=True, kw_only=True)
class TiedWeight:
    """One weight that lives on two stages, such as GPT-2's token embedding and its output head.

    The owner (the earlier stage) holds the optimizer state. The reader, which must be the last stage, sends its
    summed gradient of every window to the owner and receives the updated weight back, both at fixed places in the
    schedule, so that runs stay reproducible and nothing waits in the steady state.

    Attributes:
        owner_stage, owner: stage and parameter name of the copy that is updated.
        reader_stage, reader: stage and parameter name of the copy that follows.

    Example:
        >>> embedding, head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        >>> _ = head.weight.data.copy_(embedding.weight.data)
        >>> tie = paci_rt.TiedWeight(owner_stage=0, owner="weight", reader_stage=1, reader="weight")
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [embedding, head], n_microbatches=2, loss_fn=nn.CrossEntropyLoss(), optimizer=paci_rt.AdamW,
        ...     tied_weights=[tie],
        ... )
        >>> _ = pipeline.step(torch.arange(8), target=torch.arange(8))
        >>> pipeline.drain()
        >>> torch.equal(embedding.weight, head.weight)
        True
    """

    owner_stage: int
    owner: str
    reader_stage: int
    reader: str


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """Turns a family's windows into executable streams.

    Args:
        family: the schedule.
        shape: its integers.
        ties: weights that live on two stages.
        settles: tell all stages what each found in a window: norms, and whether it counts. A flush schedule does so
            before the window's updates, an asynchronous one at the end of a drain.

    Raises:
        ValueError: the schedule cannot have that shape.
        ScheduleError: a tied weight that no schedule could keep equal.
    """

    family: ScheduleFamily
    shape: Shape
    ties: tuple[TiedWeight, ...] = ()
    settles: bool = False

    def __post_init__(self) -> None:
        check_placement(self.family, self.shape)
        self.family.check(self.shape)
        last = self.shape.num_stages - 1
        for tie in self.ties:
            if not 0 <= tie.owner_stage < tie.reader_stage == last:
                raise ScheduleError(
                    f"tied weight {tie.owner!r} on stage {tie.owner_stage}, read on stage {tie.reader_stage}: "
                    f"the reader must be the last stage ({last}) and the owner an earlier one"
                )

    def window(self, rank: int, k: int, start: int) -> list[Action]:
        """Executable actions of ``rank`` in window ``k`` of a pipeline that was empty before window ``start``."""
        return self._lower(decode(self.family.windows(self.shape, rank, k, k + 1, start)), start)

    def drain(self, rank: int, start: int, end: int) -> list[Action]:
        """What is left after window ``end - 1``: backwards, updates, and tied weights still on their way."""
        actions = self._lower(decode(self.family.drain(self.shape, rank, start, end)), start)
        last = self.shape.num_stages - 1
        if self.shape.rank_of(last) == rank and self._reads(last) and end > start:
            next_forward = end * self.shape.accumulation
            late = (k for k in range(start, end) if self._tied_arrival(k) >= next_forward)
            actions += [Action(last, Op.RECV_TW, k) for k in late]
        if self.settles and not self.family.flush and end > start:
            actions += self._settling(rank, end - 1)
        return actions

    def _settling(self, rank: int, window: int) -> list[Action]:
        """From stage to stage up to the last one, and back: no stage waits for one that waits for it."""
        last, stages = self.shape.num_stages - 1, self.shape.stages_of(rank)
        found: list[Action] = []
        for stage in stages:
            found += [Action(stage, Op.RECV_NF, window)] if stage > 0 else []
            found += [Action(stage, Op.SEND_NF, window)] if stage < last else []
        for stage in reversed(stages):
            found += [Action(stage, Op.RECV_NB, window)] if stage < last else []
            found += [Action(stage, Op.SEND_NB, window)] if stage > 0 else []
        return found

    def _before_updates(self, rank: int, window: int) -> list[Action]:
        """Of a window of a flush schedule, whose sums are complete then: gradients of tied weights come first."""
        stages = self.shape.stages_of(rank)
        sent = [Action(stage, Op.SEND_TG, window) for stage in stages if self._reads(stage)]
        taken = [Action(stage, Op.RECV_TG, window) for stage in stages if self._owns(stage)]
        return [*sent, *taken, *self._settling(rank, window)]

    def forward_only(self, rank: int, first: int, count: int) -> list[Action]:
        """Evaluation: ``count`` forwards of every stage of ``rank`` and their messages, numbered from ``first``.

        With several stages per rank, a group of as many micro-batches as ranks passes one stage before the next.
        """
        step = self.shape.ranks if self.shape.chunks > 1 else count
        groups = (range(at, min(at + step, first + count)) for at in range(first, first + count, step))
        forwards = [Action(stage, Op.F, m) for group in groups for stage in self.shape.stages_of(rank) for m in group]
        return self._lower(forwards, start=None)

    def stream(self, rank: int, windows: int) -> list[Action]:
        """All executable actions of ``rank`` over ``windows`` windows, drain included."""
        actions = [action for k in range(windows) for action in self.window(rank, k, 0)]
        return actions + self.drain(rank, 0, windows)

    def grid(self, failing: Action, start: int, end: int) -> str:
        """The rank x step grid of windows ``start ... end - 1`` and their drain, around a failing action."""
        streams = []
        for rank in range(self.shape.ranks):
            stream = [action for k in range(start, end) for action in self.window(rank, k, start)]
            streams.append(stream + self.drain(rank, start, end))
        return format_grid(streams, failing)

    def _reads(self, stage: int) -> bool:
        return any(tie.reader_stage == stage for tie in self.ties)

    def _owns(self, stage: int) -> bool:
        return any(tie.owner_stage == stage for tie in self.ties)

    def _tied_arrival(self, k: int) -> int:
        """Micro-batch before whose forward the reader takes over the weight that the owner updated in window ``k``.

        The owner updates right after its forward of micro-batch ``(k+1)a - 1 + w``, or ``overlap`` later; the next one
        that the reader sees is the first whose forward can use the new weight without waiting. A flush waits anyway.
        """
        if self.family.flush:
            return (k + 1) * self.shape.accumulation
        owners = {self.shape.rank_of(tie.owner_stage) for tie in self.ties}
        ahead = max(self.family.in_flight_bound(self.shape, rank) - 1 for rank in owners)
        return (k + 1) * self.shape.accumulation + ahead + self.shape.overlap

    def _lower(self, compute: Iterable[Action], start: int | None) -> list[Action]:
        lowered: list[Action] = []
        last = self.shape.num_stages - 1
        first_of_all, settled, overlap = self.settles and self.family.flush, -1, self.shape.overlap
        for action in compute:
            stage, op, index = action.stage, action.op, action.index
            if op is Op.U and first_of_all and index != settled:
                lowered += self._before_updates(self.shape.rank_of(stage), index)
                settled = index
            if op is Op.F:
                lowered += self._tied_weights_due(action, start)
                if stage > 0:
                    lowered.append(Action(stage, Op.RECV_F, index))
            elif op in (Op.B, Op.I) and stage < last:
                lowered.append(Action(stage, Op.RECV_B, index))
            elif op is Op.U and self._owns(stage) and not first_of_all and not overlap:
                lowered.append(Action(stage, Op.RECV_TG, index))
            lowered.append(action)
            if op is Op.F and stage < last:
                lowered.append(Action(stage, Op.SEND_F, index))
            elif op in (Op.B, Op.I) and stage > 0:
                lowered.append(Action(stage, Op.SEND_B, index))
            elif op is Op.U and self._reads(stage) and not first_of_all and not overlap:
                lowered.append(Action(stage, Op.SEND_TG, index))
            if overlap and op in (Op.B, Op.W) and (index + 1) % self.shape.accumulation == 0:
                # Sums begin to travel between replicas when the window is complete, long before its update.
                window = index // self.shape.accumulation
                lowered += [Action(stage, Op.SEND_TG, window)] if self._reads(stage) else []
                lowered += [Action(stage, Op.RECV_TG, window)] if self._owns(stage) else []
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


def stage_channels(
    stage: int, num_stages: int, ties: Sequence[TiedWeight] = (), *, settles: bool = False
) -> dict[Op, tuple[Channel, ...]]:
    """The channels of every send and receive that ``stage`` can make: one, or one per tied weight."""
    gradients = [Channel(f"TG{at}", tie.reader_stage, tie.owner_stage) for at, tie in enumerate(ties)]
    weights = [channel.opposite() for channel in gradients]
    found = {
        Op.SEND_TG: tuple(channel for channel in gradients if channel.sender == stage),
        Op.RECV_TG: tuple(channel for channel in gradients if channel.receiver == stage),
        Op.SEND_TW: tuple(channel for channel in weights if channel.sender == stage),
        Op.RECV_TW: tuple(channel for channel in weights if channel.receiver == stage),
    }
    if stage > 0:
        below = Channel("F", stage - 1, stage)
        norms = Channel("NF", stage - 1, stage)
        found |= {Op.RECV_F: (below,), Op.RECV_E: (below,), Op.SEND_B: (below.opposite(),)}
        found |= {Op.RECV_NF: (norms,), Op.SEND_NB: (norms.opposite(),)}
    if stage < num_stages - 1:
        above = Channel("F", stage, stage + 1)
        norms = Channel("NF", stage, stage + 1)
        found |= {Op.SEND_F: (above,), Op.SEND_E: (above,), Op.RECV_B: (above.opposite(),)}
        found |= {Op.SEND_NF: (norms,), Op.RECV_NB: (norms.opposite(),)}
    if not settles:
        for op in (Op.SEND_NF, Op.RECV_NF, Op.SEND_NB, Op.RECV_NB):
            found.pop(op, None)
    return found


def format_grid(
    streams: Sequence[Sequence[Action]],
    failing: Action | None = None,
    cursor: Sequence[int] | None = None,
    *,
    columns: int = 12,
) -> str:
    """The rank x step grid around the failing cell, which stands in ``>...<``; compute actions only.

    A ``|`` stands before the first action that a rank has not finished, where ``cursor`` is given.
    """
    rows: list[list[str]] = []
    mark = 0
    for rank, stream in enumerate(streams):
        cells: list[str] = []
        for at, action in enumerate(stream):
            is_failing = action == failing
            if action.op not in COMPUTE_OPS and not is_failing:
                continue
            if is_failing:
                mark = max(mark, len(cells))
            text = f">{action}<" if is_failing else str(action)
            reached = cursor is not None and at >= cursor[rank] and not any(cell.startswith("|") for cell in cells)
            cells.append("|" + text if reached else text)
        rows.append(cells)
    first = max(0, mark - columns // 2)
    width = max([5, *(len(cell) for row in rows for cell in row[first : first + columns])])
    steps = range(first, min(first + columns, max(map(len, rows), default=0)))
    lines = ["step     " + " ".join(f"{step:>{width}}" for step in steps)]
    for rank, row in enumerate(rows):
        lines.append(f"rank {rank:<4}" + " ".join(f"{cell:>{width}}" for cell in row[first : first + columns]))
    return "\n".join(line.rstrip() for line in lines)
