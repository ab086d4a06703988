"""``f`` from runs of one length: what they end behind flush, over how fast flush's final loss falls with its length.

Runs of N updates, each with its whole schedule, end at losses that differ by ``d`` nats. Flush's final loss falls by
``s`` nats where tokens grow by a factor e, so a method that ends ``d`` higher needs about ``exp(d / s)`` times the
tokens. This is good where ``d`` is small, and no replacement for :mod:`paci_rt.planner.iso_loss`, which needs runs of
two lengths.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from paci_rt.planner.iso_loss import LEAST_SEEDS, student_t

RUNS = ("convergence_runs.jsonl", "iso_loss_runs.jsonl")
METHODS = ("look-ahead", "look-ahead shared", "paci")
SLOPES = (("gpt-nano", 0.001), ("gpt-nano", 0.002))
SHORT, LONG = 120, 200
"""Updates of flush's runs that tell how its final loss falls."""


@dataclass(frozen=True, kw_only=True)
class OneLength:
    """A method against flush at one rate and length.

    Attributes:
        behind, behind_low, behind_high: nats that it ends above flush, mean over the seeds, with its 95 % interval.
        slope: nats by which flush's final loss falls where tokens grow by a factor e.
    """

    task: str
    stages: int
    accumulation: int
    method: str
    rate: float
    updates: int
    seeds: int
    behind: float
    behind_low: float
    behind_high: float
    slope: float

    def f(self, behind: float | None = None) -> float:
        """Tokens over those of flush, by the mean or by an end of the interval."""
        return math.exp((self.behind if behind is None else behind) / self.slope)


def one_lengths(folder: Path) -> list[OneLength]:
    """All pairs of a method and flush that have at least three seeds in common, of AdamW and a cosine."""
    finals: dict[tuple[object, ...], dict[int, float]] = defaultdict(dict)
    for name in RUNS:
        path = folder / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            run = json.loads(line)
            case = run["case"]
            plain = all(case.get(key) is None for key in ("width", "batch_size", "beta2", "clip", "corpus"))
            if run["diverged"] or not plain or case["shape"] != "cosine" or case["dtype"] != "fp32":
                continue
            where = (case["task"], case["stages"], case["layers"], case["warmup"], case["updates"], case["lr"])
            finals[(*where, case["method"], case["accumulation"])][case["seed"]] = run["curve"][-1][1]
    slopes = _slopes(finals)
    found = []
    for key in sorted(finals, key=str):
        *where, method, accumulation = key
        if method not in METHODS:
            continue
        flush = [seeds for other, seeds in finals.items() if list(other[:6]) == where and other[6] == "flush"]
        base = {seed: loss for seeds in flush for seed, loss in seeds.items()}
        pairs = [finals[key][seed] - base[seed] for seed in sorted(set(finals[key]) & set(base))]
        if len(pairs) < LEAST_SEEDS:
            continue
        task, stages, _, _, updates, rate = where
        mean = statistics.fmean(pairs)
        half = student_t(len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
        found.append(
            OneLength(
                task=str(task),
                stages=int(str(stages)),
                accumulation=int(str(accumulation)),
                method=str(method),
                rate=float(str(rate)),
                updates=int(str(updates)),
                seeds=len(pairs),
                behind=mean,
                behind_low=mean - half,
                behind_high=mean + half,
                slope=slopes.get(float(str(rate)), min(slopes.values())),
            )
        )
    return found


def _slopes(finals: dict[tuple[object, ...], dict[int, float]]) -> dict[float, float]:
    """By rate: how flush's final loss falls between SHORT and LONG updates, of the seeds that have both."""
    found: dict[float, float] = {}
    for task, rate in SLOPES:
        by_length: dict[int, dict[int, float]] = {SHORT: {}, LONG: {}}
        for key, seeds in finals.items():
            if (key[0], key[1], key[5], key[6]) == (task, 8, rate, "flush") and key[4] in by_length:
                by_length[int(str(key[4]))].update(seeds)
        both = set(by_length[SHORT]) & set(by_length[LONG])
        if both:
            fall = _mean(by_length[SHORT][seed] - by_length[LONG][seed] for seed in both)
            found[rate] = fall / math.log(LONG / SHORT)
    return found


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(list(values))
