"""What a schedule is: a few integers in, one stream of compute actions per rank out.

Streams are arrays of action codes (:func:`paci_rt.action.encode`), put together with :func:`column` (one operation
on many micro-batches), :func:`weave` (columns row by row) and :func:`join` (one after another).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from paci_rt.action import OPS, Codes, Op, decode_fields, encode
from paci_rt.schedules import limits
from paci_rt.schedules.placement import CIRCLE, LINE, Placement, V
from paci_rt.schedules.slack import Slack, check_slack, slack_text
from paci_rt.wording import shown


def check_shape(family: ScheduleFamily, shape: Shape) -> None:
    """Raise ValueError for a shape that ``family`` cannot have."""
    check_takes(family, slack=shape.slack, accumulation=shape.accumulation, activation_limit=shape.activation_limit)
    check_placement(family, shape)
    family.check(shape)


def check_placement(family: ScheduleFamily, shape: Shape) -> None:
    """Raise ValueError unless ``shape`` places its stages where ``family`` has them."""
    check_takes(family, chunks=shape.chunks)
    if (shape.placement == V) != (family.placement == V):
        raise ValueError(
            f"placement is {shape.placement!r}: {family.name} places its stages in a {family.placement}; "
            f"give placement {family.placement!r}"
        )


def check_takes(
    family: ScheduleFamily,
    *,
    slack: Slack | str = 0,
    chunks: int | None = None,
    accumulation: int = 1,
    activation_limit: float | None = None,
    prefix: str = "",
) -> None:
    """Raise ValueError for a value that ``family`` cannot use; ``prefix`` stands before its name, such as ``--``."""
    if slack and not family.takes_slack:
        raise ValueError(f"{prefix}slack is {slack_text(slack)}: {family.name} takes no slack; use {prefix}slack 0")
    if family.placement == V and chunks not in (None, 2):
        raise ValueError(
            f"{prefix}chunks is {chunks}: {family.name} has two stages a rank, r and 2P-1-r of P ranks; "
            f"use {prefix}chunks 2"
        )
    if family.placement == LINE and chunks not in (None, 1):
        raise ValueError(
            f"{prefix}chunks is {chunks}: {family.name} takes no chunks; use {prefix}chunks 1, or interleaved-1f1b"
        )
    if activation_limit is not None and not family.takes_activation_limit:
        name = f"--activation-limit is {activation_limit:g}" if prefix else f"activation_limit is {activation_limit:g}"
        raise ValueError(f"{name}: {family.name} takes none; leave it out, or use paci-v")
    if family.one_micro_batch_windows and accumulation != 1:
        raise ValueError(
            f"{prefix}accumulation is {accumulation}: {family.name} updates after every micro-batch; "
            f"use {prefix}accumulation 1"
        )


class StepCosts(NamedTuple):
    """What a searched schedule is fitted to: times of one micro-batch, all in one unit, one value per stage or one for
    all.

    ``hop`` is the time of a message between neighbours. ``stash`` is the share of a micro-batch's activations that
    stays between its I and its W. Its default is that of a GPT block by the memory model of the Zero Bubble paper
    (arXiv 2401.10241): 32sbh of s(34h + 5as)b bytes, at h = 128a hidden units for ``a`` heads and s = 1024 tokens.

    Example:
        >>> costs = paci_rt.StepCosts.parse("10,10,5:5:7,0.5")  # milliseconds of three stages
        >>> costs.weight_grad, costs.hop
        ((5.0, 5.0, 7.0), 0.5)
        >>> costs.per_stage(3).forward
        (10.0, 10.0, 10.0)
    """

    forward: tuple[float, ...] = (1.0,)
    input_grad: tuple[float, ...] = (1.0,)
    weight_grad: tuple[float, ...] = (1.0,)
    hop: float = 0.0
    stash: float = 32 / (34 + 5 * 1024 / 128)

    @classmethod
    def parse(cls, text: str) -> StepCosts:
        """Read ``FORWARD,I,W[,HOP[,STASH]]``; each of the first three is one time, or ``a:b:c`` with one per stage.

        Raises:
            ValueError: ``text`` is not of that form, or has a time that is negative or not a number.
        """
        parts = text.split(",")
        try:
            values = [tuple(float(one) for one in part.split(":")) for part in parts]
        except ValueError:
            values = []
        single = all(len(one) == 1 for one in values[3:])
        fine = all(0 <= one <= limits.MOST_SECONDS for each in values for one in each)
        if len(values) not in (3, 4, 5) or not single or not fine:
            raise ValueError(
                f"{shown(text)} is not FORWARD,I,W[,HOP[,STASH]]: give times from 0 to {limits.MOST_SECONDS:g}, the "
                "first three for all stages or as a:b:c one per stage, such as 10,10,5:5:7,0.5"
            )
        forward, input_grad, weight_grad = values[:3]
        rest = {name: one[0] for name, one in zip(("hop", "stash"), values[3:], strict=False)}
        return cls(forward, input_grad, weight_grad, **rest)

    def text(self, digits: int = 6) -> str:
        """What :meth:`parse` reads back; with 17 digits it is the same to the bit."""
        each = (self.forward, self.input_grad, self.weight_grad, (self.hop,), (self.stash,))
        return ",".join(":".join(f"{one:.{digits}g}" for one in times) for times in each)

    def per_stage(self, num_stages: int) -> StepCosts:
        """The same with one value per stage.

        Raises:
            ValueError: a time is negative or not finite, or there are neither one nor ``num_stages`` of them.
        """

        def spread(name: str, values: Iterable[float]) -> tuple[float, ...]:
            try:
                values = tuple(float(value) for value in values)
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"costs.{name} is {shown(values)}: give a tuple of times") from None
            if len(values) not in (1, num_stages) or not all(0 <= value <= limits.MOST_SECONDS for value in values):
                raise ValueError(
                    f"costs.{name} is {shown(values)}: give one time from 0 to {limits.MOST_SECONDS:g} for all "
                    f"stages, or one for each of the {num_stages}"
                )
            return values * num_stages if len(values) == 1 else values

        for name in ("hop", "stash"):
            value = getattr(self, name)
            if not limits.is_number(value, limits.MOST_SECONDS):
                raise ValueError(
                    f"costs.{name} is {shown(value)}: give a finite number from 0 to {limits.MOST_SECONDS:g}"
                )
        times = {name: spread(name, getattr(self, name)) for name in ("forward", "input_grad", "weight_grad")}
        return self._replace(**times, hop=float(self.hop), stash=float(self.stash))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The integers that a schedule is computed from.

    Attributes:
        num_stages: pipeline stages; with several chunks per rank, those of all ranks together.
        accumulation: micro-batches per window, ``a``.
        slack: warm-up forwards on top of the strict order: on every stage but the last, or one number per stage; kept
            as a single number where one says it all (see :mod:`paci_rt.schedules.slack`).
        chunks: stages per rank, ``v``.
        placement: which of them, see :class:`paci_rt.schedules.Placement`: a line for one stage a rank, a circle for
            more, or a V, where the schedule wants one.
        costs: what a searched schedule is fitted to; the others ignore it.
        overlap: micro-batches of the next window whose backwards come before a window's update, while its sums travel
            between replicas.
        activation_limit: of ``paci-v``: what a rank may hold, in whole stages (two pieces each); None is the least at
            full rate.

    Raises:
        ValueError: a number out of range, stages that are not a multiple of ``chunks``, or slack that cannot be.

    Example:
        Two ranks with two stages each:

        >>> from paci_rt import schedules
        >>> shape = schedules.Shape(num_stages=4, accumulation=8, chunks=2)
        >>> shape.ranks, list(shape.stages_of(1))
        (2, [1, 3])
        >>> [schedules.Shape(num_stages=4, accumulation=8).warm_up(stage) for stage in range(4)]
        [3, 2, 1, 0]
    """

    num_stages: int
    accumulation: int
    slack: Slack = 0
    chunks: int = 1
    costs: StepCosts = field(default_factory=StepCosts)
    overlap: int = 0
    placement: str | None = None
    activation_limit: float | None = None

    def __post_init__(self) -> None:
        limits.check_activation_limit(self.activation_limit)
        limits.check_integer("accumulation", self.accumulation, 1, limits.MOST_MICRO_BATCHES)
        object.__setattr__(self, "placement", self.places.name)
        object.__setattr__(self, "slack", check_slack(self.slack, self.num_stages))
        if type(self.overlap) is not int or not 0 <= self.overlap < self.accumulation:
            raise ValueError(
                f"overlap is {shown(self.overlap)} and accumulation {self.accumulation}: a window's update comes "
                f"before the next window is complete, so give 0 to {self.accumulation - 1}"
            )

    @cached_property
    def places(self) -> Placement:
        """Which rank holds which stages."""
        return Placement(num_stages=self.num_stages, chunks=self.chunks, name=self.placement)

    @property
    def ranks(self) -> int:
        """Processes of the pipeline, ``P``."""
        return self.num_stages // self.chunks

    def warm_up(self, stage: int) -> int:
        """Forwards that ``stage`` runs ahead of its backwards under the asynchronous schedules; none on the last."""
        ahead = self.num_stages - 1 - stage
        if isinstance(self.slack, tuple):
            return ahead + self.slack[stage]
        return ahead + self.slack if ahead else 0

    @property
    def most_ahead(self) -> int:
        """The largest :meth:`warm_up` of any stage, which is the first one's: no order runs in which it is not."""
        return self.warm_up(0)

    def rank_of(self, stage: Any) -> Any:
        """The process that runs ``stage``; with an array of stages, an array."""
        return self.places.rank_of(stage)

    def stages_of(self, rank: int) -> range:
        """The stages that ``rank`` runs, in the order of the model."""
        return self.places.stages_of(rank)

    def micro_batches(self, first: int, end: int) -> Codes:
        """Micro-batches of windows ``first ... end - 1``."""
        return np.arange(first * self.accumulation, end * self.accumulation)


