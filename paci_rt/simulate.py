"""What a schedule would do, from what its actions cost: timeline, bubbles, memory, drift.

Every rank runs its stream of actions in order. An action starts when its rank is free and what it needs has arrived;
an output travels over a channel of its own for every pair of neighbouring ranks and every direction, which carries one
message at a time: ``bytes / bandwidth`` of occupation, then ``hop_s`` of latency. Nothing ever waits for room in a
channel (that no schedule needs to is proved by :mod:`paci_rt.lowering`). ::

    >>> from paci_rt import schedules
    >>> unit = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,))
    >>> simulate(schedules.get("zb-h1"), schedules.Shape(num_stages=4, accumulation=8), unit).makespan_s
    27.0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from paci_rt import policies
from paci_rt.action import decode
from paci_rt.errors import ScheduleError
from paci_rt.play import Floats, Work, play
from paci_rt.schedules.base import ScheduleFamily, Shape
from paci_rt.schedules.slack import slack_text
from paci_rt.simulated import Simulation, measure

__all__ = ["Costs", "Simulation", "simulate"]

_SHOWN_STUCK = 8


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds and bytes of one micro-batch; every tuple has one entry a *stage*, or exactly one for all stages.

    Attributes:
        forward_s, input_grad_s, weight_grad_s: compute; an undivided backward takes both of its halves.
        update_s: one local update.
        predict_s: putting weights to come in place and the true ones back, for a forward that runs ahead of an update
            under policy ``predict`` or with look-ahead.
        hop_s: latency of a message between different ranks.
        bandwidth_bytes_per_s: of every channel.
        message_bytes: output of each stage; its gradient has the same size.
        activation_bytes: what a micro-batch keeps between its F and its B (or I).
        stash_bytes: what it keeps between its I and its W.
        input_bytes: what policy ``recompute`` keeps in place of ``activation_bytes``.
        weight_bytes: one version of the weights.
        micro_batch_factors: every compute time of micro-batch ``m`` is multiplied by ``factors[m % len(factors)]``.
        noise: relative standard deviation of every compute action and update (log-normal, mean 1).
        seed: of the noise; equal seeds give equal timelines.

    Raises:
        ValueError: a value that is negative, not finite or no number, or an empty tuple.
    """

    forward_s: tuple[float, ...]
    input_grad_s: tuple[float, ...]
    weight_grad_s: tuple[float, ...]
    update_s: tuple[float, ...] = (0.0,)
    predict_s: tuple[float, ...] = (0.0,)
    hop_s: float = 0.0
    bandwidth_bytes_per_s: float = math.inf
    message_bytes: tuple[float, ...] = (0.0,)
    activation_bytes: tuple[float, ...] = (0.0,)
    stash_bytes: tuple[float, ...] = (0.0,)
    input_bytes: tuple[float, ...] = (0.0,)
    weight_bytes: tuple[float, ...] = (0.0,)
    micro_batch_factors: tuple[float, ...] = (1.0,)
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "seed":
                if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                    raise ValueError(f"seed is {value!r}: give an integer of at least 0")
            elif isinstance(field.default, (int, float)):
                self._check_number(field.name, value)
            else:
                self._check_list(field.name, value)
        if not self.bandwidth_bytes_per_s > 0:
            raise ValueError(
                f"bandwidth_bytes_per_s is {self.bandwidth_bytes_per_s!r}: give a number above 0, or math.inf for "
                "messages that take no longer than their latency"
            )

    @staticmethod
    def _check_number(name: str, value: Any) -> None:
        endless = name == "bandwidth_bytes_per_s" and value == math.inf
        if not (_is_number(value) and (endless or 0 <= value < math.inf)):
            raise ValueError(f"{name} is {value!r}: give a finite number of at least 0")

    def _check_list(self, name: str, values: Any) -> None:
        if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
            raise ValueError(f"{name} is {values!r}: give a tuple of one number for all stages, or one for each")
        for at, value in enumerate(values):
            if not (_is_number(value) and 0 <= value < math.inf):
                where = f" of stage {at}" if len(values) > 1 and name != "micro_batch_factors" else ""
                raise ValueError(f"{name}{where} is {value!r}: give a finite number of at least 0")
        object.__setattr__(self, name, tuple(map(float, values)))

    def per_stage(self, name: str, num_stages: int) -> Floats:
        """The values of field ``name``, one a stage.

        Raises:
            ValueError: there are neither one nor ``num_stages`` of them.
        """
        values = getattr(self, name)
        if len(values) not in (1, num_stages):
            raise ValueError(
                f"{name} has {len(values)} values for {num_stages} stages: give one for all stages, or one for each"
            )
        return np.broadcast_to(np.array(values, dtype=np.float64), (num_stages,))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def simulate(
    family: ScheduleFamily,
    shape: Shape,
    costs: Costs,
    *,
    windows: int = 1,
    policy: str | None = None,
    lookahead: bool | None = None,
    keep_events: bool = False,
) -> Simulation:
    """Play ``windows`` windows of a schedule, from an empty pipeline to an empty one.

    A thousand ranks and ten thousand micro-batches take seconds and about a gigabyte. A searched schedule is taken for
    ``shape.costs``; nobody but the caller fits those to ``costs``.

    Args:
        family: the schedule, for example ``schedules.get("paci")``.
        shape: its integers.
        costs: what each action takes.
        windows: updates of every stage.
        policy: which weights forwards and backwards use; by default the schedule's own (``paci_rt.policies``).
        lookahead: whether early forwards look ahead (``paci_rt.lookahead``); by default as the schedule does.
        keep_events: fill ``Simulation.events``, a Python object for every action.

    Raises:
        ValueError: values that do not fit together; the message names the value and the remedy.
        ScheduleError: the order cannot run to its end; the message names the actions that nothing gets past.
    """
    if not isinstance(windows, int) or isinstance(windows, bool) or windows < 1:
        raise ValueError(f"windows is {windows!r}: give an integer of at least 1")
    check_shape(family, shape)
    policy = policies.resolve(family, shape, policy)
    ahead = policies.looks_ahead(family, policy, lookahead)
    for field in fields(costs):
        if field.name != "micro_batch_factors" and isinstance(getattr(costs, field.name), tuple):
            costs.per_stage(field.name, shape.num_stages)
    work = Work(family, shape, costs, windows, policy, ahead)
    stuck = play(work)
    if len(stuck):
        names = ", ".join(map(str, decode(stuck[:_SHOWN_STUCK])))
        more = f" and {len(stuck) - _SHOWN_STUCK} more" if len(stuck) > _SHOWN_STUCK else ""
        raise ScheduleError(
            f"schedule {family.name} deadlocks: nothing can run past {names}{more}; each waits for an action that "
            "comes later, or never"
        )
    return measure(work, keep_events=keep_events)


def check_shape(family: ScheduleFamily, shape: Shape) -> None:
    """Raise ValueError for a shape that ``family`` cannot have."""
    if shape.slack and not family.takes_slack:
        raise ValueError(f"slack is {slack_text(shape.slack)}: {family.name} takes no slack; leave it at 0")
    if shape.chunks > 1 and not family.takes_chunks:
        raise ValueError(f"chunks is {shape.chunks}: {family.name} runs one stage a rank; use 1, or interleaved-1f1b")
    if family.one_micro_batch_windows and shape.accumulation != 1:
        raise ValueError(
            f"accumulation is {shape.accumulation}: {family.name} updates after every micro-batch; use 1, and more "
            "windows"
        )
    family.check(shape)
