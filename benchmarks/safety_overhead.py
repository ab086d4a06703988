"""What do detection of numbers that are not finite, and clipping by the norm of all stages, cost?

python benchmarks/safety_overhead.py --model gpt-tiny

README.md in this folder defines the number.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import nn

import paci_rt
from common import finish, positive, print_table
from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.optim.take_back import UpdateHistory
from paci_rt.runtime.guard import Guard
from paci_rt.train.gpt import MODELS, build_stage, cross_entropy

ASKED_PERCENT = 1.0
NEVER, ALWAYS = 1e6, 1e-3
"""Largest norms that no gradient reaches, and that each one exceeds."""

CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "raise": {"on_nonfinite": "raise"},
    "raise, clip at 1e6": {"on_nonfinite": "raise", "max_grad_norm": NEVER},
    "raise, clip at 1e-3": {"on_nonfinite": "raise", "max_grad_norm": ALWAYS},
    "skip-window, clip at 1e6": {"on_nonfinite": "skip-window", "max_grad_norm": NEVER},
}
ASKED = ("raise", "raise, clip at 1e6", "raise, clip at 1e-3")


def make(model: str, schedule: str, accumulation: int, options: dict[str, Any]) -> paci_rt.LocalPipeline:
    config = MODELS[model]
    modules: list[nn.Module] = [build_stage(config, at, 2, seed=0) for at in range(2)]
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule=schedule,
        n_microbatches=accumulation,
        loss_fn=cross_entropy,
        optimizer=lambda params: paci_rt.AdamW(params, lr=1e-4),
        **options,
    )
    if not options:
        for runtime in pipe._executor.runtimes.values():
            runtime.guard = None
    return pipe


class Meter:
    """CPU seconds of this thread within the calls that detection and clipping add, without what they call anyway."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for owner, name in (
            *((Guard, name) for name in ("after_backward", "_decide", "attach", "detach", "settle", "settled")),
            (StageOptimizer, "_scale"),
            (UpdateHistory, "keep"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), 1.0))
        StageOptimizer.seal_window = self._timed(StageOptimizer.seal_window, -1.0, within=Guard)  # type: ignore

    def _timed(self, call: Any, sign: float, within: Any = None) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.thread_time()
            inside = within is None or self.depth > 0
            self.depth += within is None
            try:
                return call(*args, **options)
            finally:
                self.depth -= within is None
                self.seconds += sign * (time.thread_time() - start) * inside

        return timed

    depth = 0


def measure(model: str, schedule: str, args: argparse.Namespace, meter: Meter) -> list[dict[str, Any]]:
    """CPU seconds of a step in each case, one case after the other, as many rounds as asked."""
    pipes = {name: make(model, schedule, args.accumulation, options) for name, options in CASES.items()}
    x = torch.randint(256, (args.batch_size, args.seq_len))
    y = torch.randint(256, (args.batch_size, args.seq_len))
    taken: dict[str, list[float]] = {name: [] for name in CASES}
    added: dict[str, list[float]] = {name: [] for name in CASES}
    for round_ in range(args.rounds + 2):
        names = list(CASES) if round_ % 2 else list(reversed(CASES))
        for name in names:
            start, meter.seconds = time.process_time(), 0.0
            pipes[name].step(x, target=y, return_outputs=False)
            if round_ >= 2:
                taken[name].append(time.process_time() - start)
                added[name].append(meter.seconds)
    rows = []
    for name, seconds in taken.items():
        rows.append(
            {
                "model": model,
                "schedule": schedule,
                "case": name,
                "cpu_ms_per_step": statistics.median(seconds) * 1e3,
                "added_ms_per_step": statistics.median(added[name]) * 1e3,
                "added_percent": 100 * statistics.median(a / b for a, b in zip(added[name], seconds, strict=True)),
                "over_nothing_percent": 100
                * (statistics.median(a / b for a, b in zip(seconds, taken["nothing"], strict=True)) - 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="gpt-tiny")
    parser.add_argument("--schedules", default="paci,1f1b")
    parser.add_argument("--accumulation", type=positive, default=4)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--seq-len", type=positive, default=128)
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    meter = Meter()
    rows = [row for schedule in args.schedules.split(",") for row in measure(args.model, schedule, args, meter)]
    columns = ("schedule", "case", "cpu_ms_per_step", "added_ms_per_step", "added_percent", "over_nothing_percent")
    print_table(columns, [[row[column] for column in columns] for row in rows])
    missed = [
        f"{row['schedule']}, {row['case']}: {row['added_percent']:.2f} %"
        for row in rows
        if row["case"] in ASKED and row["added_percent"] > ASKED_PERCENT
    ]
    finish("safety_overhead", rows, missed, args.json)


if __name__ == "__main__":
    main()
