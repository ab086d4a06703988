"""All runs of a comparison, and when each came down to a loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from paci_rt import schedules
from paci_rt.report.machine import machine
from paci_rt.report.spread import Ratio, first_reached, median, ratio
from paci_rt.train.results import RunResult


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run and when it reached the target.

    Attributes:
        tokens_to_target, time_to_target_s: interpolated between validations; None where it never got there.
    """

    seed: int
    result: RunResult
    tokens_to_target: float | None
    time_to_target_s: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs, in the order in which they ran.

    Attributes:
        target_loss: the lowest of the thresholds; None where a run ended without a finite loss.
        automatic_target: nobody named it.
        thresholds: losses at which the runs are compared, the highest first.
    """

    runs: tuple[Run, ...]
    target_loss: float | None
    automatic_target: bool
    thresholds: tuple[float, ...] = ()

    @property
    def schedules(self) -> list[str]:
        """Names, in the order in which they were asked for."""
        return list(dict.fromkeys(run.result.schedule for run in self.runs))

    def of(self, schedule: str) -> list[Run]:
        """The runs of one schedule, one per seed, in the order of the seeds."""
        return sorted((run for run in self.runs if run.result.schedule == schedule), key=lambda run: run.seed)

    @property
    def baseline(self) -> str:
        """What the others are compared with: 1f1b, else the first schedule that flushes, else the first."""
        flush = [name for name in self.schedules if schedules.get(name).flush]
        return "1f1b" if "1f1b" in flush else (flush or self.schedules)[0]

    def reached(self, schedule: str, loss: float) -> list[tuple[float | None, float | None]]:
        """Tokens and seconds at which each seed of ``schedule`` came down to ``loss``."""
        return [first_reached(run.result.evals, loss) for run in self.of(schedule)]

    def speedup(self, a: str, b: str, loss: float | None = None) -> Ratio | None:
        """How many times as fast as ``a`` schedule ``b`` came down to ``loss``, the target by default."""
        loss = self.target_loss if loss is None else loss
        if loss is None:
            return None
        return ratio(*([seconds for _, seconds in self.reached(name, loss)] for name in (a, b)))

    def time_to_target_s(self, schedule: str) -> float | None:
        """Median over the seeds; None unless every one of them reached the target."""
        return median([run.time_to_target_s for run in self.of(schedule)])

    def tokens_to_target(self, schedule: str) -> float | None:
        """Median over the seeds; None unless every one of them reached the target."""
        return median([run.tokens_to_target for run in self.of(schedule)])

    def speedups(self) -> dict[str, dict[str, float | None]]:
        """``speedups()[a][b]``: how many times as fast as ``a`` schedule ``b`` reached the target."""
        return {
            a: {b: None if one is None else one.value for b, one in row.items()} for a, row in self._pairs().items()
        }

    def _pairs(self) -> dict[str, dict[str, Ratio | None]]:
        return {a: {b: self.speedup(a, b) for b in self.schedules if b != a} for a in self.schedules}

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values: ``runs`` (the keys of ``train --json`` and more), ``target_loss``, ``speedup_vs``,
        ``speedup_spread_vs`` (each with ``low high seeds differs``), ``iso_loss`` (a row a threshold and schedule)."""
        runs = []
        for run in self.runs:
            reached = {"time_to_target_s": run.time_to_target_s, "tokens_to_target": run.tokens_to_target}
            runs.append({**run.result.to_json(), "seed": run.seed, **reached})
        spread = {
            a: {b: None if one is None else {**asdict(one), "differs": one.differs} for b, one in row.items()}
            for a, row in self._pairs().items()
        }
        return {
            "runs": runs,
            "target_loss": self.target_loss,
            "thresholds": list(self.thresholds),
            "baseline": self.baseline,
            "speedup_vs": self.speedups(),
            "speedup_spread_vs": spread,
            "iso_loss": iso_loss_rows(self),
            "machine": machine(),
        }


def iso_loss_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """For every threshold and schedule: medians of ``tokens`` and ``seconds``, and ``speedup`` over the baseline."""
    rows = []
    for loss in comparison.thresholds:
        for name in comparison.schedules:
            found = comparison.reached(name, loss)
            one = comparison.speedup(comparison.baseline, name, loss) if name != comparison.baseline else None
            rows.append(
                {
                    "loss": loss,
                    "schedule": name,
                    "tokens": median([tokens for tokens, _ in found]),
                    "seconds": median([seconds for _, seconds in found]),
                    "speedup": None if one is None else {**asdict(one), "differs": one.differs},
                }
            )
    return rows
