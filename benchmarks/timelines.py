"""Draws what 1F1B-flush, ZB-2p and PACI really do: an executed run of each, sleeps in place of the kernels.

python benchmarks/timelines.py --stages 4 --accumulation 4 --out docs/timelines.png
"""

from __future__ import annotations

import argparse

from common import positive
from paci_rt import launch
from paci_rt.report import plots
from paci_rt.trace import Event
from pipelines import Case, Pipe

FORWARD_MS, INPUT_GRAD_MS, WEIGHT_GRAD_MS = 10.0, 10.0, 10.0
WINDOWS_SHOWN = 3


def run(ctx: launch.Context, case: Case) -> list[Event]:
    """The executed actions of this process's stage, after warm-up."""
    pipe = Pipe(case, ctx.rank, trace=True)
    for _ in range(8 + WINDOWS_SHOWN):
        pipe.step()
    pipe.schedule.drain()
    return list(pipe.schedule.events)


def lane(name: str, title: str, args: argparse.Namespace) -> plots.Lane:
    case = Case(
        schedule=name,
        stages=args.stages,
        accumulation=args.accumulation,
        emulate_ms=(FORWARD_MS, INPUT_GRAD_MS, WEIGHT_GRAD_MS),
    )
    events = [event for events in launch.run(run, args.stages, (case,)) for event in events]
    # From the moment the first stage starts its fourth window.
    start_s = next(event.start_s for event in events if event.action == f"0F{3 * args.accumulation}")
    return plots.Lane(title=title, events=events, start_s=start_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=positive, default=4)
    parser.add_argument("--accumulation", type=positive, default=4)
    parser.add_argument("--out", default="docs/timelines.png")
    args = parser.parse_args()
    lanes = [
        lane("1f1b", "1F1B with a flush before every update", args),
        lane("zb-2p", "ZB-2p: weight gradients fill the bubbles, with a flush before every update", args),
        lane("paci", "PACI: local updates, no flush", args),
    ]
    times_ms = (FORWARD_MS, INPUT_GRAD_MS, WEIGHT_GRAD_MS)
    flushed_s = (args.accumulation + args.stages - 1) * sum(times_ms) / 1e3
    plots.timeline(args.out, lanes, span_s=(WINDOWS_SHOWN - 0.5) * flushed_s)
    print(
        f"wrote {args.out}: executed between processes, sleeps of {FORWARD_MS:g} ms F, {INPUT_GRAD_MS:g} ms I and "
        f"{WEIGHT_GRAD_MS:g} ms W in place of the kernels"
    )


if __name__ == "__main__":
    main()
