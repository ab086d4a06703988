"""Largest stable step of a stage under delay: linear theory, by which the measurements can be understood.

One direction of a quadratic loss with curvature h, momentum as an exponential mean with decay β (Adam with its second
moment frozen, so that ``x`` is its step size times the preconditioned curvature):

    m <- β m + (1 - β) g,    w <- w - x m,    g = mean over a window of the weights p at which its forwards ran

Undelayed, p = w, and the iteration is stable up to ``x = 2 (1 + β) / (1 - β)``. A stage's schedule says which forwards
come before which backwards, hence how old each p is, and what a predictor knows at that moment. A window is then a
linear map of (w, m, the mean gradient before, the p in flight), stable while its spectral radius is at most 1; noise in
the gradients keeps up a variance that follows from the same map.

    python -m staleness.stability         # in benchmarks/: the tables of docs/method/look-ahead.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paci_rt.weights.lookahead import SHARED_UNTIL
from staleness.variants import shares_pass

Vector = NDArray[np.float64]

PREDICTORS = ("none", "momentum", "look-ahead", "look-ahead once", "look-ahead shared")
MOST, GROWTH, BISECTIONS = 64.0, 1.03, 30  # of the search for the largest step
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class StageModel:
    """A stage with ``behind`` stages after it.

    Attributes:
        behind: P - 1 - i, plus the slack: forwards ahead of the first backward.
        accumulation: micro-batches per window.
        predictor: one of PREDICTORS: at which weights early forwards run.
        beta: decay of the first moment.
    """

    behind: int
    accumulation: int
    predictor: str
    beta: float = 0.9

    def __post_init__(self) -> None:
        if self.predictor not in PREDICTORS:
            raise ValueError(f"unknown predictor {self.predictor!r}: choose from {', '.join(PREDICTORS)}")

    def window(self, step: float) -> tuple[Vector, Vector]:
        """One window for ``x = step``: its linear map, ``[size, size]`` with ``size = 3 + behind``, and what the noise
        in each micro-batch's gradient adds, ``[size, accumulation]``."""
        size = 3 + self.behind
        basis = np.eye(size + self.accumulation)
        weight, moment, before, noise = basis[0], basis[1], basis[2], basis[size:]
        in_flight = list(basis[3:size])
        total, shared, reused_until = np.zeros_like(weight), weight, 0
        for done in range(self.accumulation):
            # A window ends after its last backward, and the forward of micro-batch done + behind comes first.
            updates = (done + self.behind) // self.accumulation
            if updates and done >= reused_until:
                shared = self._ahead(weight, moment, before, total, done, updates, step)
                reused_until = self._shares * done
            in_flight.append(shared if updates else weight)
            total = total + in_flight.pop(0) + noise[done]
        mean = total / self.accumulation
        moment = self.beta * moment + (1 - self.beta) * mean
        after = np.stack([weight - step * moment, moment, mean, *in_flight])
        return after[:, :size], after[:, size:]

    @property
    def _shares(self) -> int:
        """How many times as many gradients must be known for early forwards to run somewhere else."""
        if self.predictor == "look-ahead shared" and shares_pass(self.accumulation, self.behind):
            return SHARED_UNTIL
        return self.accumulation if self.predictor == "look-ahead once" else 1

    def _ahead(
        self, weight: Vector, moment: Vector, before: Vector, total: Vector, done: int, updates: int, step: float
    ) -> Vector:
        """The weights at which a forward runs that has ``updates`` updates before its backward."""
        if self.predictor == "none":
            return weight
        if self.predictor == "momentum":
            return weight - step * updates * moment
        grad = total / done if done else before
        for _ in range(updates):
            moment = self.beta * moment + (1 - self.beta) * grad
            weight = weight - step * moment
        return weight

    def is_stable(self, step: float) -> bool:
        """Whether no direction grows."""
        return bool(np.abs(np.linalg.eigvals(self.window(step)[0])).max() <= 1 + ROUNDING)

    def spread(self, step: float) -> float:
        """Variance of the weight that gradient noise keeps up for ``x = step``; infinite where it is not stable."""
        through, noise = self.window(step)
        if np.abs(np.linalg.eigvals(through)).max() >= 1 - ROUNDING:
            return math.inf
        size = len(through)
        added = (noise @ noise.T).ravel()
        return float(np.linalg.solve(np.eye(size * size) - np.kron(through, through), added)[0])

    def largest_step(self) -> float:
        """Up to which every ``x`` is stable; MOST where none was found to be unstable."""
        low = 1e-3
        while low < MOST and self.is_stable(low * GROWTH):
            low *= GROWTH
        if low >= MOST:
            return MOST
        high = low * GROWTH
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.is_stable(middle) else (low, middle)
        return low


def table() -> str:
    """Largest steps of the first stage of several pipelines, as Markdown."""
    lines = ["| P | a | largest delay | " + " | ".join(PREDICTORS) + " |", "|---" * (3 + len(PREDICTORS)) + "|"]
    for stages, accumulations in ((8, (1, 2, 4, 8, 16, 32, 64)), (16, (8, 16)), (32, (16, 32)), (64, (64,))):
        for accumulation in accumulations:
            delay = math.ceil((stages - 1) / accumulation)
            models = [
                StageModel(behind=stages - 1, accumulation=accumulation, predictor=predictor)
                for predictor in PREDICTORS
            ]
            steps = " | ".join(f"{model.largest_step():.2f}" for model in models)
            lines.append(f"| {stages} | {accumulation} | {delay} | {steps} |")
    return "\n".join(lines)


def noise_table(stages: int = 8, accumulation: int = 8) -> str:
    """Variance that gradient noise keeps up on the first stage, over that of undelayed training, as Markdown."""
    steps = (0.3, 1.0, 3.0, 8.0, 14.0, 18.0, 25.0, 32.0)
    lines = ["| predictor | " + " | ".join(f"x = {step:g}" for step in steps) + " |", "|---" * (1 + len(steps)) + "|"]
    undelayed = StageModel(behind=0, accumulation=accumulation, predictor="none")
    for predictor in PREDICTORS:
        model = StageModel(behind=stages - 1, accumulation=accumulation, predictor=predictor)
        ratios = [model.spread(step) / undelayed.spread(step) for step in steps]
        lines.append(f"| {predictor} | " + " | ".join(f"{r:.2f}" if r < math.inf else "-" for r in ratios) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), noise_table(), sep="\n\n")
