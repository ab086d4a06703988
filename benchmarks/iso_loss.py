"""How many more tokens does a method need than 1F1B-flush to end at the same loss, each with its own full schedule?

Everything is fixed beforehand in a file: ``--plan FILE`` without runs writes it, and a later call runs what it says,
in replays in one process. Runs that are done are kept, so an interrupted benchmark goes on where it was.

    python benchmarks/iso_loss.py --stages 8 --accumulation 4,8 --methods paci,look-ahead --optimizer adamw \
      --updates 200 --rates 1e-3,2e-3,4e-3 --seeds 10,11,12,13,14 --json iso_loss.json
    python benchmarks/iso_loss.py ... --write-plan plan.json     # the same options, fixed in a file; runs nothing
    python benchmarks/iso_loss.py --plan plan.json --json iso_loss.json

``f`` is tokens of the method over tokens of flush, with a 95 % interval over the seeds (``paci_rt.planner.iso_loss``),
at each method's best rate and at half of it. The best rate is the one of ``--rates`` with the lowest mean final loss
over ``--pilot-seeds``, which are no seeds of the rows; where ``--rates`` is a single one, it is given. First crossings,
the older question, are a second table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common import finish, list_of, positive, print_table, write_json
from paci_rt.planner.iso_loss import LEAST_SEEDS, Finals, lengths, settle
from paci_rt.report.machine import machine
from staleness.case import METHODS, SHAPES, Case
from staleness.iso_rows import compared, partial_row
from staleness.overhead import best_rate, updates_to
from staleness.run import Run, task_of
from staleness.store import Store, complete
from staleness.tasks import TASKS, use_corpus

RESULTS = Path(__file__).resolve().parent / "results"
OPTIMIZERS = ("adamw", "nadam", "sgd", "lion", "muon")
CROSSINGS = (0.5, 0.75)
"""Shares of flush's run at N updates whose losses the second table asks for."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed before any run.

    Attributes:
        methods: without ``flush``, which every one is compared with.
        rates: of the optimizer, to choose from; pilot_seeds: by which, and seeds: of the rows.
        updates: N. The others are as for ``staleness.case.Case``.
    """

    task: str = "gpt-nano"
    stages: int
    accumulation: tuple[int, ...]
    methods: tuple[str, ...]
    optimizer: str
    updates: int
    warmup: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    pilot_seeds: tuple[int, ...]
    shape: str = "cosine"
    layers: int | None = None
    width: int | None = None
    batch_size: int | None = None
    beta2: float | None = None
    clip: float | None = None
    corpus: str | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer is {self.optimizer}: choose from {', '.join(OPTIMIZERS)}")
        common = sorted(set(self.seeds) & set(self.pilot_seeds))
        if common:
            raise ValueError(f"seed {common[0]} is in --seeds and --pilot-seeds: no row may use one that chose a rate")
        if len(set(self.seeds)) < LEAST_SEEDS:
            raise ValueError(f"--seeds are {len(set(self.seeds))}: give at least {LEAST_SEEDS}, better 5")
        for name in ("seeds", "pilot_seeds", "rates", "accumulation", "methods"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"--{name.replace('_', '-')} are {given}: give each once, and at least one")
        for rate in self.rates:
            if not 0 < rate < math.inf:
                raise ValueError(f"--rates has {rate}: give rates above 0")
        for method in self.methods:
            if METHODS[self.full_name(method)].flushes:
                raise ValueError(f"--methods has {method}, which every other one is compared with anyway: leave it out")
        if self.warmup >= self.updates:
            raise ValueError(f"--warmup is {self.warmup} and --updates {self.updates}: warm up for a part of them")
        task = task_of(self.case("flush", 1, 1.0, 0, self.updates))
        task.build(self.stages, 0)
        odd = [one for one in self.accumulation if task.batch_size % one]
        if odd:
            raise ValueError(
                f"--accumulation has {odd[0]}: it must divide the {task.batch_size} sequences of an update"
            )

    def full_name(self, method: str) -> str:
        """A method's name under the optimizer, in METHODS.

        Raises:
            ValueError: there is none.
        """
        name = method if self.optimizer == "adamw" else f"{method} {self.optimizer}"
        if name not in METHODS:
            raise ValueError(f"--methods has {method}: under {self.optimizer} choose from {', '.join(self.known())}")
        return name

    def known(self) -> Iterator[str]:
        """Methods that the optimizer has."""
        for name in METHODS:
            if self.optimizer == "adamw" or name.endswith(f" {self.optimizer}"):
                yield name.removesuffix(f" {self.optimizer}")

    @property
    def _common(self) -> dict[str, Any]:
        names = ("task", "stages", "shape", "layers", "width", "batch_size", "beta2", "clip", "corpus")
        return {name: getattr(self, name) for name in names}

    def case(self, method: str, accumulation: int, rate: float, seed: int, updates: int) -> Case:
        """One run. Warm-up is the same share of every length."""
        return Case(
            **self._common,
            method=self.full_name(method),
            accumulation=accumulation,
            lr=rate,
            seed=seed,
            updates=updates,
            warmup=round(self.warmup * updates / self.updates),
        )

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def read(cls, path: Path) -> Plan:
        """What ``--write-plan`` wrote.

        Raises:
            ValueError: it is not that.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            names = {one.name for one in fields(cls)}
            if set(values) - names:
                raise TypeError(f"it has {sorted(set(values) - names)[0]!r}")
            return cls(**{name: tuple(one) if isinstance(one, list) else one for name, one in values.items()})
        except (OSError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no plan ({error}): write one with --write-plan") from error


class Protocol:
    """Runs what a plan needs, and reads off its rows.

    Args:
        run: does cases that have no run yet; False where it ran out of time.
    """

    def __init__(self, plan: Plan, store: Store, run: Any) -> None:
        self.plan, self.store, self._run = plan, store, run
        self.rows: list[dict[str, Any]] = []
        self.unfinished = False

    def go(self, *, partial: bool = False) -> None:
        """All rows, one method after another, each at every ``a``: what is asked for first is there first.

        Args:
            partial: run nothing, and make rows of the seeds that are there.
        """
        plan = self.plan
        base = plan.accumulation[0]
        flush_rate = self._best("flush", base)
        if flush_rate is None:
            return
        for method in plan.methods:
            for accumulation in plan.accumulation:
                rate = self._best(method, accumulation)
                if rate is None and partial:
                    continue
                if rate is None:
                    return
                for which, share in (("best", 1.0), ("half", 0.5)):
                    if partial:
                        found = partial_row(plan, self.store, method, accumulation, rate * share, flush_rate * share)
                        self.rows += [] if found is None else [{"at": which, **found}]
                        continue
                    row = self._row(method, accumulation, rate * share, flush_rate * share)
                    if row is None:
                        return
                    self.rows.append({"at": which, **row})

    def _complete(self, cases: Sequence[Case]) -> bool:
        done = bool(self._run(cases)) if self.store.missing(cases) else True
        self.unfinished = self.unfinished or not done
        return done

    def _best(self, method: str, accumulation: int) -> float | None:
        plan = self.plan
        if len(plan.rates) == 1:
            return plan.rates[0]
        cases = [
            plan.case(method, accumulation, rate, seed, plan.updates)
            for rate in plan.rates
            for seed in plan.pilot_seeds
        ]
        return best_rate(self.store.of(cases)) if self._complete(cases) else None

    def _row(self, method: str, accumulation: int, rate: float, flush_rate: float) -> dict[str, Any] | None:
        """``f`` at one rate; both ladders go on until it can be told, or end."""
        plan = self.plan

        def finals_of(which: str, ladder: Sequence[float]) -> Finals | None:
            if which == "method":
                return self._finals(method, accumulation, rate, ladder)
            return self._finals("flush", plan.accumulation[0], flush_rate, ladder)

        settled = settle(finals_of, plan.seeds)
        if settled is None:
            return None
        mine, theirs = settled
        return {
            "method": method,
            "accumulation": accumulation,
            "optimizer": plan.optimizer,
            "rate": rate,
            "flush_rate": flush_rate,
            **compared(mine, theirs, plan.seeds),
            "first_crossing": self._crossings(method, accumulation, rate, flush_rate),
        }

    def _finals(self, method: str, accumulation: int, rate: float, ladder: Sequence[float]) -> Finals | None:
        plan = self.plan
        cases = [
            plan.case(method, accumulation, rate, seed, updates)
            for updates in lengths(plan.updates, ladder)
            for seed in plan.seeds
        ]
        if not self._complete(cases):
            return None
        finals: dict[int, dict[int, float]] = {}
        for run in self.store.of(cases):
            finals.setdefault(run.case.updates, {})[run.case.seed] = math.inf if run.diverged else run.curve[-1][1]
        return finals

    def _crossings(self, method: str, accumulation: int, rate: float, flush_rate: float) -> list[dict[str, Any]]:
        """The second table: updates to losses of flush's runs at N, by curves at N; only where all seeds get there."""
        plan, found = self.plan, []
        mine = self._curves(method, accumulation, rate)
        theirs = self._curves("flush", plan.accumulation[0], flush_rate)
        for share in CROSSINGS:
            loss = statistics.fmean(_loss_at(run, share * plan.updates) for run in theirs)
            needed = [updates_to(run.curve, loss) for run in mine]
            base = [updates_to(run.curve, loss) for run in theirs]
            if all(needed) and all(base):
                ratios = [a / b for a, b in zip(needed, base, strict=True) if a and b]
                found.append({"loss": loss, "ratio": statistics.fmean(ratios), "of": len(ratios)})
        return found

    def _curves(self, method: str, accumulation: int, rate: float) -> list[Run]:
        plan = self.plan
        return self.store.of([plan.case(method, accumulation, rate, seed, plan.updates) for seed in plan.seeds])


def _loss_at(run: Run, update: float) -> float:
    return min(run.curve, key=lambda point: abs(point[0] - update))[1]


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to run")
    what.add_argument("--stages", type=positive, default=8)
    what.add_argument("--accumulation", type=list_of(positive), default=[8])
    what.add_argument("--methods", type=list_of(str), default=["look-ahead"], help="see staleness/case.py")
    what.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    what.add_argument("--updates", type=positive, default=200, metavar="N")
    what.add_argument("--warmup", type=positive, default=20, metavar="N", help="of N updates")
    what.add_argument("--rates", type=list_of(float), default=[1e-3, 2e-3, 4e-3])
    what.add_argument("--seeds", type=list_of(int), default=[10, 11, 12, 13, 14])
    what.add_argument("--pilot-seeds", type=list_of(int), default=[100, 101])
    what.add_argument("--corpus", metavar="FILE|FOLDER", help="text to train on (default: Python's own library)")
    what.add_argument("--task", choices=sorted(TASKS), default="gpt-nano")
    what.add_argument("--layers", type=positive)
    what.add_argument("--width", type=positive)
    what.add_argument("--batch-size", type=positive, help="sequences per update")
    what.add_argument("--shape", choices=SHAPES, default="cosine", help="of the learning rate")
    what.add_argument("--beta2", type=float)
    what.add_argument("--clip", type=float, help="largest gradient norm")
    how = parser.add_argument_group("how")
    how.add_argument("--plan", type=Path, metavar="FILE", help="run what this file says, in place of the options above")
    how.add_argument("--write-plan", type=Path, metavar="FILE", help="write such a file, and run nothing")
    how.add_argument("--jobs", type=positive, default=2, help="runs at a time, one thread each (default 2)")
    how.add_argument("--minutes", type=float, help="start no run after so many")
    how.add_argument("--runs", type=Path, default=RESULTS / "iso_loss_runs.jsonl", help="file of finished runs")
    how.add_argument("--report-only", action="store_true", help="run nothing, show what is there")
    how.add_argument("--partial", action="store_true", help="run nothing, make rows of the seeds that are there")
    how.add_argument("--json", help="file for all numbers")
    options = parser.parse_args(arguments)
    try:
        label = None if options.corpus is None else use_corpus(options.corpus)
        if options.plan is not None:
            plan = Plan.read(options.plan)
            if plan.corpus != label:
                raise ValueError(
                    f"{options.plan} is for the text {plan.corpus or 'of Python itself'}, and --corpus is "
                    f"{label or 'not given'}: give the same"
                )
            return options, plan
        names = {one.name for one in fields(Plan)} - {"corpus"}
        given = {name: value for name, value in vars(options).items() if name in names}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return options, Plan(**given, corpus=label)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))


