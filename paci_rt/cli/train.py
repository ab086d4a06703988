"""``paci-rt train``."""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from paci_rt.cli import environment, outputs
from paci_rt.cli.options import ConfigOptions, add_pipeline, add_training
from paci_rt.report import text

if TYPE_CHECKING:
    from paci_rt.train.results import RunResult

DESCRIPTION = """\
Train a language model through a pipeline. Every stage runs in its own process. This command starts the processes, or
torchrun does: torchrun --nproc-per-node 2 -m paci_rt train ...

--batch-size counts the sequences of one local update. They are cut into --accumulation micro-batches, so that runs with
different schedules and accumulations see the same number of tokens per update.
"""

JSON_HELP = (
    "write the result: schedule stages accumulation steps tokens train_loss val_loss wall_s tokens_per_s utilization "
    "max_drift drift_bound peak_memory_bytes params_sha256, and the curves"
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt train``."""
    from paci_rt.cli import layers
    from paci_rt.schedules import FAMILIES

    layers.add(parser)
    options = ConfigOptions(parser)
    options.group("pipeline")
    options.add("schedule", str, "NAME", ", ".join(FAMILIES))
    add_pipeline(options)
    add_training(options)
    options.group("results")
    options.add("out", str, "DIR", "save a checkpoint in this folder at the end")
    options.add("save_interval", int, "N", "save a checkpoint also every N local updates; 0: only at the end")
    options.add("keep_checkpoints", int, "N", "how many checkpoints stay in that folder, the last ones")
    options.switch(
        "gather_checkpoints",
        "rank 0 writes the files of all stages, for hosts without a common file system; copy the folder to all of them "
        "before --resume",
    )
    options.switch(
        "async_checkpoint",
        "a thread writes the checkpoints of --save-interval while training goes on, from a copy of the state (default, "
        "unless they are gathered)",
    )
    options.add(
        "resume",
        str,
        "DIR",
        "continue from the checkpoint in this folder, or from an older one in it (DIR/index-00000200.json); stages and "
        "schedule may differ from the run that saved it",
    )
    options.add(
        "log", str, "DIR", "structured logs: a file of JSON lines per process, with rank, stages, phase and action"
    )
    options.add(
        "log_interval",
        int,
        "N",
        "local updates between two lines of log.jsonl, which is in DIR of --log or "
        "else of --out (default: so many that there are at most 10,000)",
    )
    options.switch("tensorboard", "write the same numbers for TensorBoard, into the folder tensorboard beside it")
    options.switch("wandb", "send the same numbers to Weights & Biases, project paci-rt")
    options.add(
        "max_restarts",
        int,
        "N",
        "start all stages again after a failure, at most so often, from the last "
        "checkpoint that this run has saved into --out",
    )
    parser.add_argument("--save-trace", metavar="FILE", help="write all executed actions, to open at ui.perfetto.dev")


def run(args: argparse.Namespace) -> int:
    """``paci-rt train``."""
    from paci_rt import launch
    from paci_rt.cli import layers
    from paci_rt.cli.progress import Progress
    from paci_rt.report.machine import machine
    from paci_rt.report.runs import RESULT
    from paci_rt.trace import write_perfetto
    from paci_rt.train.run import check_torchrun, execute

    environment.check_torchrun_variables()
    more: dict[str, Any] = {"trace": True} if args.save_trace is not None else {}
    beneath: dict[str, Any] = {"stages": int(os.environ["WORLD_SIZE"])} if launch.under_torchrun() else {}
    config = layers.resolved(args, beneath=beneath, more=more)
    if launch.under_torchrun():
        check_torchrun(config)
        if waits := environment.started_by_hand():
            print(f"paci-rt: {waits}", file=sys.stderr)
    outputs.check_file("--json", args.json)
    outputs.check_file("--save-trace", args.save_trace)
    outputs.check_folder("--out", config.out)
    outputs.check_folder("--log", config.log)
    if args.recipe is not None and config.data is None and os.environ.get("RANK", "0") == "0":
        said = "without --data the bytes of Python's own library are trained on; paci-rt prepare makes tokens of a text"
        print(f"paci-rt: --recipe {args.recipe} has no data: {said}", file=sys.stderr)
    with Progress(config.schedule) as progress:
        result = execute(config, on_report=progress)
    if result is None:
        return 0
    if args.save_trace is not None:
        write_perfetto(outputs.ready(args.save_trace), result.events)
    told = {**result.to_json(), "machine": machine()}
    outputs.write_json(args.json, told)
    if config.out is not None:
        outputs.write_json(os.path.join(config.out, RESULT), told)
    print(report_text(result))
    return 0


def report_text(result: RunResult) -> str:
    """The end of ``paci-rt train``: results, and a row per stage with its drift as counted."""
    from paci_rt.train.run import MEMORY_PARTS

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
{safety_line(result)}  peak memory      {text.size(result.peak_memory_bytes)} on the largest stage
  params_sha256    {result.params_sha256}

{text.table(header, rows)}"""


def safety_line(result: RunResult) -> str:
    """What became of gradients that were not finite, stood out or were clipped; empty where there were none."""
    counts = {
        "skipped": result.skipped_windows,
        "not finite": result.nonfinite_windows,
        "spikes": result.spiked_windows,
        "taken back": result.taken_back_windows,
        "clipped": result.clipped_windows,
    }
    found = [f"{max(by_stage.values())} {name}" for name, by_stage in counts.items() if any(by_stage.values())]
    return f"  windows          {', '.join(found)}\n" if found else ""
