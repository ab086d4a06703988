"""How many times as soon as a flush schedule is PACI, by the clock, at the loss where flush ends?

    python benchmarks/time_to_loss.py --stages 2 --accumulation 2 --seeds 5 --clip-grad-norm 1 --json time_to_loss.json

Runs are those of ``paci-rt train``, with its options, one after another. As in ``iso_loss.py`` every run has the whole
learning-rate schedule of its length: the baseline is run for ``--steps`` updates and a quarter more, the others for as
many and a tenth more, and for longer until their losses meet. What is told is the ratio of throughputs, ``f``, and
their quotient, the ratio of times to the same final validation loss. Intervals are 95 %, over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import finish, positive, print_table
from paci_rt import schedules
from paci_rt.cli.options import ConfigOptions, add_pipeline, add_training, config_options, names
from paci_rt.planner.iso_loss import LEAST_SEEDS, Finals, jackknife, lengths, log_factor, settle
from paci_rt.train import compare
from paci_rt.train.config import TrainConfig
from paci_rt.train.run import execute

Execute = Callable[[TrainConfig], dict[str, float]]
Taken = dict[tuple[str, int, int], dict[str, float]]
"""Final loss and seconds, by schedule, updates and seed."""


class Kept:
    """Trains, and keeps what came of it in a file, so that an interrupted benchmark goes on where it was.

    Args:
        path: of that file, a run a line; None keeps nothing.
        execute: trains one, and returns its final loss and seconds.
    """

    def __init__(self, path: Path | None, execute: Execute) -> None:
        self._path, self._execute = path, execute
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
        self._found = {line["config"]: line["found"] for line in map(json.loads, lines)}

    def __call__(self, config: TrainConfig) -> dict[str, float]:
        key = json.dumps(asdict(config), sort_keys=True)
        if key not in self._found:
            self._found[key] = self._execute(config)
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"config": key, "found": self._found[key]}) + "\n")
        found: dict[str, float] = self._found[key]
        return found


class Runs:
    """Runs of every schedule, at the lengths that are asked for; each is made once.

    Args:
        configs: one for each schedule and seed, at N updates.
        execute: trains one, and returns its final loss and seconds.
    """

    def __init__(self, configs: Sequence[TrainConfig], execute: Execute) -> None:
        self._configs = {(one.schedule, one.seed): one for one in configs}
        self.updates = configs[0].steps
        self.seeds = sorted({one.seed for one in configs})
        self.taken: Taken = {}
        self._execute = execute

    def take(self, schedules: Sequence[str], lengths: Sequence[int]) -> None:
        """Make the runs that are not there. Schedules take turns, so that a busy hour hits all of them, and each
        second seed goes through them backwards, so that none always comes first."""
        for number, seed in enumerate(self.seeds):
            turns = list(itertools.product(lengths, schedules))
            for updates, schedule in turns if number % 2 == 0 else reversed(turns):
                if (schedule, updates, seed) not in self.taken:
                    config = replace(self._configs[schedule, seed], steps=updates, eval_interval=0)
                    self.taken[schedule, updates, seed] = self._execute(config)

    def finals(self, schedule: str, lengths: Sequence[int]) -> Finals:
        self.take([schedule], lengths)
        return {at: {seed: self.taken[schedule, at, seed]["loss"] for seed in self.seeds} for at in lengths}

    def seconds(self, schedule: str, seed: int) -> float:
        """Of N updates."""
        return self.taken[schedule, self.updates, seed]["seconds"]


def row(runs: Runs, schedule: str, baseline: str) -> dict[str, Any]:
    """One schedule over the baseline."""

    def finals_of(which: str, ladder: Sequence[float]) -> Finals:
        return runs.finals(schedule if which == "method" else baseline, lengths(runs.updates, ladder))

    settled = settle(finals_of, runs.seeds)
    assert settled is not None  # only who gives up returns nothing
    mine, theirs = settled

    def log_throughput(seeds: Sequence[int]) -> float:
        return statistics.fmean(math.log(runs.seconds(baseline, one) / runs.seconds(schedule, one)) for one in seeds)

    def log_f(seeds: Sequence[int]) -> float | None:
        every = [loss for finals in settled for by_seed in finals.values() for loss in by_seed.values()]
        return log_factor(mine, theirs, seeds) if all(map(math.isfinite, every)) else None

    def log_sooner(seeds: Sequence[int]) -> float | None:
        more_tokens = log_f(seeds)
        return None if more_tokens is None else log_throughput(seeds) - more_tokens

    told = {"throughput": log_throughput, "f": log_f, "sooner": log_sooner}
    return {
        "schedule": schedule,
        "baseline": baseline,
        "updates": runs.updates,
        "seeds": len(runs.seeds),
        **{name: interval(statistic, runs.seeds) for name, statistic in told.items()},
        "losses": {str(at): statistics.fmean(by_seed.values()) for at, by_seed in mine.items()},
        "baseline_losses": {str(at): statistics.fmean(by_seed.values()) for at, by_seed in theirs.items()},
    }


def interval(log_statistic: Any, seeds: Sequence[int]) -> list[float | None]:
    """What a statistic's logarithm says: the middle, and the bounds of its 95 % interval; None where it has none."""
    whole = log_statistic(seeds)
    if whole is None:
        return [None, None, None]
    found = (whole, *jackknife(log_statistic, whole, seeds))
    return [math.exp(one) if math.isfinite(one) else None for one in found]


