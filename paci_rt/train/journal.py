"""The log of a run: ``log.jsonl``, one JSON object a line, and the same numbers in TensorBoard and W&B.

Each process reports what it knows of a step; the process that started the run, or rank 0 under ``torchrun``, puts the
reports of all together and writes. A line has ``step`` and either the keys of a training step or ``val_loss``:

- ``step tokens elapsed_s loss lr tokens_per_s utilization``: the window, as ``paci-rt train --json`` has them;
- ``max_drift drift_bound exposed_comm_s lookahead_s skipped_windows``: of all stages, since the run began;
- ``grad_norm``: 2-norm of the mean gradient, all stages, each of its last update; null until each has made one since
  the run began or was resumed, which may be a window late;
- ``memory``: bytes by stage and part, at their peak.

Of several replicas the first one reports, with the loss and the tokens of all.

A log belongs to the checkpoint beside it: a run that goes on from one keeps the lines up to it, and one that begins
anew in the folder of another replaces the log when it replaces the checkpoint, not before.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paci_rt.files import reason, replacing
from paci_rt.train.config import TrainConfig

NAME = "log.jsonl"
TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files, beside the log."""
_ORDER = {"step": 0, "eval": 1}
Sink = Callable[[int, dict[str, float]], None]


def folder_of(config: TrainConfig) -> str | None:
    """Where the log of a run is: ``--log``, else ``--out``; None keeps none."""
    return config.log if config.log is not None else config.out


def wanted(config: TrainConfig) -> bool:
    """Whether processes report what only a log shows."""
    return folder_of(config) is not None or config.wandb


def check(config: TrainConfig) -> None:
    """Raise ValueError where a log was asked for that cannot be."""
    if config.tensorboard and folder_of(config) is None:
        raise ValueError("--tensorboard needs a folder for its files: give --out DIR or --log DIR")
    for flag, name, asked in (("--tensorboard", "tensorboard", config.tensorboard), ("--wandb", "wandb", config.wandb)):
        if asked and not _there(name):
            raise ValueError(f"{flag} needs {name}, which is not installed: pip install {name}, or leave it out")


def _there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # a module that tests put in its place has no spec
        return True


def stage_report(config: TrainConfig, step: int, stats: dict[str, Any], utilization: float, ctx: Any) -> dict[str, Any]:
    """What one process knows of a step that the others do not; ``ctx`` says which process it is."""
    return {
        "kind": "stage",
        "step": step,
        "rank": ctx.rank,
        "processes": min(getattr(ctx, "world_size", 1), config.stages),
        "restarts": getattr(ctx, "restarts", 0),
        "lr": config.lr * config.lr_factor(step - 1),
        "utilization": utilization,
        "grad_norm": {str(stage): norm for stage, norm in stats["grad_norm"].items()},
        "max_drift": stats["max_drift"],
        "drift_bound": stats["drift_bound"],
        "exposed_comm_s": stats["exposed_comm_s"],
        "lookahead_s": stats["lookahead_s"],
        "skipped_windows": max(stats["skipped_windows"].values()),
        "memory": {str(stage): parts for stage, parts in stats["memory"].items()},
    }


def due(config: TrainConfig, step: int) -> bool:
    """Whether a step has a line."""
    return wanted(config) and (step % config.log_interval == 0 or step == config.steps)


