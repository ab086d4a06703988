"""``paci-rt calibrate``: what late gradients cost in tokens, on the user's own model cut small."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from paci_rt.cli import outputs
from paci_rt.cli.options import integers, numbers
from paci_rt.report import text

DESCRIPTION = """\
Measure the token overhead of PACI: how many times the tokens of 1F1B-flush it needs to end at the same validation loss,
each with its own full learning-rate schedule. The model is cut small: a few narrow blocks of its family, one per stage,
trained on your data in this one process. What is found goes into a table for paci-rt plan --token-overhead.

Some 50 short runs make one row at two rates, with a 95 % interval over the seeds. Those that are done are kept beside
the table, so an interrupted calibration goes on where it was. A small model's overhead stands for a large one's only as
far as share, delay and optimizer decide it.
"""

JSON_HELP = (
    "write what was measured: rows[] (each optimizer lookahead delay share f f_low f_high at rate seeds) notes[]"
)


# fmt: off
def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt calibrate``."""
    from paci_rt.train.calibrate import Calibration
    from paci_rt.train.config import OPTIMIZERS
    from paci_rt.train.families import MODELS

    def option(group: Any, name: str, kind: Any, metavar: str, words: str) -> None:
        group.add_argument("--" + name, type=kind, metavar=metavar, help=words)

    defaults = Calibration.__dataclass_fields__
    parser.add_argument("--out", required=True, metavar="FILE", help="the table; rows of other calibrations stay")
    group = parser.add_argument_group("pipeline")
    group.add_argument("--stages", type=int, metavar="P", required=True, help="pipeline stages")
    option(group, "accumulation", integers, "A,A,...", "micro-batches per update, to measure (default: the stages)")
    group.add_argument("--lookahead", action=argparse.BooleanOptionalAction, help="measure PACI with look-ahead or "
                       "without only (default: with)")
    group = parser.add_argument_group("model and data")
    option(group, "model", str, "NAME", f"{', '.join(MODELS)} (default: gpt-tiny)")
    option(group, "layers", int, "N", "blocks that are left of it (default: one per stage)")
    option(group, "width", int, "N", "width that is left of it (default: 64)")
    option(group, "heads", int, "N", "attention heads (default: 4)")
    option(group, "data", str, "PATH", "as for paci-rt train (default: Python's own library)")
    option(group, "seq-len", int, "N", f"tokens per sequence (default: {defaults['seq_len'].default})")
    option(group, "batch-size", int, "N", f"sequences per update (default: {defaults['batch_size'].default})")
    group = parser.add_argument_group("runs")
    option(group, "optimizer", str, "NAME", f"{', '.join(OPTIMIZERS)} (default: adamw)")
    option(group, "updates", int, "N", f"of the shortest runs (default: {defaults['updates'].default})")
    option(group, "rates", numbers, "X,X,...", "learning rates to choose the best from (default: 1e-3,2e-3,4e-3; lion "
           "a fifth, sgd a hundred times that)")
    option(group, "seeds", integers, "N,N,...", "of the rows (default: 1,2,3,4,5)")
    option(group, "pilot-seeds", integers, "N,N,...", "that choose the rates (default: 101,102)")
    option(group, "threads", int, "N", "compute threads (default: 1)")
# fmt: on


def run(args: argparse.Namespace) -> int:
    """``paci-rt calibrate``."""
    from paci_rt.planner.token_overhead import load_overheads
    from paci_rt.train.calibrate import Calibration, Calibrator, FinishedRuns, merged

    outputs.check_file("--json", args.json)
    outputs.check_file("--out", args.out)
    names = ["model", "layers", "width", "heads", "data", "seq_len", "batch_size", "optimizer", "updates", "rates"]
    names += ["seeds", "pilot_seeds", "threads"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.lookahead is not None:
        given["lookahead"] = (args.lookahead,)
    plan = Calibration(stages=args.stages, accumulations=args.accumulation or (args.stages,), **given)
    out = Path(args.out)
    old = load_overheads(out) if out.exists() and out.stat().st_size else None
    runs = FinishedRuns(out.with_name(out.name + ".runs.jsonl"))
    calibrator = Calibrator(plan, runs, lambda line: print(line, flush=True))
    rows = calibrator.rows()
    table = merged(old, rows)
    outputs.write_json(args.out, table.to_json())
    outputs.write_json(args.json, {"rows": table.to_json()["rows"][: len(rows)], "notes": calibrator.notes})
    cells = []
    for row in rows:
        f = "-" if row.f is None else f"{row.f:.3f}"
        low, high = ("?" if bound is None else f"{bound:.3f}" for bound in (row.f_low, row.f_high))
        interval = row.why if row.f is None else f"{low} to {high}"
        ahead = "look-ahead" if row.lookahead else "none"
        cells.append(
            (str(row.accumulation), ahead, str(row.delay), f"{row.share:.3f}", row.at, f"{row.rate:g}", f, interval)
        )
    print(f"Token overhead of PACI over 1f1b, {plan.optimizer}, {calibrator.label}, {plan.stages} stages")
    print(text.table(("a", "ahead", "delay", "share", "at", "rate", "f", "95 %"), cells))
    for note in calibrator.notes:
        print(note)
    print(f"Wrote {args.out}: give it to paci-rt plan --token-overhead {args.out}")
    return 0
