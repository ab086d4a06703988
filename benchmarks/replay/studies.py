"""The questions that a convergence benchmark answers, with rates and thresholds that were fixed before any run.

A method's learning rate is its own best of ``rates``. All of them are run with the first seed, the best one then with
the others; the main study runs all seeds at all rates.

Thresholds are the losses of a pilot, 1F1B-flush at the middle rate with a seed that no study uses (99), after a
quarter, half and nine tenths of its updates, rounded up to a twentieth of a nat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from replay.case import METHODS, Case
from replay.overhead import best_rate
from replay.run import Run
from replay.store import Store

PILOT_SEED = 99
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
        task, layers, stages, updates, warmup, shape: as for ``replay.case.Case``.
        thresholds: early, middle and late loss, nats; empty where the loss is only compared at the end.
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
    thresholds: tuple[float, ...]

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
        )

    def rows(self) -> Iterator[tuple[str, int]]:
        """Method and accumulation of every row of the table."""
        for method, accumulations in self.cells:
            for accumulation in accumulations:
                yield method, accumulation

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
    optimizer = METHODS[method].optimizer
    if method.startswith("error feedback muon"):
        return "flush muon"
    name = f"flush {optimizer}"
    return name if name in METHODS else "flush"
