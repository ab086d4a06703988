"""The questions that a convergence benchmark answers, and how rates and thresholds are chosen for everybody alike.

How the committed studies came to be what they are, and what was changed along the way: ``docs/method/convergence.md``.

A method's learning rate is its own best of the study's ``rates``, by the final loss of the first seed (of all seeds
where the study says so); the other seeds are then run at that rate.

Thresholds are the losses of a pilot, the flush baseline of the same optimizer at PILOT_RATE with a seed that no study
uses, after a quarter, half and four fifths of its updates, rounded up to a twentieth of a nat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from staleness.case import METHODS, Case
from staleness.overhead import best_rate
from staleness.run import Run
from staleness.store import Store

PILOT_SEED, PILOT_RATE = 99, 1e-3
PILOT_SHARES = (0.25, 0.5, 0.8)
RATE_FACTORS = {"lion": 0.2, "sgd": 100.0}
"""What other optimizers' rates are, over AdamW's."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question.

    Attributes:
        question: that its table answers.
        cells: methods, each with the accumulations it is run at. A flush baseline has one: its numbers do not depend
            on it but for rounding.
        rates: learning rates of AdamW; other optimizers' follow from RATE_FACTORS.
        all_seeds: run every rate with every seed.
        task, layers, stages, updates, warmup, shape, dtype, device: as for ``replay.case.Case``.
    """

    name: str
    question: str
    task: str
    layers: int | None = None
    stages: int = 8
    cells: tuple[tuple[str, tuple[int, ...]], ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    all_seeds: bool = False
    updates: int
    warmup: int
    shape: str = "cosine"
    dtype: str = "fp32"
    device: str = "cpu"

    def case(self, method: str, accumulation: int, rate: float, seed: int) -> Case:
        """One run of the study; ``rate`` is one of its rates."""
        return Case(
            task=self.task,
            layers=self.layers,
            stages=self.stages,
            accumulation=accumulation,
            method=method,
            lr=rate * RATE_FACTORS.get(METHODS[method].optimizer, 1.0),
            seed=seed,
            updates=self.updates,
            warmup=self.warmup,
            shape=self.shape,
            dtype=self.dtype,
            device=self.device,
        )

    def rows(self) -> Iterator[tuple[str, int]]:
        """Method and accumulation of every row of the table."""
        for method, accumulations in self.cells:
            for accumulation in accumulations:
                yield method, accumulation

    @property
    def baselines(self) -> tuple[str, ...]:
        """The flush methods that others of the study are compared with."""
        return tuple(dict.fromkeys(baseline_of(method) for method, _ in self.cells))

    def pilot(self, baseline: str) -> Case:
        """The run that sets the thresholds of all methods compared with ``baseline``."""
        return self.case(baseline, dict(self.cells)[baseline][0], PILOT_RATE, PILOT_SEED)

    def thresholds(self, store: Store, baseline: str) -> tuple[float, ...] | None:
        """Early, middle and late loss, nats; None until the pilot is done."""
        found = store.of([self.pilot(baseline)])
        return thresholds_of(found[0]) if found else None

    def search(self) -> list[Case]:
        """The runs by which every row finds its learning rate."""
        seeds = self.seeds if self.all_seeds else self.seeds[:1]
        return [
            self.case(method, accumulation, rate, seed)
            for seed in seeds
            for method, accumulation in self.rows()
            for rate in self.rates
        ]

    def repeats(self, store: Store) -> list[Case]:
        """The runs with the other seeds at the rates that were found; of rows whose search is done."""
        cases = []
        for seed in self.seeds[1:]:
            for method, accumulation in self.rows():
                found = self.row(store, method, accumulation, every_seed=False)
                if len(found) >= len(self.rates):
                    rate = best_rate(found) / RATE_FACTORS.get(METHODS[method].optimizer, 1.0)
                    cases.append(self.case(method, accumulation, rate, seed))
        return cases

    def row(self, store: Store, method: str, accumulation: int, *, every_seed: bool = True) -> list[Run]:
        """All runs of a row that are done."""
        seeds = self.seeds if every_seed else self.seeds[:1]
        return store.of(self.case(method, accumulation, rate, seed) for rate in self.rates for seed in seeds)


def baseline_of(method: str) -> str:
    """The flush method that a method's tokens are compared with: of the same optimizer, if that is paci_rt's."""
    optimizer = METHODS[method].optimizer.removeprefix("error-feedback-")
    name = f"flush {optimizer}"
    return name if name in METHODS else "flush"


def thresholds_of(pilot: Run) -> tuple[float, ...]:
    """Losses after PILOT_SHARES of a run's updates, rounded up to a twentieth of a nat."""
    found = []
    for share in PILOT_SHARES:
        at = max(update for update, _ in pilot.curve if update <= share * pilot.case.updates)
        found.append(math.ceil(dict(pilot.curve)[at] * 20 - 1e-9) / 20)
    return tuple(found)