class Heard:
    """A context whose reports come to a journal: every process reports to it, where else only the last stage does."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def merged(step: dict[str, Any], stages: list[dict[str, Any]]) -> dict[str, Any]:
    """One line from the report of the last stage and those of the processes."""
    line = {key: step[key] for key in ("step", "tokens", "elapsed_s", "loss", "tokens_per_s")}
    if stages:
        norms = {stage: norm for one in stages for stage, norm in one["grad_norm"].items()}
        line |= {
            "lr": stages[0]["lr"],
            "utilization": sum(one["utilization"] for one in stages) / len(stages),
            "grad_norm": None if None in norms.values() else math.hypot(*norms.values()),
            **{key: max(one[key] for one in stages) for key in ("max_drift", "drift_bound", "skipped_windows")},
            **{key: sum(one[key] for one in stages) for key in ("exposed_comm_s", "lookahead_s")},
        }
        memory = {stage: parts for one in stages for stage, parts in one["memory"].items()}
        line["memory"] = {stage: memory[stage] for stage in sorted(memory, key=int)}
    return line


class Journal:
    """Takes the reports of all processes of a run; use as a context manager.

    Reports of one process come in order, those of several in any. Where the log cannot be written, it says so on
    standard error, once, and the run goes on without.
    """

    def __init__(self, config: TrainConfig) -> None:
        check(config)
        folder = folder_of(config)
        self._config = config
        self._path = None if folder is None else Path(folder, NAME)
        self._waiting: list[dict[str, Any]] = []  # of the last stage, in order
        self._stages: dict[int, dict[int, dict[str, Any]]] = {}  # by step and rank
        self._restarts, self._heard = 0, (-1, 0)
        self._held: list[str] | None = None
        self._file: int | None = None
        self._sinks: list[Sink] | None = None
        self._ends: list[Callable[[], Any]] = []

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, report: dict[str, Any]) -> None:
        """Take one report: ``step``, ``eval``, ``stage`` or ``saved``; others are not for the log."""
        if not wanted(self._config) or report["kind"] not in ("step", "eval", "stage", "saved"):
            return
        with self._said_once():
            self._take(report["kind"], report["step"], report)

    def _take(self, kind: str, step: int, report: dict[str, Any]) -> None:
        if kind == "saved":
            self._release()
        elif kind == "stage":
            if report["restarts"] > self._restarts:  # what was waited for will not come
                self._restarts = report["restarts"]
                self._stages.clear()
                self._waiting.clear()
            self._stages.setdefault(step, {})[report["rank"]] = report
        else:
            at = step, _ORDER[kind]
            if at <= self._heard:  # started again, from a checkpoint before this
                self._cut(at)
            elif self._heard == (-1, 0):
                self._open(at)
            self._heard = at
            if kind == "eval" or due(self._config, step):
                self._waiting.append(report)
        while self._waiting and self._complete(self._waiting[0]):
            self._write(self._waiting.pop(0))

    def _complete(self, report: dict[str, Any]) -> bool:
        """Whether all processes have said what they know of a step."""
        there = self._stages.get(report["step"], {})
        return report["kind"] == "eval" or (bool(there) and len(there) >= next(iter(there.values()))["processes"])

    def close(self) -> None:
        """Write what has come, where a process did not say everything, and end."""
        with self._said_once():
            while self._waiting:
                self._write(self._waiting.pop(0))
        if self._file is not None:
            os.close(self._file)
            self._file = None
        while self._ends:
            self._ends.pop()()

    def _write(self, report: dict[str, Any]) -> None:
        if report["kind"] == "eval":
            line = {key: report[key] for key in ("step", "tokens", "elapsed_s", "val_loss")}
        else:
            by_rank = self._stages.pop(report["step"], {})
            line = merged(report, [by_rank[rank] for rank in sorted(by_rank)])
        numbers = {name: value for name, value in _flat(line) if name != "step"}
        for sink in self._open_sinks():
            sink(line["step"], numbers)
        bad = [key for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
        text = json.dumps(line | dict.fromkeys(bad)) + "\n"
        if self._held is not None:
            self._held.append(text)
        elif self._file is not None:
            os.write(self._file, text.encode())

    def _open(self, at: tuple[int, int]) -> None:
        """Begin: behind what a resumed run has, or in place of what is there, once that may be replaced."""
        if self._path is None:
            return
        out, resume = self._config.out, self._config.resume
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # another process began this log
        resumed = resume is not None and (self._config.log is not None or (out is not None and _same(resume, out)))
        if again or resumed:
            self._cut(at)
        elif self._config.log is None and (self._path.parent / "index.json").exists():
            self._held = []
        else:
            self._cut((-1, 0))

    def _cut(self, at: tuple[int, int]) -> None:
        """Keep the lines before ``at`` alone."""
        self._waiting = [one for one in self._waiting if (one["step"], _ORDER[one["kind"]]) < at]
        if self._path is None:
            return
        if self._held is not None:
            self._held = [text for text in self._held if _place(text) < at]
            return
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [text for text in self._lines() if _place(text) < at]
        with replacing(self._path) as stream:
            stream.writelines(text.encode() for text in kept)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _release(self) -> None:
        """A checkpoint was saved: what was held back takes the place of the log of the one before."""
        if self._held is not None:
            held, self._held = self._held, None
            self._cut((-1, 0))
            assert self._file is not None
            os.write(self._file, "".join(held).encode())

    def _lines(self) -> list[str]:
        assert self._path is not None
        try:
            return self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, ValueError):
            return []

    @contextmanager
    def _said_once(self) -> Iterator[None]:
        """Where the system refuses: say so, and write no more."""
        try:
            yield
        except OSError as error:
            why = f"{self._path} cannot be written ({reason(error)}): the run goes on without it"
            print(f"paci-rt: {why}", file=sys.stderr)
            self._path, self._held, self._waiting = None, None, []
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _open_sinks(self) -> list[Sink]:
        if self._sinks is None:
            self._sinks = []
            if self._config.tensorboard:
                self._sinks.append(self._tensorboard())
            if self._config.wandb:
                self._sinks.append(self._wandb())
        return self._sinks

    def _tensorboard(self) -> Sink:
        from torch.utils.tensorboard import SummaryWriter

        folder = folder_of(self._config)
        assert folder is not None
        writer: Any = SummaryWriter(str(Path(folder, TENSORBOARD)))
        self._ends.append(writer.close)

        def write(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return write

    def _wandb(self) -> Sink:
        import wandb

        folder = folder_of(self._config)
        run: Any = wandb.init(project="paci-rt", config=self._config.to_json(), **({"dir": folder} if folder else {}))
        self._ends.append(run.finish)

        def write(step: int, numbers: dict[str, float]) -> None:
            run.log(numbers, step=step)

        return write


def _same(one: str, other: str) -> bool:
    """Whether a checkpoint to resume from lies in a folder."""
    place = Path(one)
    return (place if place.is_dir() else place.parent).resolve() == Path(other).resolve()


def _place(text: str) -> tuple[int, int]:
    """Where a line stands in a run; behind everything if it is none."""
    with suppress(ValueError, TypeError, KeyError):
        line = json.loads(text)
        if text.endswith("\n"):
            return int(line["step"]), _ORDER["eval" if "val_loss" in line else "step"]
    return 1 << 62, 0


def _flat(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers by name; those of stages as ``memory/0/weights``."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", one) for inner, one in _flat(value))
        elif value is not None:
            yield name, value
