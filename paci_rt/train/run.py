"""One training run from one config, wherever its stages live."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from paci_rt import launch
from paci_rt.errors import RunStopped
from paci_rt.launch.reports import at_rank_0
from paci_rt.runtime.stats import MEMORY_PARTS as PARTS
from paci_rt.train.build import DUMPS
from paci_rt.train.clocks import offset_to_first, shifted
from paci_rt.train.config import TrainConfig
from paci_rt.train.journal import Heard, Journal
from paci_rt.train.logs import logged
from paci_rt.train.replicas import Together, of_first_replica
from paci_rt.train.results import EvalPoint, RunResult, StageResult, StepPoint, merge, with_earlier
from paci_rt.train.saved import changed_options
from paci_rt.train.trainer import preflight, train

MEMORY_PARTS = (*PARTS, "total")

OnReport = Callable[[dict[str, Any]], None]


def execute(config: TrainConfig, *, on_report: OnReport | None = None) -> RunResult | None:
    """Train as ``config`` says: here with the local transport or one stage, in this process's place under torchrun,
    else in one new process per stage.

    Returns:
        The result; None under torchrun on every rank but 0.

    Raises:
        ValueError: options or data that cannot work; nothing has been started or written then.
        RunStopped: SIGTERM ended it; what was trained has been saved into ``out``, if there is one.
        PaciError: the run failed.
    """
    check_start(config)
    preflight(config)
    with Journal(config) as journal:
        return _execute(config, journal, on_report)


def _execute(config: TrainConfig, journal: Journal, on_report: OnReport | None) -> RunResult | None:
    steps: list[StepPoint] = []
    evals: list[EvalPoint] = []
    changed = "" if config.resume is None else changed_options(config)
    notes = [f"paci-rt: --resume {config.resume} goes on with other options: {changed}"] if changed else []
    dumps = None if config.out is None else Path(config.out) / DUMPS
    if dumps is not None and os.environ.get("RANK", "0") == "0":
        remove_dumps(dumps)

    def hear(report: dict[str, Any]) -> None:
        if notes:  # once training has begun: what cannot begin ends in one line alone
            print(notes.pop(), file=sys.stderr, flush=True)
        if config.max_restarts:
            remember(report, steps, evals)
        journal(report)
        if on_report is not None:
            on_report(report)

    told = Together(config.replicas, hear)
    common: dict[str, Any] = {"threads": config.threads, "on_report": told, "grace_s": config.grace_s}
    common |= {"transfer_timeout_s": config.transfer_timeout, "dumps": dumps}
    if launch.under_torchrun():
        results = launch.run_under_torchrun(_stage_under_torchrun, (config,), **common)
    elif in_this_process(config):
        torch.set_num_threads(config.threads)
        with launch.alone(config.grace_s):
            results = [_stage(launch.Context(local=True, on_report=told), config)]
    else:
        more: dict[str, Any] = {"port": config.port, "max_restarts": config.max_restarts}
        results = launch.run(_stage, config.stages * config.replicas, (config,), **common, **more)
    stopped = launch.stopped_before() if results is None else results[0].stopped
    if stopped is not None:
        raise RunStopped(stop_text(config, stopped), stopped)
    return None if results is None else with_earlier(merge(config, of_first_replica(config, results)), steps, evals)


def stop_text(config: TrainConfig, step: int) -> str:
    """What a run says that SIGTERM has ended in order."""
    if config.out is None:
        return f"stopped by SIGTERM after step {step}; nothing was saved: give --out DIR to keep what was trained"
    return f"stopped by SIGTERM after step {step} and saved in {config.out}: go on with --resume {config.out}"


def remember(report: dict[str, Any], steps: list[StepPoint], evals: list[EvalPoint]) -> None:
    """Keep a point of the curve that a stage reported, in case that it is the last word of its start."""
    if report["kind"] == "step":
        steps.append(StepPoint(**{field.name: report[field.name] for field in fields(StepPoint)}))
    elif report["kind"] == "eval":
        evals.append(EvalPoint(**{field.name: report[field.name] for field in fields(EvalPoint)}))


def remove_dumps(folder: Path) -> None:
    """Remove what an earlier run left in its folder of dumps; those of other programs stay."""
    for file in [*folder.glob("failure*.json"), *folder.glob("paci_rt_events_rank*.json")]:
        with suppress(OSError):
            file.unlink()
    with suppress(OSError):
        folder.rmdir()


def _stage(ctx: launch.Context, config: TrainConfig) -> StageResult:
    pieces = config.stages * config.chunks
    here = list(range(pieces)) if ctx.local else list(config.places.stages_of(ctx.rank % config.stages))
    with logged(config.log, ctx, here) as told:
        return train(config, Heard(told))


def _stage_under_torchrun(ctx: launch.Context, config: TrainConfig) -> StageResult:
    """One stage: reports go to rank 0, where the result is, and events are on its clock."""
    with at_rank_0(ctx) as told:
        result = _stage(told, config)
    if not config.trace:
        return result
    return replace(result, events=shifted(result.events, offset_to_first(config.transfer_timeout)))


def in_this_process(config: TrainConfig) -> bool:
    """Whether a run that torchrun did not start starts no process."""
    return config.transport == "local" or (config.transport == "auto" and config.stages * config.replicas == 1)


def check_start(config: TrainConfig) -> None:
    """Raise ValueError where the options do not fit the processes that there will be."""
    if launch.under_torchrun():
        check_torchrun(config)
    elif config.max_restarts and in_this_process(config):
        raise ValueError(
            f"--max-restarts {config.max_restarts} where all stages run in one process, which nothing starts again: "
            "leave it out, or use several stages and another transport than local"
        )


def check_torchrun(config: TrainConfig) -> None:
    """Raise ValueError where the options do not fit what torchrun started."""
    processes = int(os.environ["WORLD_SIZE"])
    if config.max_restarts:
        raise ValueError(
            f"--max-restarts {config.max_restarts} under torchrun, which starts processes again itself: give it to "
            "torchrun, in front of the program"
        )
    if config.transport == "local":
        raise ValueError("--transport local runs all stages in one process: start it without torchrun")
    wanted = config.stages * config.replicas
    if processes != wanted:
        what = f"{config.stages} stages" + (f" of {config.replicas} replicas" if config.replicas > 1 else "")
        raise ValueError(
            f"torchrun started {processes} processes for {what}: use --nproc-per-node {wanted} "
            f"or --stages {processes // config.replicas or 1}"
        )
