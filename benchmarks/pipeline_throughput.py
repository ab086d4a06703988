"""Which schedule pushes most micro-batches a second through the same stages, and how busy are the stages?

Every case runs in the same processes, one thread a stage, in alternation; medians with the smallest and largest in
brackets. README.md in this folder defines each number.

    python benchmarks/pipeline_throughput.py --stages 2 --accumulation 2,4 --peer torch
    python benchmarks/pipeline_throughput.py --stages 8 --accumulation 8 --emulate-ms 10,20 --slack 0,1
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

from common import finish, list_of, median_spread, positive, print_table
from paci_rt import launch, schedules
from paci_rt.train.gpt import MODELS
from pipelines import PEERS, Case, Pipe

Measured = dict[Case, list[dict[str, Any]]]


def measure(ctx: launch.Context, cases: list[Case], windows: int, repeats: int) -> Measured:
    """Run by every process: all cases, in alternation."""
    pipes = {case: Pipe(case, ctx.rank) for case in cases}
    results: Measured = defaultdict(list)
    for round_number in range(repeats + 1):
        for case, pipe in pipes.items():
            measured = pipe.measure(windows if round_number else 1)
            if round_number:  # the first round warms up
                results[case].append(measured)
        if ctx.rank == 0:
            ctx.report({"round": round_number})
    return dict(results)


def summarise(per_rank: list[Measured], windows: int) -> list[dict[str, Any]]:
    """One row a case: throughput and utilisation of each repeat, averaged over the stages."""
    rows = []
    for case in per_rank[0]:
        repeats = list(zip(*(measured[case] for measured in per_rank), strict=True))
        micro_batches = windows * case.accumulation
        walls = [sum(stage["wall_s"] for stage in stages) / case.stages for stages in repeats]
        busy = [
            sum(stage["compute_s"] for stage in stages) / case.stages / wall
            for stages, wall in zip(repeats, walls, strict=True)
        ]
        nominal = None
        if case.emulate_ms is not None:
            nominal = [micro_batches * sum(case.emulate_ms) / 1e3 / wall for wall in walls]
        rows.append(
            {
                "schedule": case.label,
                "stages": case.stages,
                "accumulation": case.accumulation,
                "slack": case.slack,
                "emulated_ms": case.emulate_ms,
                "message_bytes": case.message_bytes if case.emulate_ms else None,
                "transport": repeats[0][0]["transport"],
                "micro_batches_per_s": median_spread([micro_batches / wall for wall in walls])[0],
                "utilization": None if case.schedule in PEERS else median_spread(busy)[0],
                "nominal_utilization": None if nominal is None else median_spread(nominal)[0],
                "max_drift": max(int(stage["max_drift"]) for stage in repeats[0]),
                "peak_bytes": max(int(stage["peak_weight_and_activation_bytes"]) for stage in repeats[0]),
                "repeats": {"micro_batches_per_s": [micro_batches / wall for wall in walls], "utilization": busy},
            }
        )
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Throughput ratios, repeat by repeat: raw, and with each run's own compute time taken out."""
    by_name = {(row["schedule"], row["accumulation"]): row for row in rows}
    found = []
    for (name, accumulation), row in by_name.items():
        for base_name in ("1f1b", *PEERS):
            base = by_name.get((base_name, accumulation))
            if base is None or base is row or name in PEERS:
                continue
            pairs = list(
                zip(row["repeats"]["micro_batches_per_s"], base["repeats"]["micro_batches_per_s"], strict=True)
            )
            raw = median_spread([ours / theirs for ours, theirs in pairs])
            normalised = None
            if base_name == "1f1b":
                used = zip(row["repeats"]["utilization"], base["repeats"]["utilization"], strict=True)
                normalised = median_spread([ours / theirs for ours, theirs in used])
            limit = None
            if base_name == "1f1b" and not schedules.get(name.split("+")[0]).flush:
                limit = (accumulation + row["stages"] - 1) / accumulation
            entry = {"ratio": f"{name} / {base_name}", "accumulation": accumulation, "limit": limit}
            found.append({**entry, "raw": raw, "normalised": normalised})
    return found


def asked(args: argparse.Namespace) -> dict[tuple[str, int], tuple[float | None, float | None]]:
    """What this project asks of itself, raw and normalised, for the configurations that README.md lists."""
    if args.emulate_ms == (10.0, 20.0) and args.stages == 8:
        return {("paci / 1f1b", 8): (1.84, None)}
    if args.emulate_ms is None and args.stages == 2:
        return {
            ("paci / 1f1b", 2): (1.35, 1.46),
            ("paci / 1f1b", 4): (1.15, 1.23),
            ("1f1b / torch-1f1b", 2): (1.05, None),
            ("1f1b / torch-1f1b", 4): (1.05, None),
            ("paci / torch-1f1b", 2): (1.50, None),
        }
    return {}


