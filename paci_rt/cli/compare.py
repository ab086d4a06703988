"""``paci-rt compare``: time to accuracy of several schedules."""

from __future__ import annotations

import argparse

from paci_rt.cli import environment, outputs
from paci_rt.cli.options import ConfigOptions, add_pipeline, add_training, config_options, names, target_loss

DESCRIPTION = """\
Train the same model on the same data under several schedules, one run after another, and report which schedule reached
the target loss first. --out DIR writes report.md, loss_vs_tokens.png, loss_vs_time.png, timeline.png and one
trace-SCHEDULE.json per schedule, to open at ui.perfetto.dev.
"""

JSON_HELP = (
    "write the result: runs[] (each with the keys of train --json, time_to_target_s and tokens_to_target), "
    "target_loss, speedup_vs: {A: {B: how many times as fast as A schedule B reached the target}}, "
    "speedup_spread_vs: the same with low, high (95 %%), seeds and differs, and iso_loss: a row for each threshold and "
    "schedule"
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt compare``."""
    from paci_rt.schedules import FAMILIES

    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--schedules",
        type=names,
        default=("paci", "1f1b"),
        metavar="NAME,NAME,...",
        help=f"any of {', '.join(FAMILIES)} (default: paci,1f1b)",
    )
    group.add_argument(
        "--target-loss",
        type=target_loss,
        default=None,
        metavar="X,X,...|auto",
        help="validation losses to reach, in nats per token, of which the lowest is the target; auto: the lowest round "
        "numbers that every run reached (default: auto)",
    )
    group.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="runs per schedule, with the seeds --seed, --seed + 1 ... (default: 1)",
    )
    group.add_argument("--out", metavar="DIR", help="folder for the report, the plots and the traces")
    options = ConfigOptions(parser)
    options.group("pipeline")
    add_pipeline(options)
    add_training(options)


def run(args: argparse.Namespace) -> int:
    """``paci-rt compare``."""
    from paci_rt import launch
    from paci_rt.cli.progress import Progress
    from paci_rt.report import plots
    from paci_rt.train import compare
    from paci_rt.train.config import TrainConfig
    from paci_rt.train.results import RunResult
    from paci_rt.train.run import execute

    environment.check_torchrun_variables()
    if launch.under_torchrun():
        raise ValueError("compare starts the stages of every run itself: start it without torchrun")
    folder = args.out
    options = {**config_options(args), "out": None, "trace": folder is not None}
    configs = compare.plan(args.schedules, args.seeds, options)
    outputs.check_file("--json", args.json)
    outputs.check_folder("--out", folder)
    if folder is not None:
        plots.require_matplotlib()

    def execute_one(config: TrainConfig, label: str) -> RunResult:
        with Progress(label) as progress:
            result = execute(config, on_report=progress)
        assert result is not None
        return result

    comparison = compare.compare(configs, target_loss=args.target_loss, execute=execute_one)
    written = compare.write_report(folder, comparison) if folder is not None else []
    outputs.write_json(args.json, comparison.to_json())
    print(f"\n{compare.summary_table(comparison)}\n")
    if comparison.thresholds:
        print(f"{compare.iso_loss_table(comparison)}\n")
    print(compare.verdict(comparison))
    if written:
        print(f"\n{written[0]} has the whole report, with {', '.join(path.name for path in written[1:])} beside it.")
    return 0
