"""Every schedule of the comparison through the same stages: throughput, bubbles, memory, drift, and what the
simulator had predicted.

Stages are processes, one thread each; schedules run in alternation. With --emulate-ms a sleep takes the place of the
kernels, so that eight stages fit on two cores. README.md in this folder defines each number.

    python benchmarks/schedules.py --stages 8 --accumulation 4,8,24 --emulate-ms 20,20,20
    python benchmarks/schedules.py --stages 2 --accumulation 4
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import paci_rt
from common import finish, integer, list_of, median_spread, positive, print_table
from paci_rt import launch, schedules
from paci_rt.action import Action, Op
from paci_rt.schedules import limits, policies
from paci_rt.schedules.base import check_takes
from paci_rt.simulate import Costs, Simulation, simulate
from paci_rt.trace import Event
from pipelines import Case, Measured, add_options, case_options, describe, measure

ALL = (
    *("1f1b", "gpipe", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p", "async-1f1b", "pipedream"),
    *("pipedream-2bw", "paci", "paci-split", "paci+stash", "paci+2bw", "paci+predict", "paci+recompute"),
    *("interleaved-zb", "looped-bfs", "zb-v", "v-half", "v-min", "dualpipe-v", "paci-v", "paci-v@4.5"),
)
NEAR_S = 2e-3  # what arrived so long ago was there for certain
MOST_ERROR = 0.03
PACI_TO_ZB_2P, PACI_ACTIVATIONS_TO_ZB_2P = 0.99, 0.55


# ------------------------------------------------------------------------------------------------------- prediction


def family_and_shape(case: Case) -> tuple[schedules.ScheduleFamily, schedules.Shape]:
    family = schedules.get(case.schedule)
    shape = schedules.Shape(
        num_stages=case.pieces,
        accumulation=1 if family.one_micro_batch_windows else case.accumulation,
        slack=case.slack,
        chunks=case.chunks,
        placement=family.placement,
        costs=schedules.StepCosts() if case.costs is None else case.costs,
        activation_limit=case.activation_limit,
    )
    return family, shape


@dataclass(frozen=True, kw_only=True)
class Took:
    """How long operations took, by stage, in seconds.

    Attributes:
        mean_s: of each operation; those that did not run are missing. F: without predictions.
        predict_s: what predicting weights added to a forward.
        noise: standard deviation of F, B, I and W over their means, the median of all stages and operations.
    """

    mean_s: dict[Op, tuple[float, ...]]
    predict_s: tuple[float, ...]
    noise: float


def durations(events: list[Event], pieces: int, accumulation: int) -> Took:
    """See :class:`Took`. A forward predicts if its stage still has updates to make before its window's."""
    found: dict[tuple[Op, int], list[float]] = defaultdict(list)
    late: dict[int, list[float]] = defaultdict(list)
    for event in events:
        action, took_s = Action.parse(event.action), event.end_s - event.start_s
        is_late = action.op is Op.F and action.index // accumulation > event.version
        (late[event.stage] if is_late else found[action.op, event.stage]).append(took_s)
    for stage in range(pieces):
        if not found[Op.F, stage]:
            found[Op.F, stage], late[stage] = late[stage], []
    means = {key: statistics.mean(times) for key, times in found.items()}
    spread = [statistics.pstdev(times) / means[key] for key, times in found.items() if key[0] is not Op.U]
    return Took(
        mean_s={op: tuple(means[op, stage] for stage in range(pieces)) for op, _ in means},
        predict_s=tuple(
            max(0.0, statistics.mean(late[stage]) - means[Op.F, stage]) if late[stage] else 0.0
            for stage in range(pieces)
        ),
        noise=statistics.median(spread),
    )


@dataclass(frozen=True, kw_only=True)
class Link:
    """What lies between actions, read off a run of 1F1B; seconds.

    Attributes:
        hop_s: median from the end of an action to the start of the next stage's that was waiting for it.
        between_s: median from the end of an action to the start of the same stage's next one that had all it needs.
    """

    hop_s: float
    between_s: float


