"""What the planner chooses among: limits, predictions and candidates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from paci_rt import schedules
from paci_rt.planner.token_overhead import NONE, TokenOverhead
from paci_rt.schedules import Shape, Slack, StepCosts, policies
from paci_rt.schedules.slack import slack_text

AS_FAST = 0.01
"""Rates within this share of the best count as equal: a simulation is no more exact than that."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan must keep to; infinite or None where there is no limit.

    Attributes:
        memory_bytes: by device.
        drift, delay: largest that any micro-batch may have, in updates (see ``paci_rt.schedules.policies``).
        measured: a schedule with a delay must be near something whose token overhead was measured.
    """

    memory_bytes: tuple[float, ...]
    drift: int | None = None
    delay: int | None = None
    measured: bool = True


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the simulator says, in the steady state.

    Attributes:
        micro_batches_per_s: throughput.
        utilization: mean share of time that devices are busy.
        peak_memory_bytes: weights, optimizer state, accumulator, weight versions, activations and stashes, by device.
        drift, delay: largest of any micro-batch, in updates.
        mean_delay: of all micro-batches, mean over the devices, in updates.
        activations: forwards without their backward on the fullest device, in shares of the model that a device has.
        overhead: tokens for the same loss over those of 1F1B-flush at the same update.

    Example:
        >>> from paci_rt.planner import Prediction
        >>> predicted = Prediction(
        ...     micro_batches_per_s=20.0, utilization=0.98, peak_memory_bytes=(4096, 2048), drift=1, delay=1
        ... )
        >>> max(predicted.peak_memory_bytes)
        4096
    """

    micro_batches_per_s: float
    utilization: float
    peak_memory_bytes: tuple[int, ...]
    drift: int
    delay: int
    mean_delay: float = 0.0
    activations: float = 0.0
    overhead: TokenOverhead = NONE

    @property
    def progress_per_s(self) -> float:
        """Micro-batches of 1F1B-flush, per second, that bring the loss down as far: throughput over token overhead."""
        return self.micro_batches_per_s / self.overhead.factor


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the model.

    Attributes:
        schedule, policy: names. accumulation: micro-batches an update. slack, chunks, activation_limit: as in
            ``schedules.Shape``.
        lookahead: early forwards look ahead (``paci_rt.weights.lookahead``).
        partition: middle blocks of each stage, None where no cut keeps the limits.
        step_costs: what a searched schedule was fitted to, in seconds; None for the others.
        predicted: None where it was not simulated.
        rejected: which limit it breaks and by how much, or why it cannot be; None where it fits.
        needs_bytes: where memory is what it breaks: the smallest limit for every device that it could do with, in
            bytes, if all limits were raised in proportion: that of the device named in ``rejected``.
        severity: how far it is from fitting, for sorting.

    Example:
        >>> from paci_rt.planner import Candidate
        >>> candidate = Candidate(schedule="paci", policy="bounded", accumulation=8, slack=1)
        >>> candidate.label
        'paci with accumulation 8, policy bounded, slack 1'
        >>> candidate.shape(ranks=4).warm_up(0)
        4
    """

    schedule: str
    policy: str
    accumulation: int
    lookahead: bool = False
    slack: Slack = 0
    chunks: int = 1
    activation_limit: float | None = None
    partition: tuple[int, ...] | None = None
    step_costs: StepCosts | None = None
    predicted: Prediction | None = None
    rejected: str | None = None
    needs_bytes: float | None = None
    severity: tuple[int, float] = (0, 0.0)

    def shape(self, ranks: int) -> Shape:
        """Its integers on ``ranks`` devices."""
        costs = self.step_costs or StepCosts()
        return Shape(
            num_stages=ranks * self.chunks,
            accumulation=self.accumulation,
            slack=self.slack,
            chunks=self.chunks,
            placement=schedules.get(self.schedule).placement,
            costs=costs,
            activation_limit=self.activation_limit,
        )

    def recomputing(self, ranks: int) -> tuple[bool, ...]:
        """Which of its stages run their forwards twice."""
        family, shape = schedules.get(self.schedule), self.shape(ranks)
        by_rank = [policies.recomputes(self.policy, family, shape, rank) for rank in range(ranks)]
        return tuple(by_rank[shape.rank_of(stage)] for stage in range(shape.num_stages))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = asdict(self)
        del values["severity"]
        if self.predicted is not None:
            values["predicted"]["progress_per_s"] = self.predicted.progress_per_s
        if self.step_costs is not None:
            names = ("forward_s", "input_grad_s", "weight_grad_s", "hop_s", "stash_share")
            values["step_costs"] = dict(zip(names, self.step_costs, strict=True))
        return values

    @property
    def label(self) -> str:
        """The options that make it, in words."""
        parts = [f"{self.schedule} with accumulation {self.accumulation}", f"policy {self.policy}"]
        parts += ["look-ahead"] if self.lookahead else []
        parts += [f"slack {slack_text(self.slack)}"] if self.slack else []
        parts += [f"{self.chunks} chunks"] if self.chunks > 1 else []
        parts += [f"activation limit {self.activation_limit:g}"] if self.activation_limit is not None else []
        return ", ".join(parts)


MEMORY, VERSIONS, OVERHEAD, SHAPE = 1, 2, 3, 4  # severities


def mib(value_bytes: float) -> str:
    """``1,234.5 MiB``."""
    return f"{value_bytes / 2**20:,.1f} MiB"
