"""Runs that are done, one per line of a file, and the processes that do the others."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from paci_rt import native
from staleness.case import Case
from staleness.run import Run, run


class Store:
    """Finished runs by key, kept in a JSON-lines file that is only ever appended to.

    A run that was cut off has left nothing, so whoever asks for its case again runs it again.

    Args:
        path: of the file; need not exist.

    Raises:
        ValueError: a line of the file is not a run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.runs: dict[str, Run] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self._line_end = "" if not text or text.endswith("\n") else "\n"  # an editor may have taken the last one
        for number, line in enumerate(text.splitlines(), 1):
            try:
                record = json.loads(line)
                self.runs[record["key"]] = Run.from_json(record)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number} is not a run ({error}): delete the line to run it again"
                ) from error

    def add(self, result: Run) -> None:
        """Keep a run, here and in the file."""
        self.runs[result.case.key] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._line_end + json.dumps(result.to_json()) + "\n")
        self._line_end = ""

    def missing(self, cases: Iterable[Case]) -> list[Case]:
        """Those of ``cases`` without a run, each once, in order."""
        unique = {case.key: case for case in cases}
        return [case for key, case in unique.items() if key not in self.runs]

    def of(self, cases: Iterable[Case]) -> list[Run]:
        """The runs of those of ``cases`` that have one."""
        return [self.runs[case.key] for case in cases if case.key in self.runs]


def complete(store: Store, cases: Sequence[Case], *, jobs: int, deadline_s: float | None = None) -> bool:
    """Run what is missing, ``jobs`` at a time, one thread each, and print a line per run.

    Args:
        deadline_s: seconds from now after which no further run is started.

    Returns:
        Whether every case has a run now.
    """
    todo = store.missing(cases)
    if not todo:
        return True
    start = time.monotonic()
    until = None if deadline_s is None else start + deadline_s
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=context, initializer=_one_thread) as pool:
        queue = iter(todo)
        running = {pool.submit(_run, case) for case in itertools.islice(queue, jobs)}
        done = 0
        while running:
            finished = next(as_completed(running))
            running.discard(finished)
            result = finished.result()
            store.add(result)
            done += 1
            print(_line(result, done, len(todo), time.monotonic() - start), flush=True)
            following = next(queue, None) if until is None or time.monotonic() < until else None
            if following is not None:
                running.add(pool.submit(_run, following))
    return not store.missing(cases)


def _run(case: Case) -> Run:
    """``run``, given up when whoever asked for it is gone."""
    parent = os.getppid()

    def look(_update: int, _loss: float) -> None:
        if os.getppid() != parent:
            os._exit(1)

    return run(case, on_point=look)


def _one_thread() -> None:
    torch.set_num_threads(1)
    native.set_num_threads(1)


def _line(result: Run, done: int, total: int, elapsed_s: float) -> str:
    case = result.case
    end = "diverged" if result.diverged else f"loss {result.curve[-1][1]:.3f}"
    minutes = elapsed_s / done * (total - done) / 60
    what = f"{case.task} P={case.stages} a={case.accumulation} {case.method} lr={case.lr:g} seed={case.seed}"
    updates = result.curve[-1][0]
    return f"[{done}/{total}, {minutes:.0f} min left] {what}: {end} after {updates} updates, {result.seconds:.0f} s"
