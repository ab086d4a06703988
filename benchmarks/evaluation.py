"""What does a validation cost, beyond its own forwards: among the training, or after a drain?

Stages sleep in place of computing, so that nothing but the order of work counts. README.md in this folder defines the
numbers.

    python benchmarks/evaluation.py --stages 4 --accumulation 4 --emulate-ms 10,20
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist

from common import finish, list_of, median_spread, positive, print_table
from paci_rt import launch
from pipelines import Case, Pipe

ASKED_SHARE = 0.02
WAYS = ("none", "among", "drained")


def seconds(pipe: Pipe, windows: int, every: int, way: str) -> float:
    """Of ``windows`` windows with a validation of one batch before every ``every``-th; all stages together."""
    dist.barrier()
    begin = time.perf_counter()
    args = (pipe.x,) if pipe.is_first else ()
    target = pipe.y if pipe.is_last else None
    for k in range(windows):
        if way != "none" and k % every == 0 and k:
            losses: list[torch.Tensor] = []
            pipe.schedule.eval(*args, target=target, losses=losses, return_outputs=False, drained=way == "drained")
        pipe.step()
    pipe.schedule.drain()
    dist.barrier()
    return time.perf_counter() - begin


def stage(ctx: launch.Context, case: Case, windows: int, every: int, repeats: int) -> list[dict[str, float]]:
    """Every way in turn, some times over."""
    pipe = Pipe(case, ctx.rank)
    for way in WAYS:
        seconds(pipe, every + 1, every, way)
    found = [{way: seconds(pipe, windows, every, way) for way in WAYS} for _ in range(repeats)]
    pipe.schedule.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--schedules", type=list_of(str), default=["paci", "1f1b"])
    parser.add_argument("--stages", type=positive, default=4)
    parser.add_argument("--accumulation", type=positive, default=4)
    parser.add_argument("--emulate-ms", type=list_of(float), default=[10.0, 20.0], metavar="F,B")
    parser.add_argument("--windows", type=positive, default=20)
    parser.add_argument("--every", type=positive, default=4)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    validations = len([k for k in range(args.windows) if k % args.every == 0 and k])
    own_s = validations * args.accumulation * args.emulate_ms[0] / 1e3  # each stage's own forwards
    rows, missed = [], []
    for schedule in args.schedules:
        case = Case(
            schedule=schedule,
            stages=args.stages,
            accumulation=args.accumulation,
            emulate_ms=tuple(args.emulate_ms),
        )
        found = launch.run(stage, args.stages, (case, args.windows, args.every, args.repeats))[0]
        for way in WAYS:
            lost = [(one[way] - (own_s if way != "none" else 0.0)) / one["none"] - 1 for one in found]
            share = median_spread(lost)
            rows.append({"schedule": schedule, "validation": way, "lost_share": share})
            rows[-1]["seconds"] = median_spread([one[way] for one in found])
            if way == "among" and share[0] > ASKED_SHARE:
                missed.append(f"{schedule}: validation among training takes {share[0]:.1%} of throughput")
    columns = ("schedule", "validation", "seconds", "throughput lost", "from", "to")
    table = [(row["schedule"], row["validation"], row["seconds"][0], *row["lost_share"]) for row in rows]
    print_table(columns, table)
    finish("evaluation", rows, missed, args.json)


if __name__ == "__main__":
    main()