@dataclass(frozen=True, kw_only=True)
class ScheduleFamily:
    """A schedule as data.

    ``windows(shape, rank, first, end, start)`` is what ``rank`` does from its first forward of window ``first`` up to
    its first forward of window ``end``, in a pipeline that was empty before window ``start``.
    ``drain(shape, rank, start, end)`` is what is then left to do after window ``end - 1``.
    The bounds are formulas in the integers alone, by rank; the executor counts the real values and compares.

    Attributes:
        flush: the pipeline is empty at every update.
        policies: which weights forwards and backwards may use (see ``paci_rt.schedules.policies``), the default first.
        placement: which rank holds which stages: one each in a line, as many as the shape says in a circle, two in a V.
        takes_slack, takes_overlap, takes_costs, takes_activation_limit: whether those fields of the shape mean
            something.
        one_micro_batch_windows: updates after every backward.
        split: backwards come as I and W.
        looks_ahead: early forwards run at the weights to come (see ``paci_rt.weights.lookahead``), unless told
            otherwise.
        early: of a stage, how many of its gradients enter their sums between a micro-batch's forward and its own
            gradient; None where that follows from ``in_flight_bound``.
        check: raises ValueError for a shape that the schedule cannot have.

    Example:
        What the last of two stages does in one window, and how much drift the first may see:

        >>> from paci_rt import schedules
        >>> from paci_rt.action import decode
        >>> paci, shape = schedules.get("paci"), schedules.Shape(num_stages=2, accumulation=2)
        >>> " ".join(map(str, decode(paci.stream(shape, rank=1, windows=1))))
        '1F0 1B0 1F1 1B1 1U0'
        >>> paci.flush, paci.drift_bound(shape, 0), paci.in_flight_bound(shape, 0)
        (False, 1, 2)
    """

    name: str
    flush: bool
    windows: Callable[[Shape, int, int, int, int], Codes]
    drain: Callable[[Shape, int, int, int], Codes]
    drift_bound: Callable[[Shape, int], int]
    in_flight_bound: Callable[[Shape, int], int]
    policies: tuple[str, ...] = ("bounded", "recompute")
    placement: str = LINE
    takes_slack: bool = False
    takes_overlap: bool = False
    takes_costs: bool = False
    takes_activation_limit: bool = False
    one_micro_batch_windows: bool = False
    split: bool = False
    looks_ahead: bool = False
    early: Callable[[Shape, int], int] | None = None
    check: Callable[[Shape], None] = lambda shape: None

    @property
    def takes_chunks(self) -> bool:
        """Whether a rank may have any number of stages."""
        return self.placement == CIRCLE

    @property
    def chunks(self) -> int:
        """Stages of a rank where nobody says how many."""
        return 1 if self.placement == LINE else 2

    def stream(self, shape: Shape, rank: int, windows: int) -> Codes:
        """All compute actions of ``rank`` over ``windows`` windows, from an empty pipeline to an empty pipeline."""
        return join(self.windows(shape, rank, 0, windows, 0), self.drain(shape, rank, 0, windows))


