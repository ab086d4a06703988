"""``paci-rt doctor``."""

from __future__ import annotations

import argparse

from paci_rt.cli import findings, outputs

DESCRIPTION = """\
Show what was built and found on this machine, what is usable, and how to fix what is not. The exit code is 0 if this
machine can train, else 1. No GPU is started.
"""

JSON_HELP = "write the findings: native torch gloo shm cuda nccl triton gpus cores memory_bytes advice usable ..."
CANNOT_TRAIN = 1
"""Exit code on a machine that is not ready."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt doctor``."""
    parser.add_argument("--quick", action="store_true", help="do not start the two processes that test gloo")


def run(args: argparse.Namespace) -> int:
    """``paci-rt doctor``."""
    outputs.check_file("--json", args.json)
    found = findings.examine(try_gloo=not args.quick)
    outputs.write_json(args.json, found)
    print(findings.report_text(found))
    return 0 if found["usable"] else CANNOT_TRAIN
