"""What late gradients cost on the user's own model, cut small: the protocol of equal final loss, in one process.

Every run is one of ``paci-rt train`` with the local transport, whose numbers are those of a distributed one to the bit.
Runs that are done are kept in a file, so a calibration that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from paci_rt import schedules
from paci_rt.errors import NonFiniteError
from paci_rt.planner.evaluate import early_share
from paci_rt.planner.iso_loss import LEAST_SEEDS, Finals, factor, lengths, settle
from paci_rt.planner.token_overhead import OverheadRow, OverheadTable
from paci_rt.schedules import policies
from paci_rt.train.config import TrainConfig
from paci_rt.train.data import load_corpus
from paci_rt.train.families import MODELS
from paci_rt.train.run import execute

RATES = (1e-3, 2e-3, 4e-3)
RATE_FACTORS = {"lion": 0.2, "sgd": 100.0}
"""Times these where the optimizer takes others."""
WIDTH, HEADS, BYTES = 64, 4, 256
HELD_BACK_BATCHES = 4
FLUSH = "1f1b"
_CORPUS_ONLY = ("data", "threads", "transport", "device", "log_interval", "log", "out")
"""Options that decide no number, or whose content is in the key by the corpus's digest."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What to measure; checked on construction.

    Attributes:
        model: its family and proportions are kept. layers, width, heads: of what it is cut to.
        stages, accumulations: of the pipeline; one row (at two rates) for each accumulation and look-ahead.
        lookahead: with it, without, or both.
        updates: N. warmup_share: of each run.
        rates: to choose the best from, by ``pilot_seeds``. seeds: of the rows.
        data, seq_len, batch_size, optimizer, threads: as for ``paci-rt train``.

    Raises:
        ValueError: an option that cannot work, named with the remedy.
    """

    model: str = "gpt-tiny"
    stages: int
    accumulations: tuple[int, ...]
    lookahead: tuple[bool, ...] = (True,)
    optimizer: str = "adamw"
    updates: int = 200
    warmup_share: float = 0.1
    rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    pilot_seeds: tuple[int, ...] = (101, 102)
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    seq_len: int = 64
    batch_size: int = 32
    data: str | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.rates:
            scale = RATE_FACTORS.get(self.optimizer, 1.0)
            object.__setattr__(self, "rates", tuple(rate * scale for rate in RATES))
        for name in ("accumulations", "lookahead", "rates", "seeds", "pilot_seeds"):
            given = getattr(self, name)
            flag = "--" + name.removesuffix("s" if name == "accumulations" else "").replace("_", "-")
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{flag} is {','.join(map(str, given))}: give each once, and at least one")
        both = sorted(set(self.seeds) & set(self.pilot_seeds))
        if both:
            raise ValueError(f"seed {both[0]} is in --seeds and --pilot-seeds: no row may use one that chose a rate")
        if len(self.seeds) < LEAST_SEEDS:
            raise ValueError(f"--seeds are {len(self.seeds)}: give at least {LEAST_SEEDS}, better 5")
        for rate in self.rates:
            if not 0 < rate < math.inf:
                raise ValueError(f"--rates has {rate}: give rates above 0")
        if self.stages < 2:
            raise ValueError(f"--stages is {self.stages}: one stage has no late gradients; give at least 2")
        if self.optimizer.startswith("torch-"):
            own = self.optimizer.removeprefix("torch-")
            raise ValueError(f"--optimizer is {self.optimizer}: {own} makes the same updates; use --optimizer {own}")
        for accumulation in self.accumulations:  # TrainConfig says what is wrong with the rest
            for lookahead in self.lookahead:
                self.config(accumulation, lookahead, self.rates[0], self.seeds[0], self.updates, BYTES + 1)

    def config(
        self, accumulation: int, lookahead: bool | None, rate: float, seed: int, updates: int, vocabulary: int
    ) -> TrainConfig:
        """One run; ``lookahead`` None is flush."""
        base = MODELS.get(self.model)
        ahead: dict[str, Any] = {} if lookahead is None else {"lookahead": lookahead}
        return TrainConfig(
            schedule=FLUSH if lookahead is None else "paci",
            **ahead,
            stages=self.stages,
            accumulation=accumulation,
            model=self.model,
            layers=self.stages if self.layers is None else self.layers,
            width=(WIDTH if base is None else min(WIDTH, base.width)) if self.width is None else self.width,
            heads=(HEADS if base is None else min(HEADS, base.heads)) if self.heads is None else self.heads,
            vocab_size=vocabulary,
            steps=updates,
            warmup_share=self.warmup_share,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            optimizer=self.optimizer,
            lr=rate,
            seed=seed,
            eval_interval=0,
            eval_batches=HELD_BACK_BATCHES,
            transport="local",
            threads=self.threads,
            data=self.data,
        )


class FinishedRuns:
    """Final losses by key, in a JSON-lines file that is only appended to; None keeps them in memory alone.

    Raises:
        ValueError: a line of the file is no such run.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.losses: dict[str, float] = {}
        text = path.read_text(encoding="utf-8") if path is not None and path.exists() else ""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                record = json.loads(line)
                loss = record["loss"]
                self.losses[str(record["key"])] = math.inf if loss is None else float(loss)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is not a run: delete the line to run it again") from error

    def add(self, key: str, loss: float, what: str) -> None:
        """Keep a run; infinity for one that diverged."""
        self.losses[key] = loss
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                record = {"key": key, "loss": loss if math.isfinite(loss) else None, "run": what}
                file.write(json.dumps(record) + "\n")


