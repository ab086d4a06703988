"""What a study came to: a row a method and accumulation, as a table, as JSON and held against what is asked."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from staleness.case import METHODS
from staleness.overhead import Overhead, best_rate, overheads
from staleness.run import Run
from staleness.store import Store
from staleness.studies import Study, baseline_of

COLUMNS = ("method", "a", "rate", "final loss", "early", "middle", "late", "drift", "ahead")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at its best learning rate.

    Attributes:
        rate: the best learning rate; searched: whether it had others to be better than.
        final: final loss by seed.
        overheads: early, middle and late token overhead over the flush baseline; empty for the baseline itself.
        max_drift: updates between forward and backward, counted.
        lookahead_share: of the computing time.
        runs: at the best rate.
    """

    method: str
    accumulation: int
    rate: float
    searched: bool
    final: dict[int, float]
    overheads: tuple[Overhead, ...]
    max_drift: int
    lookahead_share: float
    runs: tuple[Run, ...]

    @property
    def cells(self) -> list[str]:
        """As in the table; see COLUMNS."""
        share = f"{self.lookahead_share:.1%}" if METHODS[self.method].lookahead else ""
        texts = [overhead.text for overhead in self.overheads] or ["1"] * 3
        return [
            self.method,
            str(self.accumulation),
            f"{self.rate:g}" + ("" if self.searched else " (given)"),
            _spread(list(self.final.values())),
            *texts,
            str(self.max_drift),
            share,
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything but the curves."""
        return {
            "method": self.method,
            "accumulation": self.accumulation,
            "rate": self.rate,
            "rate_searched": self.searched,
            "final_loss": {str(seed): loss for seed, loss in self.final.items()},
            "token_overhead": [
                {
                    "threshold": overhead.threshold,
                    "by_seed": {str(seed): ratio for seed, ratio in overhead.ratios.items()},
                    "never_reached_by_seeds": list(overhead.short),
                }
                for overhead in self.overheads
            ],
            "max_drift": self.max_drift,
            "lookahead_share": self.lookahead_share,
        }


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows of a study that are done, and how far it is."""

    study: Study
    thresholds: dict[str, tuple[float, ...]]
    rows: tuple[Row, ...]
    complete: bool

    def row(self, method: str, accumulation: int | None = None) -> Row | None:
        """The row of a method; None if it is not there (yet)."""
        for row in self.rows:
            if row.method == method and accumulation in (None, row.accumulation):
                return row
        return None

    def ahead(self, accumulation: int | None = None) -> Row | None:
        """The row of look-ahead as it is, else of that which shared its passes; None if neither is there (yet)."""
        return self.row("look-ahead", accumulation) or self.row("look-ahead shared", accumulation)

    def to_json(self) -> dict[str, Any]:
        study = self.study
        return {
            "study": study.name,
            "question": study.question,
            "task": study.task,
            "layers": study.layers,
            "stages": study.stages,
            "updates": study.updates,
            "warmup": study.warmup,
            "shape": study.shape,
            "rates": list(study.rates),
            "seeds": list(study.seeds),
            "thresholds": {baseline: list(values) for baseline, values in self.thresholds.items()},
            "complete": self.complete,
            "rows": [row.to_json() for row in self.rows],
        }


def tabulate(study: Study, store: Store) -> Table:
    """What is there of a study."""
    thresholds = {}
    for baseline in study.baselines:
        found = study.thresholds(store, baseline)
        if found is not None:
            thresholds[baseline] = found
    best = {(method, a): _best(study.row(store, method, a)) for method, a in study.rows()}
    rows = []
    for (method, accumulation), runs in best.items():
        baseline = baseline_of(method)
        theirs = next((found for (name, _), found in best.items() if name == baseline), [])
        if not runs or baseline not in thresholds or not theirs:
            continue
        against = [] if method == baseline else overheads(runs, theirs, thresholds[baseline])
        rows.append(
            Row(
                method=method,
                accumulation=accumulation,
                rate=runs[0].case.lr,
                searched=len(study.rates) > 1,
                final={run.case.seed: run.curve[-1][1] for run in runs},
                overheads=tuple(against),
                max_drift=max(run.max_drift for run in runs),
                lookahead_share=statistics.median(run.lookahead_share for run in runs),
                runs=tuple(runs),
            )
        )
    complete = len(rows) == len(best) and all(len(row.final) == len(study.seeds) for row in rows)
    return Table(study=study, thresholds=thresholds, rows=tuple(rows), complete=complete)


def _best(runs: Sequence[Run]) -> list[Run]:
    """Those at the best learning rate, in the order of their seeds."""
    if not runs:
        return []
    rate = best_rate(runs)
    return sorted((run for run in runs if run.case.lr == rate), key=lambda run: run.case.seed)


def _spread(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})"