def text(row: dict[str, Any]) -> list[Any]:
    """A row of the printed table."""
    f = row.get("why") if row["f"] is None else f"{row['f']:.3f}"
    low, high = ("?" if row[name] is None else f"{row[name]:.3f}" for name in ("f_low", "f_high"))
    crossing = ", ".join(f"{one['ratio']:.2f} at {one['loss']:.2f}" for one in row["first_crossing"]) or "-"
    interval = "" if row["f"] is None else f"{low} to {high}"
    return [row["method"], row["accumulation"], row["at"], f"{row['rate']:g}", f, interval, row["seeds"], crossing]


def main() -> None:
    options, plan = parse()
    if options.write_plan is not None:
        options.write_plan.write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.write_plan}")
        return
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes

    def run(cases: Sequence[Case]) -> bool:
        left_s = None if until is None else until - time.monotonic()
        if options.report_only or options.partial or (left_s is not None and left_s <= 0):
            return False
        return complete(protocol.store, cases, jobs=options.jobs, deadline_s=left_s)

    try:
        protocol = Protocol(plan, Store(options.runs), run)
        protocol.go(partial=options.partial)
    except ValueError as error:
        sys.exit(f"iso_loss.py: {error}")
    print_table(
        ("method", "a", "at", "rate", "f", "95 %", "seeds", "first crossing"), [text(row) for row in protocol.rows]
    )
    rows = [{"stages": plan.stages, "updates": plan.updates, "task": plan.task, **row} for row in protocol.rows]
    missed = ["the plan is not complete: run it again"] if protocol.unfinished or options.partial else []
    if options.json:
        document = {"benchmark": "iso_loss", "machine": machine(), "plan": plan.to_json(), "rows": rows}
        write_json(options.json, {**document, "missed": missed})
    finish("iso_loss", rows, missed, None)


if __name__ == "__main__":
    main()
