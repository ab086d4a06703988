"""``paci-rt report``: figures and a page from runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from paci_rt.cli import outputs
from paci_rt.cli.options import target_loss
from paci_rt.errors import DataError
from paci_rt.files import reason, replacing
from paci_rt.wording import unknown

DESCRIPTION = """\
Draw loss over tokens, and perplexity over time with the speed-ups at shared losses, from any set of runs; and write one
HTML page that needs nothing else. A RUN is a file of train --json or compare --json, a folder of --out of either, or a
file of --save-trace for the page's timeline.
"""

JSON_HELP = "write what was drawn: runs[] (label seed file), thresholds, baseline, files"
NAMES = ("loss_vs_tokens.png", "perplexity_vs_time.png", "report.html")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt report``."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="files and folders of runs")
    parser.add_argument("--out", required=True, metavar="DIR", help=f"folder for {', '.join(NAMES)}")
    parser.add_argument(
        "--target-loss",
        type=target_loss,
        metavar="X,X,...|auto",
        help="losses at which runs are compared; auto: the lowest round numbers that every run reached (default: auto)",
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="what the others are compared with (default: 1f1b, else the first run's)"
    )


def run(args: argparse.Namespace) -> int:
    """``paci-rt report``."""
    from paci_rt.report import figures, plots
    from paci_rt.report.page import page
    from paci_rt.report.runs import differences, find_runs, grouped
    from paci_rt.report.spread import thresholds

    plots.require_matplotlib()
    outputs.check_folder("--out", args.out)
    outputs.check_file("--json", args.json)
    runs, traces = find_runs(args.runs)
    labels = list(grouped(runs))
    baseline = args.baseline or ("1f1b" if "1f1b" in labels else labels[0])
    if baseline not in labels:
        raise unknown("--baseline", baseline, labels)
    losses = args.target_loss
    if losses is None:
        ends = [(one.evals[0].val_loss, one.evals[-1].val_loss) for one in runs]
        fine = all(value == value and abs(value) != float("inf") for pair in ends for value in pair)
        losses = thresholds(*zip(*ends, strict=True)) if fine else ()
    losses = tuple(sorted(set(losses), reverse=True))
    made = (
        figures.as_png(figures.loss_over_tokens(runs)),
        figures.as_png(figures.perplexity_over_time(runs, losses, baseline)),
        page(runs, traces, losses, baseline).encode(),
    )
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in zip(NAMES, made, strict=True):
            with replacing(folder / name) as stream:
                stream.write(content)
    except OSError as error:
        raise DataError(f"cannot write into --out {folder}: {reason(error)}") from None
    if args.json is not None:
        told = [{"label": one.label, "seed": one.seed, "file": str(one.where)} for one in runs]
        value = {"runs": told, "thresholds": losses, "baseline": baseline, "files": list(NAMES)}
        outputs.ready(args.json).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    if found := differences(runs):
        print(f"paci-rt: these runs differ in more than their schedules: {', '.join(found)}", file=sys.stderr)
    print(f"{folder / NAMES[-1]} shows {len(runs)} runs of {', '.join(labels)}, with {', '.join(NAMES[:-1])} beside it")
    return 0