# ------------------------------------------------------------------------------------------------------------ asked


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A bound on the token overhead of look-ahead, at every threshold, mean over the seeds.

    Attributes:
        most: the overhead itself; None where it is a share of what plain PACI costs.
        most_of_paci: largest share of plain PACI's extra tokens.
    """

    study: str
    accumulation: int
    most: float | None = None
    most_of_paci: float | None = None

    def missed(self, table: Table) -> list[str]:
        """A line for each threshold at which the bound does not hold."""
        ahead, paci = table.ahead(self.accumulation), table.row("paci", self.accumulation)
        if ahead is None or paci is None:
            return [f"{self.study}, a={self.accumulation}: not run"]
        lines = []
        for name, mine, plain in zip(("early", "middle", "late"), ahead.overheads, paci.overheads, strict=True):
            where = f"{self.study}, a={self.accumulation}, {name} loss {mine.threshold:g}"
            at_least = "at least " if mine.short else ""
            if not mine.ratios or not plain.ratios:
                lines.append(f"{where}: the baseline never came down to it")
                continue
            if self.most is not None and mine.mean > self.most:
                lines.append(f"{where}: token overhead {at_least}{mine.mean:.3f}, asked {self.most:g}")
            if self.most_of_paci is not None:
                share = (mine.mean - 1) / (plain.mean - 1) if plain.mean > 1 else 0.0
                if share > self.most_of_paci:
                    told = f"{share:.2f} of plain PACI's extra tokens ({mine.mean:.3f} against {plain.mean:.3f})"
                    lines.append(f"{where}: {at_least}{told}, asked {self.most_of_paci:.2f}")
        return lines


ASKED = (
    Asked(study="main", accumulation=8, most=1.05),
    Asked(study="main", accumulation=16, most=1.03),
    Asked(study="main-4", accumulation=4, most_of_paci=1 / 3),
    Asked(study="depth-16", accumulation=16, most=1.06),
    Asked(study="depth-16", accumulation=8, most_of_paci=1 / 3),
    Asked(study="depth-32", accumulation=32, most=1.10),
    Asked(study="quick", accumulation=8, most=1.10),
    Asked(study="quick", accumulation=8, most_of_paci=1 / 3),
)


def missed(tables: Sequence[Table]) -> list[str]:
    """Everything that falls short of ASKED, in the studies that were run."""
    by_name = {table.study.name: table for table in tables}
    return [line for asked in ASKED if asked.study in by_name for line in asked.missed(by_name[asked.study])]


Printer = Callable[[Sequence[str], Sequence[Sequence[Any]]], None]


def describe(table: Table) -> list[str]:
    """What was run, and what is compared."""
    study = table.study
    model = study.task if study.layers is None else f"{study.task} with {study.layers} blocks"
    rates, seeds = ", ".join(f"{rate:g}" for rate in study.rates), ", ".join(map(str, study.seeds))
    ending = "" if table.complete else ", NOT COMPLETE"
    lines = [f"{model}, {study.stages} stages, {study.updates} updates, rates {rates}, seeds {seeds}{ending}"]
    for baseline, values in table.thresholds.items():
        lines.append(f"overhead over {baseline} at loss {', '.join(f'{value:g}' for value in values)}")
    return lines


def print_tables(tables: Sequence[Table], print_table: Printer) -> None:
    """Every table with its question and thresholds."""
    for table in tables:
        print(f"\n{table.study.name}: {table.study.question}")
        print("\n".join(describe(table)))
        print_table(COLUMNS, [row.cells for row in table.rows])


def markdown(tables: Sequence[Table]) -> str:
    """The same for a page."""
    parts = []
    for table in tables:
        rows = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells for row in table.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append("\n".join([f"**{table.study.question}** " + "; ".join(describe(table)) + ".", "", *lines]))
    return "\n\n".join(parts) + "\n"
