"""One training run from one config, wherever its stages live."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch

from paci_rt import launch
from paci_rt.train import text
from paci_rt.train.config import TrainConfig
from paci_rt.train.results import RunResult, StageResult, merge
from paci_rt.train.trainer import preflight, train

MEMORY_PARTS = ("weights", "masters", "optimizer", "accumulators", "versions", "activations", "total")
OnReport = Callable[[dict[str, Any]], None]


def execute(config: TrainConfig, *, on_report: OnReport | None = None) -> RunResult | None:
    """Train as ``config`` says: here with the local transport or one stage, in this process's place under torchrun,
    else in one new process a stage.

    Returns:
        The result; None under torchrun on every rank but 0.

    Raises:
        ValueError: options or data that cannot work; nothing has been started or written then.
        PaciError: the run failed.
    """
    preflight(config)
    if launch.under_torchrun():
        check_torchrun(config)
        results = launch.run_under_torchrun(_stage, (config,), threads=config.threads, on_report=on_report)
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


def report_text(result: RunResult) -> str:
    """The end of ``paci-rt train``: results, and a row a stage with its drift as counted."""
    perplexity = math.exp(result.val_loss) if result.val_loss < 700 else math.inf
    rows = []
    for stage, memory in result.memory.items():
        counts = sorted((int(drift), count) for drift, count in result.drift[stage].items())
        rows.append(
            (
                str(stage),
                ", ".join(f"{drift}: {count:,}" for drift, count in counts),
                str(result.peak_in_flight[stage]),
                *(text.size(memory[part]) for part in MEMORY_PARTS),
            )
        )
    policy = "" if result.policy == "bounded" else f" ({result.policy})"
    over = "" if result.transport == "local" else f", stages over {result.transport}"
    took = f"{text.seconds(result.wall_s)} of training{over}"
    header = ("stage", "micro-batches by drift", "in flight", *MEMORY_PARTS)
    return f"""
{result.schedule}{policy}: {result.steps} steps, {result.tokens:,} tokens, {took}
  training loss    {result.train_loss:.4f}
  validation loss  {result.val_loss:.4f} nats per token, perplexity {perplexity:.4g}
  throughput       {result.tokens_per_s:,.0f} tokens/s at {text.share(result.utilization)} utilization
  drift            at most {result.max_drift}, bound {result.drift_bound}; delay at most {result.max_delay}
  peak memory      {text.size(result.peak_memory_bytes)} on the largest stage
  params_sha256    {result.params_sha256}

{text.table(header, rows)}"""