def column(op: Op, stage: Any, index: Any) -> Codes:
    """``op`` on every micro-batch (for U: window) in ``index``."""
    return encode(stage, op, index)


def weave(*columns: tuple[Op, Any, Codes, Any]) -> Codes:
    """Row by row: the first action of every column, then the second of every column, and so on.

    Args:
        columns: operation, stage (one, or one per row), index by row, and which rows have the action (True for all).
    """
    codes = [encode(stage, op, index) for op, stage, index, _ in columns]
    keep = [np.broadcast_to(has, code.shape) for code, (*_, has) in zip(codes, columns, strict=True)]
    woven: Codes = np.stack(codes, axis=1)[np.stack(keep, axis=1)]
    return woven


def join(*streams: Codes) -> Codes:
    """One stream after another."""
    return np.concatenate(streams) if streams else np.empty(0, dtype=np.int64)


def flush_family(
    name: str, order: Callable[[Shape, int], Codes], in_flight_bound: Callable[[Shape, int], int], **options: Any
) -> ScheduleFamily:
    """A synchronous schedule from the ``order`` of one window, numbered from micro-batch 0 and without the updates.

    The updates come at the end, one for each stage of the rank and the last stage first. Their backwards come in that
    order too, and a weight tied between two stages of one rank needs it.
    """

    def windows(shape: Shape, rank: int, first: int, end: int, _start: int) -> Codes:
        updates = [column(Op.U, stage, 0) for stage in reversed(shape.stages_of(rank))]
        pattern = join(order(shape, rank), *updates)
        step = np.where(decode_fields(pattern)[1] == OPS.index(Op.U), 1, shape.accumulation)
        return (pattern + np.arange(first, end)[:, None] * step).ravel()

    return ScheduleFamily(
        name=name,
        flush=True,
        windows=windows,
        drain=lambda shape, rank, start, end: join(),
        drift_bound=lambda shape, rank: 0,
        in_flight_bound=in_flight_bound,
        **options,
    )
