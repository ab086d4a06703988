"""One training run from one config, wherever its stages live."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from paci_rt import launch
from paci_rt.launch.reports import at_rank_0
from paci_rt.train.clocks import offset_to_first, shifted
from paci_rt.train.config import TrainConfig
from paci_rt.train.results import RunResult, StageResult, merge
from paci_rt.train.trainer import preflight, train

MEMORY_PARTS = ("weights", "masters", "optimizer", "accumulators", "versions", "activations", "total")

OnReport = Callable[[dict[str, Any]], None]


def execute(config: TrainConfig, *, on_report: OnReport | None = None) -> RunResult | None:
    """Train as ``config`` says: here with the local transport or one stage, in this process's place under torchrun,
    else in one new process per stage.

    Returns:
        The result; None under torchrun on every rank but 0.

    Raises:
        ValueError: options or data that cannot work; nothing has been started or written then.
        PaciError: the run failed.
    """
    preflight(config)
    if launch.under_torchrun():
        check_torchrun(config)
        results = launch.run_under_torchrun(
            _stage_under_torchrun, (config,), threads=config.threads, on_report=on_report
        )
    elif config.transport == "local" or (config.transport == "auto" and config.stages == 1):
        torch.set_num_threads(config.threads)
        results = [train(config, launch.Context(local=True, on_report=on_report))]
    else:
        results = launch.run(
            _stage, config.stages, (config,), threads=config.threads, port=config.port, on_report=on_report
        )
    return None if results is None else merge(config, results)


def _stage(ctx: launch.Context, config: TrainConfig) -> StageResult:
    return train(config, ctx)


def _stage_under_torchrun(ctx: launch.Context, config: TrainConfig) -> StageResult:
    """One stage: reports go to rank 0, where the result is, and events are on its clock."""
    with at_rank_0(ctx) as told:
        result = _stage(told, config)
    if not config.trace:
        return result
    return replace(result, events=shifted(result.events, offset_to_first(config.transfer_timeout)))


def check_torchrun(config: TrainConfig) -> None:
    """Raise ValueError where the options do not fit what torchrun started."""
    processes = int(os.environ["WORLD_SIZE"])
    if config.transport == "local":
        raise ValueError("--transport local runs all stages in one process: start it without torchrun")
    if processes != config.stages:
        raise ValueError(
            f"torchrun started {processes} processes for {config.stages} stages: use --nproc-per-node {config.stages} "
            f"or --stages {processes}"
        )
