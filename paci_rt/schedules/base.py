"""What a schedule is: a few integers in, one stream of compute actions a stage out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paci_rt.action import Action


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The integers that a schedule is computed from.

    Attributes:
        num_stages: pipeline stages ``P``.
        accumulation: micro-batches a window, ``a``.
        slack: warm-up forwards on top of the strict order, on every stage but the last.
    """

    num_stages: int
    accumulation: int
    slack: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_stages", 1), ("accumulation", 1), ("slack", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}: give an integer of at least {least}")


@dataclass(frozen=True, kw_only=True)
class ScheduleFamily:
    """A schedule as data.

    ``window(shape, stage, k, start)`` lists what ``stage`` does from its first forward of window ``k`` up to its
    first forward of window ``k + 1``, in a pipeline that was empty before window ``start``.
    ``drain(shape, stage, start, end)`` lists what is then left to do after window ``end - 1``.
    The two bounds are formulas in the integers alone; the executor counts the real values and compares.
    """

    name: str
    flush: bool
    window: Callable[[Shape, int, int, int], list[Action]]
    drain: Callable[[Shape, int, int, int], list[Action]]
    drift_bound: Callable[[Shape, int], int]
    in_flight_bound: Callable[[Shape, int], int]
    takes_slack: bool = False
    one_micro_batch_windows: bool = False

    def stream(self, shape: Shape, stage: int, windows: int) -> list[Action]:
        """All compute actions of ``stage`` over ``windows`` windows, from an empty pipeline to an empty pipeline."""
        actions = [action for k in range(windows) for action in self.window(shape, stage, k, 0)]
        return actions + self.drain(shape, stage, 0, windows)
