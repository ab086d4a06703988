"""Every schedule of the comparison through the same stages: throughput, bubbles, memory, drift, and what the
simulator had predicted.

Stages are processes over gloo, one thread each; schedules run in alternation. With --emulate-ms a sleep takes the
place of the kernels, so that eight stages fit on two cores. README.md in this folder defines each number.

    python benchmarks/schedules.py --stages 8 --accumulation 4,8,24 --emulate-ms 20,20,20
    python benchmarks/schedules.py --stages 2 --accumulation 4
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from typing import Any

from common import finish, median_spread, positive, print_table
from pipelines import Case, Pipe

import paci_rt
from paci_rt import launch, policies, schedules
from paci_rt.action import Action, Op
from paci_rt.simulate import Costs, Simulation, simulate
from paci_rt.trace import Event
from paci_rt.train.gpt import MODELS

Measured = dict[Case, list[dict[str, Any]]]

ALL = (
    *("1f1b", "gpipe", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p", "async-1f1b", "pipedream"),
    *("pipedream-2bw", "paci", "paci+stash", "paci+2bw", "paci+predict", "paci+recompute"),
)
MOST_ERROR = 0.03
PACI_TO_ZB_2P, PACI_ACTIVATIONS_TO_ZB_2P = 0.99, 0.55


def measure(ctx: launch.Context, cases: list[Case], windows: int, repeats: int) -> Measured:
    """Run by every process: all cases, in alternation; the first round warms up."""
    pipes = {case: Pipe(case, ctx.rank, trace=True) for case in cases}
    results: Measured = defaultdict(list)
    for round_number in range(repeats + 1):
        for case, pipe in pipes.items():
            pipe.schedule.events.clear()
            measured = pipe.measure(windows if round_number else 1)
            if round_number:
                results[case].append({**measured, "events": list(pipe.schedule.events)})
        if ctx.rank == 0:
            ctx.report({"round": round_number})
    return dict(results)


# ------------------------------------------------------------------------------------------------------- prediction


def family_and_shape(case: Case) -> tuple[schedules.ScheduleFamily, schedules.Shape]:
    family = schedules.get(case.schedule)
    shape = schedules.Shape(
        num_stages=case.pieces,
        accumulation=1 if family.one_micro_batch_windows else case.accumulation,
        slack=case.slack,
        chunks=case.chunks,
        costs=schedules.StepCosts() if case.costs is None else case.costs,
    )
    return family, shape


def durations(events: list[Event], pieces: int) -> dict[Op, tuple[float, ...]]:
    """Median seconds of each operation, by stage; operations that did not run are missing."""
    found: dict[tuple[Op, int], list[float]] = defaultdict(list)
    for event in events:
        found[Action.parse(event.action).op, event.stage].append(event.end_s - event.start_s)
    ops = {op for op, _ in found}
    return {op: tuple(statistics.median(found[op, stage]) for stage in range(pieces)) for op in ops}


def hop_seconds(events: list[Event], pieces: int) -> float:
    """Median time from the end of a forward to the start of that of the next stage, where that one was waiting."""
    forward = {(event.stage, event.action): event for event in events if Action.parse(event.action).op is Op.F}
    busy_until: dict[int, float] = defaultdict(float)
    waits = []
    for event in sorted(events, key=lambda one: one.start_s):
        action = Action.parse(event.action)
        before = forward.get((event.stage - 1, str(Action(event.stage - 1, Op.F, action.index))))
        if action.op is Op.F and before is not None and busy_until[event.stage] < before.end_s:
            waits.append(event.start_s - before.end_s)
        busy_until[event.stage] = event.end_s
    assert waits, f"no stage of {pieces} ever waited for a forward"
    return statistics.median(waits)


def predict(case: Case, events: list[Event], hop_s: float, windows: int) -> Simulation:
    """What the simulator says, given how long each operation took in this run and a hop in the run of 1F1B."""
    took = durations(events, case.pieces)
    family, shape = family_and_shape(case)
    zero = tuple(0.0 for _ in range(case.pieces))
    recomputed = case.policy == "recompute"
    whole = took.get(Op.B, zero)
    if recomputed:  # measured with the forward that it repeats, which the simulator adds itself
        whole = tuple(
            backward - (forward if family.in_flight_bound(shape, shape.rank_of(stage)) > 1 else 0.0)
            for stage, (backward, forward) in enumerate(zip(whole, took[Op.F], strict=True))
        )
    costs = Costs(
        forward_s=took[Op.F],
        input_grad_s=took[Op.I] if family.split else whole,
        weight_grad_s=took[Op.W] if family.split else zero,
        update_s=took[Op.U],
        hop_s=hop_s,
    )
    per_step = case.accumulation // shape.accumulation
    return simulate(family, shape, costs, windows=(2 * case.windows_to_steady + windows) * per_step, policy=case.policy)


# ------------------------------------------------------------------------------------------------------------- rows


def summarise(per_rank: list[Measured], windows: int) -> list[dict[str, Any]]:
    """One row a case."""
    by_case = {case: list(zip(*(measured[case] for measured in per_rank), strict=True)) for case in per_rank[0]}
    hops: dict[int, float] = {}
    for case, repeats in by_case.items():
        if case.schedule == "1f1b":
            events = [event for ranks in repeats for rank in ranks for event in rank["events"]]
            hops[case.accumulation] = hop_seconds(events, case.pieces)
    rows = []
    for case, repeats in by_case.items():
        walls = [sum(rank["wall_s"] for rank in ranks) / case.stages for ranks in repeats]
        rates = [windows * case.accumulation / wall for wall in walls]
        busy = [
            sum(rank["compute_s"] for rank in ranks) / case.stages / wall
            for ranks, wall in zip(repeats, walls, strict=True)
        ]
        predicted = [
            predict(case, [event for rank in ranks for event in rank["events"]], hops[case.accumulation], windows)
            for ranks in repeats
        ]
        errors = [sim.micro_batches_per_s / rate - 1 for sim, rate in zip(predicted, rates, strict=True)]
        stats = [rank["stats"] for rank in repeats[0]]
        memory = [parts for one in stats for parts in one["memory"].values()]
        rows.append(
            {
                "schedule": case.label,
                "stages": case.stages,
                "chunks": case.chunks,
                "accumulation": case.accumulation,
                "emulated_ms": case.emulate_ms,
                "micro_batches_per_s": median_spread(rates)[0],
                "predicted_micro_batches_per_s": statistics.median(sim.micro_batches_per_s for sim in predicted),
                "prediction_error": statistics.median(errors),
                "utilization": median_spread(busy)[0],
                "predicted_utilization": statistics.median(sim.steady_utilization for sim in predicted),
                "hop_ms": hops[case.accumulation] * 1e3,
                "peak_activations": max(
                    peak / case.chunks for one in stats for peak in one["peak_rank_in_flight"].values()
                ),
                "peak_stashes": max(peak for one in stats for peak in one["peak_pending"].values()),
                "activation_bytes": max(parts["activations"] for parts in memory),
                "extra_weight_bytes": sum(parts["versions"] for parts in memory),
                "weight_bytes": sum(parts["weights"] for parts in memory),
                "max_drift": max(one["max_drift"] for one in stats),
                "max_delay": max(one["max_delay"] for one in stats),
                "repeats": {"micro_batches_per_s": rates, "utilization": busy, "prediction_error": errors},
            }
        )
    add_ratios(rows)
    return rows


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Throughput over that of 1F1B-flush: median over the repeats, each run beside each."""
    for row in rows:
        (base,) = (r for r in rows if r["schedule"] == "1f1b" and r["accumulation"] == row["accumulation"])
        pairs = zip(row["repeats"]["micro_batches_per_s"], base["repeats"]["micro_batches_per_s"], strict=True)
        row["relative_to_1f1b"] = statistics.median(ours / theirs for ours, theirs in pairs)