def read_link(events: list[Event]) -> Link:
    """See :class:`Link`. ``events`` are those of one run, of all stages."""
    actions = [(Action.parse(event.action), event) for event in sorted(events, key=lambda one: one.start_s)]
    ended = {action: event.end_s for action, event in actions}
    before: dict[int, float] = {}
    hops, gaps = [], []
    for action, event in actions:
        source = Action(action.stage + (-1 if action.op is Op.F else 1), action.op, action.index)
        arrived = ended.get(source, 0.0)
        if action.stage in before:
            if source in ended and before[action.stage] < arrived:
                hops.append(event.start_s - arrived)
            elif action.op is Op.U or before[action.stage] - arrived > NEAR_S:
                gaps.append(event.start_s - before[action.stage])
        before[action.stage] = event.end_s
    return Link(hop_s=statistics.median(hops), between_s=statistics.median(gaps))


def predict(case: Case, events: list[Event], link: Link, windows: int) -> Simulation:
    """What the simulator says, given how long each operation took in this run and what lay between in that of 1F1B."""
    family, shape = family_and_shape(case)
    took = durations(events, case.pieces, shape.accumulation)
    mean_s, zero = took.mean_s, tuple(0.0 for _ in range(case.pieces))
    whole = mean_s.get(Op.B, zero)
    if case.policy == "recompute":  # measured with the forward that it repeats, which the simulator adds itself
        again = [policies.recomputes("recompute", family, shape, shape.rank_of(at)) for at in range(case.pieces)]
        whole = tuple(
            backward - forward * repeats for backward, forward, repeats in zip(whole, mean_s[Op.F], again, strict=True)
        )
    costs = Costs(
        forward_s=_plus(mean_s[Op.F], link.between_s),
        input_grad_s=_plus(mean_s[Op.I] if family.split else whole, link.between_s),
        weight_grad_s=_plus(mean_s[Op.W], link.between_s) if family.split else zero,
        update_s=_plus(mean_s[Op.U], link.between_s),
        predict_s=took.predict_s,
        hop_s=max(0.0, link.hop_s - link.between_s),
        noise=took.noise,
    )
    per_step = case.accumulation // shape.accumulation
    return simulate(
        family,
        shape,
        costs,
        windows=(2 * case.windows_to_steady + windows) * per_step,
        policy=case.policy,
        lookahead=False,
    )


def _plus(seconds: tuple[float, ...], more_s: float) -> tuple[float, ...]:
    return tuple(one + more_s for one in seconds)


# ------------------------------------------------------------------------------------------------------------- rows


def summarise(per_rank: list[Measured], windows: int) -> list[dict[str, Any]]:
    """One row per case."""
    by_case = {case: list(zip(*(measured[case] for measured in per_rank), strict=True)) for case in per_rank[0]}
    base = {case.accumulation: repeats for case, repeats in by_case.items() if case.schedule == "1f1b"}
    links = {
        accumulation: [read_link([event for rank in ranks for event in rank["events"]]) for ranks in repeats]
        for accumulation, repeats in base.items()
    }
    rows = []
    for case, repeats in by_case.items():
        walls = [sum(rank["wall_s"] for rank in ranks) / case.stages for ranks in repeats]
        rates = [windows * case.accumulation / wall for wall in walls]
        busy = [
            sum(rank["compute_s"] for rank in ranks) / case.stages / wall
            for ranks, wall in zip(repeats, walls, strict=True)
        ]
        predicted = [
            predict(case, [event for rank in ranks for event in rank["events"]], link, windows)
            for ranks, link in zip(repeats, links[case.accumulation], strict=True)
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
                "hop_ms": statistics.median(link.hop_s for link in links[case.accumulation]) * 1e3,
                "between_ms": statistics.median(link.between_s for link in links[case.accumulation]) * 1e3,
                "peak_activations": max(
                    peak / case.chunks for one in stats for peak in one["peak_rank_in_flight"].values()
                ),
                "peak_stashes": max(peak for one in stats for peak in one["peak_pending"].values()),
                "activation_limit": case.activation_limit,
                "told_hop_ms": None if case.costs is None else case.costs.hop,
                "activation_bytes": max(map(held_bytes, stats)),
                "extra_weight_bytes": sum(parts["versions"] for parts in memory),
                "weight_bytes": sum(parts["weights"] for parts in memory),
                "max_drift": max(one["max_drift"] for one in stats),
                "max_delay": max(one["max_delay"] for one in stats),
                "repeats": {"micro_batches_per_s": rates, "utilization": busy, "prediction_error": errors},
            }
        )
    add_ratios(rows)
    return rows