def asked_utilization(args: argparse.Namespace) -> dict[str, float]:
    if args.emulate_ms == (10.0, 20.0) and args.stages == 8:
        return {"paci": 0.94, "paci+slack1": 0.97}
    if args.emulate_ms is None and args.stages == 2:
        return {"paci": 0.97}
    return {}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=positive, default=2)
    parser.add_argument("--accumulation", type=list_of(positive), default=[2, 4], help="micro-batches a window")
    parser.add_argument("--schedules", type=list_of(_schedule), default=["1f1b", "paci"])
    parser.add_argument("--slack", type=list_of(int), default=[0], help="in-flight slack of the asynchronous ones")
    parser.add_argument("--emulate-ms", type=_pair, default=None, metavar="F,B", help="sleep instead of computing")
    parser.add_argument("--message-bytes", type=positive, default=1024, help="between emulated stages")
    parser.add_argument(
        "--transport", choices=("auto", "shm", "gloo"), default="auto", help="between paci_rt's stages (torch's: gloo)"
    )
    parser.add_argument("--peer", choices=["torch"], default=None, help="also run torch.distributed.pipelining")
    parser.add_argument("--model", choices=sorted(MODELS), default="gpt-mini")
    parser.add_argument("--rows", type=positive, default=2, help="sequences a micro-batch")
    parser.add_argument("--seq-len", type=positive, default=128)
    parser.add_argument("--windows", type=positive, default=8, help="windows a repeat")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--json", default=None)
    return parser.parse_args()


def _schedule(text: str) -> str:
    return schedules.get(text).name


def _pair(text: str) -> tuple[float, float]:
    try:
        forward, backward = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write F,B in milliseconds, for example 10,20") from error
    return forward, backward


def make_cases(args: argparse.Namespace) -> list[Case]:
    cases = []
    for accumulation in args.accumulation:
        for name in [*args.schedules, *(PEERS if args.peer else ())]:
            slacks = args.slack if name not in PEERS and schedules.get(name).takes_slack else [0]
            cases += [
                Case(
                    schedule=name,
                    stages=args.stages,
                    accumulation=accumulation,
                    slack=slack,
                    model=args.model,
                    rows=args.rows,
                    seq_len=args.seq_len,
                    emulate_ms=args.emulate_ms,
                    message_bytes=args.message_bytes,
                    transport=args.transport,
                )
                for slack in slacks
            ]
    return cases


def main() -> None:
    args = parse_arguments()
    what = f"model {args.model}, {args.rows} x {args.seq_len} tokens a micro-batch"
    if args.emulate_ms is not None:
        what = f"EMULATED compute: sleeps of {args.emulate_ms[0]:g} ms F and {args.emulate_ms[1]:g} ms B"
    how = f"{args.repeats} repeats of {args.windows} windows"
    print(f"{args.stages} processes, one thread each; transport {args.transport}; {what}; {how}")

    def progress(report: dict[str, Any]) -> None:
        print(f"  round {report['round']} of {args.repeats} done", flush=True)

    per_rank = launch.run(
        measure, args.stages, (make_cases(args), args.windows, args.repeats), threads=1, on_report=progress
    )
    rows = summarise(per_rank, args.windows)
    print_table(
        ["schedule", "a", "micro-batches/s", "utilization", "nominal", "max drift", "peak MiB"],
        [
            [
                row["schedule"],
                row["accumulation"],
                row["micro_batches_per_s"],
                "-" if row["utilization"] is None else row["utilization"],
                "-" if row["nominal_utilization"] is None else row["nominal_utilization"],
                row["max_drift"],
                row["peak_bytes"] / 2**20,
            ]
            for row in rows
        ],
    )
    print()
    compared = ratios(rows)
    asks, missed = asked(args), []
    table = []
    for entry in compared:
        raw_ask, normalised_ask = asks.get((entry["ratio"], entry["accumulation"]), (None, None))
        for kind, ask in (("raw", raw_ask), ("normalised", normalised_ask)):
            if entry[kind] is None:
                continue
            middle, low, high = entry[kind]
            limit = "-" if entry["limit"] is None else entry["limit"]
            name = f"{entry['ratio']} ({kind})"
            spread = f"[{low:.3f}, {high:.3f}]"
            table.append([name, entry["accumulation"], middle, spread, "-" if ask is None else ask, limit])
            if ask is not None and middle < ask:
                missed.append(f"{name} at a={entry['accumulation']}: {middle:.3f} < {ask}")
    print_table(["ratio", "a", "median", "spread", "asked", "limit"], table)
    for row in rows:
        ask = asked_utilization(args).get(row["schedule"])
        if ask is not None and row["utilization"] < ask:
            where = f"{row['schedule']} at a={row['accumulation']}"
            missed.append(f"utilization of {where}: {row['utilization']:.3f} < {ask}")
    finish("pipeline_throughput", [*rows, *compared], missed, args.json)


if __name__ == "__main__":
    main()