def short_of(rows: list[dict[str, Any]], emulated: bool) -> list[str]:
    """What this project asks of itself and did not get."""
    missed = [
        f"prediction for {row['schedule']} at a={row['accumulation']}: off by {row['prediction_error']:+.1%}"
        for row in rows
        if abs(row["prediction_error"]) > MOST_ERROR
    ]
    by_name = {(row["schedule"], row["accumulation"]): row for row in rows}
    for (name, accumulation), paci in by_name.items():
        rival = by_name.get(("zb-2p", accumulation))
        if name != "paci" or rival is None or not emulated:
            continue
        ratio = paci["relative_to_1f1b"] / rival["relative_to_1f1b"]
        least = PACI_TO_ZB_2P if accumulation >= paci["stages"] else 1.0
        if ratio < least:
            missed.append(f"PACI over ZB-2p at a={accumulation}: {ratio:.3f} < {least}")
        share = paci["peak_activations"] / rival["peak_activations"]
        if accumulation >= 2 * paci["stages"] and share > PACI_ACTIVATIONS_TO_ZB_2P:
            missed.append(f"PACI's activations over ZB-2p's at a={accumulation}: {share:.2f}")
    return missed


def report(rows: list[dict[str, Any]]) -> None:
    columns = ["schedule", "a", "over 1f1b", "micro-batches/s", "predicted", "error", "utilization", "activations"]
    columns += ["stashes", "extra weights", "drift", "delay"]
    table = []
    for row in rows:
        extra = row["extra_weight_bytes"] / row["weight_bytes"]
        table.append(
            [
                row["schedule"] + (f" v={row['chunks']}" if row["chunks"] > 1 else ""),
                row["accumulation"],
                row["relative_to_1f1b"],
                row["micro_batches_per_s"],
                row["predicted_micro_batches_per_s"],
                f"{row['prediction_error']:+.1%}",
                row["utilization"],
                f"{row['peak_activations']:g}",
                row["peak_stashes"],
                f"{extra:.2f} x" if extra else "0",
                row["max_drift"],
                row["max_delay"],
            ]
        )
    print_table(columns, table)