def held_bytes(stats: dict[str, Any]) -> int:
    """Most that a process's stages kept together of all micro-batches, between F and I and between I and W."""
    others = sum(parts["total"] - parts["activations"] for parts in stats["memory"].values())
    return int(stats["peak_bytes"] - others)


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
    columns += ["MiB", "stashes", "extra weights", "drift", "delay"]
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
                f"{row['activation_bytes'] / 2**20:.2f}",
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
    parser.add_argument("--accumulation", type=list_of(positive), default=[4], help="micro-batches per window")
    parser.add_argument(
        "--schedules", type=list_of(_schedule), default=list(ALL), help="NAME[@ACTIVATION_LIMIT][+POLICY], ..."
    )
    parser.add_argument("--chunks", type=positive, default=2, help="pieces of the model a stage, for interleaved-1f1b")
    parser.add_argument("--emulate-ms", type=_times, default=None, metavar="F,I,W", help="sleep instead of computing")
    parser.add_argument("--hop-ms", type=float, default=0.0, help="what searched schedules are told of a message")
    parser.add_argument(
        "--activation-bytes", type=integer(0), default=0, help="that an emulated stage keeps of a micro-batch"
    )
    parser.add_argument("--transport", choices=("auto", "shm", "gloo"), default="auto", help="between the stages")
    add_options(parser, windows=4, repeats=3)
    return parser.parse_args()


def _schedule(text: str) -> str:
    name, plus, policy = text.partition("+")
    name, at, limit = name.partition("@")
    limits.check_activation_limit(float(limit) if at else None)
    if plus and policy not in policies.POLICIES:
        raise ValueError(f"unknown policy {policy!r}: choose from {', '.join(policies.POLICIES)}")
    check_takes(schedules.get(name), activation_limit=float(limit) if at else None)
    return schedules.get(name).name + at + limit + plus + policy


def _times(text: str) -> tuple[float, ...]:
    try:
        forward, input_grad, weight_grad = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write F,I,W in milliseconds, for example 20,20,20") from error
    return forward, input_grad, weight_grad


def _costs(args: argparse.Namespace, chunks: int) -> paci_rt.StepCosts | None:
    """Of each of a rank's ``chunks`` pieces, where they are known beforehand."""
    if args.emulate_ms is None:
        return None
    forward, input_grad, weight_grad = ((ms / chunks,) for ms in args.emulate_ms)
    return paci_rt.StepCosts(forward, input_grad, weight_grad, hop=args.hop_ms)


def make_cases(args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """Cases to run, and a line for each that this number of stages and micro-batches does not allow."""
    cases, left_out = [], []
    for accumulation in args.accumulation:
        for label in dict.fromkeys(["1f1b", *args.schedules]):
            name, _, policy = label.partition("+")
            name, _, limit = name.partition("@")
            family = schedules.get(name)
            chunks = args.chunks if family.takes_chunks else family.chunks
            case = Case(
                schedule=name,
                accumulation=accumulation,
                chunks=chunks,
                policy=policy or None,
                costs=_costs(args, chunks) if family.takes_costs else None,
                activation_limit=float(limit) if limit else None,
                activation_bytes=args.activation_bytes,
                **case_options(args),
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
    what = None
    if args.emulate_ms is not None:
        what = "EMULATED compute: sleeps of {:g} ms F, {:g} ms I and {:g} ms W".format(*args.emulate_ms)
    print(describe(args, what))
    cases, left_out = make_cases(args)
    for line in left_out:
        print(f"  left out: {line}")

    rows: list[dict[str, Any]] = []
    for accumulation in args.accumulation:

        def progress(seen: dict[str, Any], accumulation: int = accumulation) -> None:
            print(f"  a={accumulation}: round {seen['round']} of {args.repeats} done", flush=True)

        mine = [case for case in cases if case.accumulation == accumulation]
        todo = (mine, args.windows, args.repeats, True)
        per_rank = launch.run(measure, args.stages, todo, threads=1, on_report=progress)
        rows += summarise(per_rank, args.windows)
    report(rows)
    finish("schedules", rows, short_of(rows, args.emulate_ms is not None), args.json)


if __name__ == "__main__":
    main()
