"""``paci-rt doctor``."""

from __future__ import annotations

import argparse

from paci_rt.cli import findings, outputs, post_mortem

DESCRIPTION = """\
Show what was built and found on this machine, what is usable, and how to fix what is not. The exit code is 0 if this
machine can train, else 1. No GPU is started.

With --run DIR: read what a run that failed left in its --out, and say what happened: which stage went first, what it
was doing, who waited for it on which edge, and what to do.
"""

JSON_HELP = (
    "write the findings (with --run: folder message guilty stages waits remedy events): "
    "native torch gloo shm cuda nccl triton gpus cores memory_bytes advice usable ..."
)
CANNOT_TRAIN = 1
"""Exit code on a machine that is not ready."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt doctor``."""
    parser.add_argument("--quick", action="store_true", help="do not start the two processes that test gloo")
    parser.add_argument("--run", dest="dead_run", metavar="DIR", help="explain the run that failed and had this --out")


def run(args: argparse.Namespace) -> int:
    """``paci-rt doctor``."""
    outputs.check_file("--json", args.json)
    if args.dead_run is not None:
        told = post_mortem.examine(args.dead_run)
        outputs.write_json(args.json, told)
        print(post_mortem.report_text(told))
        return 0
    found = findings.examine(try_gloo=not args.quick)
    outputs.write_json(args.json, found)
    print(findings.report_text(found))
    return 0 if found["usable"] else CANNOT_TRAIN
