"""``paci-rt simulate --frontier``: what activations buy, in a V and in a line."""

from __future__ import annotations

import argparse

from paci_rt.cli import outputs
from paci_rt.planner import FrontierPoint, frontier
from paci_rt.report import text
from paci_rt.schedules import ScheduleFamily, Shape
from paci_rt.simulate import Costs

_OF_ONE = ("plot", "trace", "activation_limit", "policy", "lookahead", "grid")


def run(args: argparse.Namespace, family: ScheduleFamily, shape: Shape, costs: Costs, *, line: Costs | None) -> int:
    """Print the table and write ``--json``: ``rows``, ``ranks`` and ``accumulation``. ``line``: costs of its stages."""
    if not family.takes_activation_limit:
        raise ValueError(f"--frontier is of schedules with an activation limit, and {family.name} has none: use paci-v")
    for name in _OF_ONE:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} is for one order and --frontier shows many: leave one out")
    points = frontier(shape.ranks, shape.accumulation, costs, line=line, windows=args.windows)
    outputs.write_json(
        args.json,
        {"ranks": shape.ranks, "accumulation": shape.accumulation, "rows": [one.to_json() for one in points]},
    )
    print(table(points))
    return 0


def table(points: tuple[FrontierPoint, ...]) -> str:
    """A row a point; those that no other beats in activations and utilization have a star."""
    header = ["", "activations", "utilization", "micro-batches/s", "stashes", "max drift", "max delay", "schedule"]
    rows = [
        [
            "" if one.dominated else "*",
            f"{one.activations:g}",
            f"{one.utilization:.4f}",
            f"{one.micro_batches_per_s:.5g}",
            f"{one.stashes:g}",
            str(one.drift),
            str(one.delay),
            one.label,
        ]
        for one in points
    ]
    note = "activations and stashes in whole stages (a rank's share of the model); * nothing else is better in both"
    if not all(one.steady for one in points):
        note += "\nnumbers of the whole run, where it had no steady part: give more --windows, or leave it out"
    return text.table(header, rows) + "\n" + note