def cells(interval: Sequence[float | None]) -> str:
    middle, low, high = ("?" if one is None else f"{one:.3f}" for one in interval)
    return f"{middle} ({low} to {high})"


def train(config: TrainConfig) -> dict[str, float]:
    result = execute(config)
    assert result is not None
    seconds, loss = result.wall_s, result.val_loss
    print(f"  {config.schedule}, seed {config.seed}, {config.steps} updates: {loss:.4f}, {seconds:.1f} s", flush=True)
    return {"loss": loss, "seconds": seconds}


def as_rows(taken: Taken) -> Iterator[dict[str, Any]]:
    for (schedule, updates, seed), found in sorted(taken.items()):
        yield {"schedule": schedule, "updates": updates, "seed": seed, **found}


def parse_arguments() -> tuple[argparse.Namespace, list[TrainConfig]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=names, default=("paci",), metavar="NAME,...", help="default: paci")
    parser.add_argument("--baseline", default="1f1b", metavar="NAME", help="default: 1f1b")
    parser.add_argument("--seeds", type=positive, default=5, help="the first is --seed (default 5)")
    parser.add_argument("--at-least", type=float, metavar="X", help="how many times as soon PACI is asked to be")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="keeps finished runs, to go on where it was")
    parser.add_argument("--json", metavar="FILE", help="file for all numbers")
    options = ConfigOptions(parser)
    options.group("pipeline")
    add_pipeline(options)
    add_training(options)
    args = parser.parse_args()
    if args.seeds < LEAST_SEEDS:
        parser.error(f"--seeds is {args.seeds}: give at least {LEAST_SEEDS}, better 5")
    fixed = [name for name in ("lr_steps", "warmup_steps", "eval_interval") if name in args]
    if fixed:
        parser.error(f"--{fixed[0].replace('_', '-')} cannot be given: it follows from the length of each run")
    args.schedules = [schedules.get(name).name for name in args.schedules]
    args.baseline = schedules.get(args.baseline).name
    try:
        return args, compare.plan([args.baseline, *args.schedules], args.seeds, config_options(args))
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    args, configs = parse_arguments()
    runs = Runs(configs, Kept(args.runs, train))
    everyone = [args.baseline, *args.schedules]
    runs.take(everyone, [runs.updates])
    rows = [row(runs, schedule, args.baseline) for schedule in args.schedules]
    columns = ("schedule", "updates", "seeds", "throughput", "f", "sooner")
    table = [[one[name] for name in columns[:3]] + [cells(one[name]) for name in columns[3:]] for one in rows]
    print_table(columns, table)
    missed = [
        f"{one['schedule']} is there {cells(one['sooner'])} times as soon, asked {args.at_least}"
        for one in rows
        if args.at_least is not None and (one["sooner"][0] or 0.0) < args.at_least
    ]
    finish("time_to_loss", [*rows, *as_rows(runs.taken)], missed, args.json)


if __name__ == "__main__":
    main()
