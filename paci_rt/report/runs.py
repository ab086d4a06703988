"""Runs as they are found on disk: what ``train`` and ``compare`` wrote, read for a report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paci_rt.errors import DataError
from paci_rt.files import reason
from paci_rt.trace import Event
from paci_rt.wording import shown

RESULT, COMPARISON = "result.json", "comparison.json"
ALIKE = (
    "model", "layers", "heads", "kv_heads", "width", "ffn_width", "vocab_size", "context", "rope_base", "tied",
    "data", "seq_len", "batch_size", "eval_batches", "optimizer", "lr", "min_lr", "lr_steps", "warmup_steps",
    "weight_decay", "beta1", "beta2", "momentum", "clip_grad_norm", "dtype", "steps", "stages", "replicas",
)  # fmt: skip
"""Options in which runs should agree that are compared: what they train, on what, and how many processes do it."""
_NEEDED = ("schedule", "stages", "accumulation", "steps", "evals", "config")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A validation of a run."""

    tokens: float
    elapsed_s: float
    val_loss: float


@dataclass(kw_only=True)
class FoundRun:
    """One run.

    Attributes:
        where: the file that it is from.
        schedule, seed: which run it is.
        facts: the keys of ``train --json``.
        evals: its validations, in order.
        machine: what it ran on, where the file says so.
    """

    where: Path
    schedule: str
    seed: int
    facts: dict[str, Any]
    evals: list[Reading]
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The schedule, with its policy where that is not bounded."""
        policy = self.facts.get("policy", "bounded")
        return self.schedule if policy in ("bounded", None) else f"{self.schedule} ({policy})"


@dataclass(frozen=True, kw_only=True)
class FoundTrace:
    """What was executed in a run, from a Perfetto file."""

    label: str
    events: Sequence[Event]


def find_runs(names: Sequence[str]) -> tuple[list[FoundRun], list[FoundTrace]]:
    """All runs and traces in files and folders.

    Args:
        names: files of ``train --json``, ``compare --json`` or ``--save-trace``, and folders with such files.

    Raises:
        DataError: one cannot be read, is something else, or there is no run among them.
    """
    runs: list[FoundRun] = []
    traces: list[FoundTrace] = []
    for name in names:
        for file in _files(Path(name)):
            found = _read(file)
            if isinstance(found, dict) and "traceEvents" in found:
                traces.append(FoundTrace(label=file.stem.removeprefix("trace-"), events=_events(file, found)))
            elif isinstance(found, dict) and isinstance(found.get("runs"), list):
                runs += [_run(file, one, found.get("machine")) for one in found["runs"]]
            else:
                runs.append(_run(file, found, found.get("machine") if isinstance(found, dict) else None))
    _refuse_twice(runs)
    if not runs:
        raise DataError(f"{', '.join(names)} holds no run: give files of train --json or compare --json")
    return runs, traces


def _refuse_twice(runs: Sequence[FoundRun]) -> None:
    """Raise DataError for a run that stands in two files: a median and a spread would count it as two."""
    for at, one in enumerate(runs):
        again = next((other for other in runs[:at] if other.facts == one.facts and one.facts.get("wall_s")), None)
        if again is not None:
            raise DataError(f"{again.where} and {one.where} are the same run: give one of them")


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise DataError(f"{path} does not exist: give files of train --json or compare --json, or folders of --out")
    known = [path / name for name in (RESULT, COMPARISON) if (path / name).is_file()]
    if not known and (path / "index.json").is_file():
        raise DataError(
            f"{path} has a checkpoint of a run that has not ended, so there is no {RESULT}: let it end, or go on with "
            f"paci-rt train --resume {path} --out {path}"
        )
    if not known:
        raise DataError(f"{path} has neither {RESULT} nor {COMPARISON}: give a folder of train --out or compare --out")
    yield from known
    yield from sorted(path.glob("trace*.json"))


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {file} ({reason(error)}): give a file of train --json or compare --json"
        ) from None


def _run(file: Path, facts: Any, machine: Any) -> FoundRun:
    missing = [name for name in _NEEDED if not isinstance(facts, dict) or name not in facts]
    if missing:
        raise DataError(f"{file} is not from train --json or compare --json: it has no {missing[0]!r}")
    try:
        evals = [
            Reading(
                tokens=float(one["tokens"]),
                elapsed_s=float(one["elapsed_s"]),
                val_loss=math.nan if one["val_loss"] is None else float(one["val_loss"]),
            )
            for one in facts["evals"]
        ]
        seed = int(facts["config"].get("seed", facts.get("seed", 0)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}: {shown(str(error), 60)}): run it again") from None
    if not evals:
        raise DataError(f"{file} has no validation, so there is no curve: run it with --eval-interval")
    return FoundRun(
        where=file,
        schedule=str(facts["schedule"]),
        seed=seed,
        facts=facts,
        evals=evals,
        machine=machine if isinstance(machine, dict) else {},
    )


def _events(file: Path, found: dict[str, Any]) -> list[Event]:
    try:
        return [
            Event(
                int(one["tid"]), str(one["name"]), one["ts"] / 1e6, (one["ts"] + one["dur"]) / 1e6,
                int(one["args"]["version"]),
            )
            for one in found["traceEvents"]
            if one["ph"] == "X"
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is no trace of --save-trace ({type(error).__name__}: {error})") from None


def grouped(runs: Sequence[FoundRun]) -> dict[str, list[FoundRun]]:
    """Runs by label, each sorted by seed."""
    found: dict[str, list[FoundRun]] = {}
    for run in runs:
        found.setdefault(run.label, []).append(run)
    return {label: sorted(some, key=lambda run: run.seed) for label, some in found.items()}


def differences(runs: Sequence[FoundRun]) -> dict[str, list[str]]:
    """Options in which runs differ that should be alike, with their values."""
    found = {}
    for name in ALIKE:
        values = list(dict.fromkeys(str(run.facts["config"].get(name)) for run in runs))
        if len(values) > 1:
            found[name] = values
    return found
