"""Which of several processes went first, from their boards and their states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from paci_rt import status
from paci_rt.schedules import Placement
from paci_rt.schedules.placement import V
from paci_rt.status import Standing


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A process as another one saw it: its board, and ``stopped``, ``gone``, ``failed`` or nothing."""

    standing: Standing
    condition: str = ""

    @classmethod
    def of(cls, board: status.Board) -> Seen:
        standing = board.read()
        return cls(standing=standing, condition=status.condition(standing))


HELD = {"stopped": "is stopped (SIGSTOP or a debugger)", "gone": "is gone", "failed": "failed", "": "is there"}


def guilty(seen: Mapping[int, Seen]) -> int | None:
    """The rank that holds the others up; None where nobody can tell.

    A process that is gone or stopped without having failed itself goes first, then the one that failed first, then the
    one that all others wait for and that waits for nobody.

    Example:
        >>> from paci_rt.launch.blame import Seen, guilty
        >>> from paci_rt.status import Standing
        >>> waiting = Seen(standing=Standing(phase="training", action="0RECV_B3"))
        >>> guilty({0: waiting, 1: Seen(standing=Standing(phase="training", action="1F4"), condition="stopped")})
        1
    """
    for condition in ("gone", "stopped"):
        for rank, one in seen.items():
            if one.condition == condition and not one.standing.failed_s and one.standing.phase != "done":
                return rank
    failed = [(one.standing.failed_s, rank) for rank, one in seen.items() if one.standing.failed_s]
    if failed:
        return min(failed)[1]
    return end_of_waits(seen)


def end_of_waits(seen: Mapping[int, Seen]) -> int | None:
    """The one that all waits lead to and that waits for nobody; None where there is none, or several."""
    awaited = {rank: waited_for(rank, one.standing, len(seen)) for rank, one in seen.items()}
    ends = {rank for rank, others in awaited.items() if not others}
    wanted = {other for others in awaited.values() for other in others} & ends
    return wanted.pop() if len(wanted) == 1 else None


def waited_for(rank: int, standing: Standing, size: int) -> set[int]:
    """The ranks that a process waits for: the neighbour of its message, or those missing at a meeting."""
    stage = standing.awaited_stage()
    placement = V if standing.in_a_v else None
    if stage is not None and standing.replica >= 0:
        places = Placement.over(standing.places, placement)
        return {standing.replica * standing.places + places.rank_of(stage)} - {rank}
    if stage is not None and size:
        return {Placement.over(size, placement).rank_of(stage)} - {rank}
    marker = "waits for rank "
    if standing.detail.startswith(marker):
        names = standing.detail.removeprefix(marker).partition(", which ")[0]
        return {int(name) for name in names.split(", ") if name.isdigit()}
    return set()


def tell(seen: Mapping[int, Seen]) -> str:
    """One sentence for each process, by rank."""
    return "\n".join(f"  {sentence(rank, one)}" for rank, one in sorted(seen.items()))


def sentence(rank: int, one: Seen) -> str:
    """What one process did, as a sentence without its end."""
    return f"{one.standing.name(rank)} (process {one.standing.pid}) {HELD[one.condition]}: {one.standing.words()}"