# ------------------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=positive, default=2)
    parser.add_argument("--accumulation", type=_list_of(positive), default=[4], help="micro-batches a window")
    parser.add_argument("--schedules", type=_list_of(_schedule), default=list(ALL), help="NAME or NAME+POLICY, ...")
    parser.add_argument("--chunks", type=positive, default=2, help="pieces of the model a stage, for interleaved-1f1b")
    parser.add_argument("--emulate-ms", type=_times, default=None, metavar="F,I,W", help="sleep instead of computing")
    parser.add_argument("--message-bytes", type=positive, default=1024, help="between emulated stages")
    parser.add_argument("--model", choices=sorted(MODELS), default="gpt-mini")
    parser.add_argument("--rows", type=positive, default=2, help="sequences a micro-batch")
    parser.add_argument("--seq-len", type=positive, default=128)
    parser.add_argument("--windows", type=positive, default=4, help="windows a repeat")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--json", default=None)
    return parser.parse_args()


def _list_of(convert: Any) -> Any:
    def parse(text: str) -> list[Any]:
        try:
            return [convert(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _schedule(text: str) -> str:
    name, plus, policy = text.partition("+")
    if plus and policy not in policies.POLICIES:
        raise ValueError(f"unknown policy {policy!r}: choose from {', '.join(policies.POLICIES)}")
    return schedules.get(name).name + plus + policy


def _times(text: str) -> tuple[float, ...]:
    try:
        forward, input_grad, weight_grad = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write F,I,W in milliseconds, for example 20,20,20") from error
    return forward, input_grad, weight_grad


def make_cases(args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """Cases to run, and a line for each that this number of stages and micro-batches does not allow."""
    cases, left_out = [], []
    costs = None
    if args.emulate_ms is not None:
        forward, input_grad, weight_grad = args.emulate_ms
        costs = paci_rt.StepCosts(forward=(forward,), input_grad=(input_grad,), weight_grad=(weight_grad,))
    for accumulation in args.accumulation:
        for label in dict.fromkeys(["1f1b", *args.schedules]):
            name, _, policy = label.partition("+")
            family = schedules.get(name)
            case = Case(
                schedule=name,
                stages=args.stages,
                accumulation=accumulation,
                chunks=args.chunks if family.takes_chunks else 1,
                policy=policy or None,
                costs=costs if family.takes_costs else None,
                model=args.model,
                rows=args.rows,
                seq_len=args.seq_len,
                emulate_ms=args.emulate_ms,
                message_bytes=args.message_bytes,
            )
            try:
                _, shape = family_and_shape(case)
                family.check(shape)
                policies.resolve(family, shape, case.policy)
            except ValueError as error:
                left_out.append(f"{label} at a={accumulation}: {error}")
            else:
                cases.append(case)
    return cases, left_out


def main() -> None:
    args = parse_arguments()
    what = f"model {args.model}, {args.rows} x {args.seq_len} tokens a micro-batch"
    if args.emulate_ms is not None:
        what = "EMULATED compute: sleeps of {:g} ms F, {:g} ms I and {:g} ms W".format(*args.emulate_ms)
    print(
        f"{args.stages} processes over gloo, one thread each; {what}; {args.repeats} repeats of {args.windows} windows"
    )
    cases, left_out = make_cases(args)
    for line in left_out:
        print(f"  left out: {line}")

    rows: list[dict[str, Any]] = []
    for accumulation in args.accumulation:

        def progress(seen: dict[str, Any], accumulation: int = accumulation) -> None:
            print(f"  a={accumulation}: round {seen['round']} of {args.repeats} done", flush=True)

        mine = [case for case in cases if case.accumulation == accumulation]
        per_rank = launch.run(measure, args.stages, (mine, args.windows, args.repeats), threads=1, on_report=progress)
        rows += summarise(per_rank, args.windows)
    report(rows)
    finish("schedules", rows, short_of(rows, args.emulate_ms is not None), args.json)


if __name__ == "__main__":
    main()