class Calibrator:
    """Runs what a calibration needs, and reads off its rows.

    Args:
        plan: what to measure.
        runs: finished ones.
        tell: called with a line after each run.

    Raises:
        DataError: the data cannot be used.
    """

    def __init__(self, plan: Calibration, runs: FinishedRuns, tell: Callable[[str], None] = lambda line: None) -> None:
        self._plan, self._runs, self._tell = plan, runs, tell
        shape = plan.config(plan.accumulations[0], None, plan.rates[0], 0, 1, BYTES + 1).shape
        own = MODELS[plan.model].vocab_size
        corpus = load_corpus(plan.data, vocab_size=MODELS[plan.model].data_vocab_size, seq_len=plan.seq_len)
        of_bytes = corpus.train.dtype == np.uint8
        self._vocabulary = min(own, BYTES + shape.vocab_size - shape.data_vocab_size) if of_bytes else own
        self._digest = corpus.digest()
        self.label = f"{plan.model} cut to {shape.layers} blocks of width {shape.width}"
        self.notes: list[str] = []

    def rows(self) -> list[OverheadRow]:
        """Two rows, at the best rate and at half of it, for each accumulation with and without look-ahead."""
        plan = self._plan
        flush_rate = self._best(plan.accumulations[0], None)
        found = []
        for lookahead in plan.lookahead:
            for accumulation in plan.accumulations:
                rate = self._best(accumulation, lookahead)
                for at, share in (("best", 1.0), ("half", 0.5)):
                    found.append(self._row(accumulation, lookahead, at, rate * share, flush_rate * share))
        return found

    def _best(self, accumulation: int, lookahead: bool | None) -> float:
        plan = self._plan
        if len(plan.rates) == 1:
            return plan.rates[0]
        means = {}
        for rate in plan.rates:
            losses = [self._loss(accumulation, lookahead, rate, seed, plan.updates) for seed in plan.pilot_seeds]
            means[rate] = statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.inf
        best = min(means, key=lambda rate: (means[rate], rate))
        if not math.isfinite(means[best]):
            raise ValueError(f"{_name(accumulation, lookahead)} diverged at every rate of --rates: give lower ones")
        if best in (min(means), max(means)):
            side = "highest" if best == max(means) else "lowest"
            self.notes.append(f"The best rate of {_name(accumulation, lookahead)} is {best:g}, the {side} of --rates.")
        return best

    def _row(self, accumulation: int, lookahead: bool, at: str, rate: float, flush_rate: float) -> OverheadRow:
        plan = self._plan

        def finals_of(which: str, ladder: Sequence[float]) -> Finals:
            ahead, used = (lookahead, rate) if which == "method" else (None, flush_rate)
            count = accumulation if which == "method" else plan.accumulations[0]
            return {
                updates: {seed: self._loss(count, ahead, used, seed, updates) for seed in plan.seeds}
                for updates in lengths(plan.updates, ladder)
            }

        settled = settle(finals_of, plan.seeds)
        assert settled is not None
        found = factor(*settled, plan.seeds)
        known = [
            None if value is None or not math.isfinite(value) or not value else value
            for value in (found.f, found.low, found.high)
        ]
        family = schedules.get("paci")
        shape = schedules.Shape(num_stages=plan.stages, accumulation=accumulation)
        return OverheadRow(
            optimizer=plan.optimizer,
            lookahead=lookahead,
            delay=max(policies.bounds("bounded", family, shape, rank)[1] for rank in range(plan.stages)),
            share=early_share("bounded", family, shape),
            f=known[0],
            f_low=known[1],
            f_high=known[2],
            at=at,
            rate=rate,
            seeds=found.seeds,
            stages=plan.stages,
            accumulation=accumulation,
            model=self.label,
            updates=plan.updates,
            why=found.why,
            source="paci-rt calibrate",
        )

    def _loss(self, accumulation: int, lookahead: bool | None, rate: float, seed: int, updates: int) -> float:
        """Final held-back loss of one run, infinity where it diverged."""
        config = self._plan.config(accumulation, lookahead, rate, seed, updates, self._vocabulary)
        key = self._key(config)
        if key not in self._runs.losses:
            begin_s = time.monotonic()
            try:
                result = execute(config)
                assert result is not None
                loss = result.val_loss if math.isfinite(result.val_loss) else math.inf
            except NonFiniteError:
                loss = math.inf
            what = f"{_name(accumulation, lookahead)}, rate {rate:g}, seed {seed}, {updates} updates"
            self._runs.add(key, loss, what)
            end = f"loss {loss:.3f}" if math.isfinite(loss) else "diverged"
            self._tell(f"{what}: {end}, {time.monotonic() - begin_s:.0f} s")
        return self._runs.losses[key]

    def _key(self, config: TrainConfig) -> str:
        values = {key: value for key, value in asdict(config).items() if key not in _CORPUS_ONLY}
        return hashlib.sha256(json.dumps([self._digest, values], sort_keys=True, default=str).encode()).hexdigest()[:24]


def _name(accumulation: int, lookahead: bool | None) -> str:
    if lookahead is None:
        return FLUSH
    return f"paci a={accumulation} {'with' if lookahead else 'without'} look-ahead"


def merged(old: OverheadTable | None, new: Iterable[OverheadRow]) -> OverheadTable:
    """``new`` rows, and those of ``old`` that they do not measure again."""
    rows = tuple(new)
    same = tuple(one.name for one in fields(OverheadRow) if one.name in ("at", "model", "share"))

    def ident(row: OverheadRow) -> tuple[Any, ...]:
        return (*row.kind, *(getattr(row, name) for name in same))

    known = {ident(row) for row in rows}
    kept = () if old is None else tuple(row for row in old.rows if ident(row) not in known)
    return OverheadTable(rows=rows + kept, source="paci-rt calibrate")
