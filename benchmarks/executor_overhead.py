"""What does one action cost, beyond computing? README.md in this folder defines the number.

python benchmarks/executor_overhead.py --stages 4 --accumulation 8
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt
from common import finish, median_spread, positive, print_table
from paci_rt.schedules import Shape, get
from paci_rt.schedules.lowering import Lowering

ASKED_US = 100.0


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output * target).sum()


def bare(stages: list[nn.Module], x: Tensor, y: Tensor, accumulation: int) -> None:
    """The same forwards and backwards, cut at the same places, with nothing in between."""
    for x_part, y_part in zip(x.tensor_split(accumulation), y.tensor_split(accumulation), strict=True):
        hidden, cuts = x_part, []
        for stage in stages:
            inputs = hidden.detach().requires_grad_()
            hidden = stage(inputs)
            cuts.append((inputs, hidden))
        loss = loss_fn(hidden, y_part)
        loss.backward()
        for (_, output), (above, _) in zip(reversed(cuts[:-1]), reversed(cuts[1:]), strict=True):
            output.backward(above.grad)
    for stage in stages:
        for param in stage.parameters():
            param.grad = None


def measure(schedule: str, stages: int, accumulation: int, windows: int, repeats: int) -> dict[str, Any]:
    modules: list[nn.Module] = [nn.Linear(8, 8) for _ in range(stages)]
    plain: list[nn.Module] = [nn.Linear(8, 8) for _ in range(stages)]
    pipe = paci_rt.LocalPipeline(
        modules,
        schedule=schedule,
        n_microbatches=accumulation,
        loss_fn=loss_fn,
        optimizer=lambda params: paci_rt.SGD(params, lr=0.0),
    )
    x, y = torch.randn(accumulation, 8), torch.randn(accumulation, 8)
    lowering = Lowering(family=get(schedule), shape=Shape(num_stages=stages, accumulation=accumulation))
    actions = sum(len(lowering.window(stage, 100, 0)) for stage in range(stages))
    costs = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(windows):
            pipe.step(x, target=y, return_outputs=False)
        piped_s = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(windows):
            bare(plain, x, y, accumulation)
        bare_s = time.perf_counter() - start
        costs.append((piped_s - bare_s) / windows / actions * 1e6)
    middle, low, high = median_spread(costs[1:])
    return {
        "schedule": schedule,
        "stages": stages,
        "accumulation": accumulation,
        "actions_per_window": actions,
        "us_per_action": middle,
        "us_per_action_spread": [low, high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=positive, default=4)
    parser.add_argument("--accumulation", type=positive, default=8)
    parser.add_argument("--windows", type=positive, default=50)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(schedule, args.stages, args.accumulation, args.windows, args.repeats)
        for schedule in ("gpipe", "1f1b", "paci")
    ]
    print_table(
        ["schedule", "stages", "a", "actions per window", "us per action", "asked at most"],
        [
            [
                row["schedule"],
                row["stages"],
                row["accumulation"],
                row["actions_per_window"],
                row["us_per_action"],
                ASKED_US,
            ]
            for row in rows
        ],
    )
    missed = [f"{row['schedule']}: {row['us_per_action']:.1f} us" for row in rows if row["us_per_action"] > ASKED_US]
    finish("executor_overhead", rows, missed, args.json)


if __name__ == "__main__":
    main()
