"""Which schedule pushes most micro-batches per second through the same stages, and how busy are the stages?

Every case runs in the same processes, one thread a stage, in alternation; medians with the smallest and largest in
brackets. README.md in this folder defines each number.

    python benchmarks/pipeline_throughput.py --stages 2 --accumulation 2,4 --peer torch
    python benchmarks/pipeline_throughput.py --stages 8 --accumulation 8 --emulate-ms 10,20 --slack 0,1
    python benchmarks/pipeline_throughput.py --stages 8 --accumulation 8 --emulate-ms 10,20 --hop-ms 5 --slack 0,auto
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import replace
from typing import Any

from common import finish, list_of, median_spread, positive, print_table
from paci_rt import launch, schedules
from paci_rt.profiling.link import SMALL_BYTES, measure_link
from paci_rt.schedules.slack import check_slack
from peers import FUSED, PEERS, TORCHS, name_of
from pipelines import Case, Measured, add_options, case_options, describe, measure

LARGE_BYTES = 4 << 20
LARGE_UTILIZATION, LARGE_EXPOSED_PERCENT = 0.95, 3.0


def summarise(per_rank: list[Measured], windows: int) -> list[dict[str, Any]]:
    """One row per case: throughput and utilisation of each repeat, averaged over the stages."""
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
                "hop_ms": case.hop_ms,
                "emulated_ms": case.emulate_ms,
                "message_bytes": case.message_bytes if case.emulate_ms else None,
                "transport": repeats[0][0]["transport"],
                "micro_batches_per_s": median_spread([micro_batches / wall for wall in walls])[0],
                "utilization": None if case.schedule in PEERS else median_spread(busy)[0],
                "nominal_utilization": None if nominal is None else median_spread(nominal)[0],
                "exposed_comm_percent": None if case.schedule in PEERS else exposed_comm_percent(repeats),
                "max_drift": max(int(stage["max_drift"]) for stage in repeats[0]),
                "peak_activations": max(
                    (peak for stage in repeats[0] for peak in stage["stats"].get("peak_in_flight", {}).values()),
                    default=None,
                ),
                "peak_bytes": max(int(stage["peak_weight_and_activation_bytes"]) for stage in repeats[0]),
                "repeats": {"micro_batches_per_s": [micro_batches / wall for wall in walls], "utilization": busy},
            }
        )
    _add_zero_latency(rows, list(per_rank[0]))
    return rows


def exposed_comm_percent(repeats: list[tuple[dict[str, Any], ...]]) -> float:
    """Exposed communication over compute, both of a mean micro-batch and stage; median of the repeats."""
    shares = [
        sum(stage["exposed_comm_s"] for stage in one) / sum(stage["compute_s"] for stage in one) for one in repeats
    ]
    return 100 * statistics.median(shares)


def _add_zero_latency(rows: list[dict[str, Any]], cases: list[Case]) -> None:
    """Throughput over that of the same schedule in the strict order with no latency, repeat by repeat."""
    row_of = dict(zip(cases, rows, strict=True))
    for case, row in row_of.items():
        base = row_of.get(replace(case, slack=0, hop_ms=0.0))
        row["over_zero_latency"] = None
        if base is not None and base is not row:
            pairs = zip(row["repeats"]["micro_batches_per_s"], base["repeats"]["micro_batches_per_s"], strict=True)
            row["over_zero_latency"] = median_spread([ours / theirs for ours, theirs in pairs])


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Throughput ratios, repeat by repeat: raw, and with each run's own compute time taken out."""
    by_name = {(row["schedule"], row["accumulation"]): row for row in rows}
    found = []
    for (name, accumulation), row in by_name.items():
        bases = dict.fromkeys(("1f1b", "torch-1f1b", FUSED, f"torch-{name}"))
        for base_name in bases if not row["hop_ms"] else ():
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
    if _emulated(args):
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
    if _emulated(args):
        return {"paci": 0.94, "paci+slack1": 0.97}
    if args.emulate_ms is None and args.stages == 2:
        return {"paci": 0.97}
    return {}


def _emulated(args: argparse.Namespace, *, large: bool = False) -> bool:
    """Whether these are the 8 stages of 10 and 20 ms of which something is asked, with small or large messages."""
    stages = args.emulate_ms in ((10.0, 20.0), (10.0, 10.0, 10.0)) and args.stages == 8
    return stages and large == (args.message_bytes >= LARGE_BYTES)


def short_with_large_messages(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """What PACI lacks with large messages through shared memory, at the best slack of those that ran."""
    if not _emulated(args, large=True):
        return []
    shared = [row for row in rows if row["schedule"].startswith("paci") and row["transport"] == "shm"]
    missed = []
    for accumulation in args.accumulation:
        ours = [row for row in shared if row["accumulation"] == accumulation]
        if not ours:
            continue
        utilization = max(row["utilization"] for row in ours)
        exposed = min(row["exposed_comm_percent"] for row in ours)
        if utilization < LARGE_UTILIZATION:
            missed.append(f"utilization of paci at a={accumulation}: {utilization:.3f} < {LARGE_UTILIZATION}")
        if exposed > LARGE_EXPOSED_PERCENT:
            missed.append(f"exposed % of paci at a={accumulation}: {exposed:.2f} > {LARGE_EXPOSED_PERCENT}")
    return missed


def asked_over_zero_latency(args: argparse.Namespace, row: dict[str, Any]) -> float | None:
    """Slack that is planned keeps the throughput, up to a hop of half a forward."""
    hidden = args.emulate_ms is not None and 0 < row["hop_ms"] <= args.emulate_ms[0] / 2
    return 0.97 if hidden and row["planned_slack"] else None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=positive, default=2)
    parser.add_argument("--accumulation", type=list_of(positive), default=[2, 4], help="micro-batches per window")
    parser.add_argument("--schedules", type=list_of(_schedule), default=["1f1b", "paci"])
    parser.add_argument(
        "--slack",
        type=list_of(_slack),
        default=[0],
        help="in-flight slack of the asynchronous ones; auto hides the hops",
    )
    parser.add_argument(
        "--hop-ms", type=list_of(_hop), default=[0.0], help="latency of messages, emulated; a row without comes along"
    )
    parser.add_argument(
        "--emulate-ms", type=_times, default=None, metavar="F,B|F,I,W", help="sleep instead of computing"
    )
    parser.add_argument(
        "--transport", choices=("auto", "shm", "gloo"), default="auto", help="between paci_rt's stages (torch's: gloo)"
    )
    parser.add_argument(
        "--peer",
        choices=["torch"],
        default=None,
        help="also run all of torch.distributed.pipelining, with ours",
    )
    add_options(parser, windows=8, repeats=5)
    args = parser.parse_args()
    if schedules.AUTO in args.slack and args.emulate_ms is None:
        parser.error(
            "--slack auto needs --emulate-ms: how long the stages of a real model take is not known beforehand"
        )
    return args


def _schedule(text: str) -> str:
    return schedules.get(text).name


def _times(text: str) -> tuple[float, ...]:
    try:
        times = tuple(float(part) for part in text.split(","))
    except ValueError:
        times = ()
    if len(times) not in (2, 3) or min(times) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: write F,B or F,I,W in milliseconds, for example 10,20")
    return times


def _slack(text: str) -> int | str:
    slack = int(text) if text != schedules.AUTO else text
    if isinstance(slack, int) and slack < 0:
        raise ValueError(f"slack {text}: write an integer of at least 0, or auto")
    return slack


def _hop(text: str) -> float:
    hop_ms = float(text)
    if not 0 <= hop_ms < float("inf"):
        raise ValueError(f"hop of {text} ms: write a number of at least 0")
    return hop_ms


def planned_slack(name: str, stages: int, hop_ms: float, emulate_ms: tuple[float, ...]) -> schedules.Slack:
    """What hides hops of ``hop_ms`` between equal stages wholly: what a loop of waits leaves open, it loses again
    whenever a message is late."""
    weight_grad_ms = emulate_ms[2] if len(emulate_ms) == 3 and schedules.get(name).split else 0.0
    slack = schedules.plan_slack(
        [sum(emulate_ms)] * stages, [hop_ms] * (stages - 1), after_send=[weight_grad_ms] * stages, tolerance=0.0
    )
    return check_slack(slack, stages)


def link_ms(args: argparse.Namespace) -> float:
    """How long a message takes by itself, measured between two processes, where slack is to be planned for it."""
    if schedules.AUTO not in args.slack:
        return 0.0
    link = measure_link(max(args.message_bytes, 4 * SMALL_BYTES), transport=args.transport)
    return 1e3 * (link.hop_s + args.message_bytes / link.bandwidth_bytes_per_s)


def make_cases(args: argparse.Namespace, link_ms: float = 0.0) -> dict[Case, bool]:
    """The cases, and whether the slack of each was planned for its hop, which takes ``link_ms`` at least."""
    cases: dict[Case, bool] = {}
    hops = dict.fromkeys([0.0, *args.hop_ms])
    names = dict.fromkeys([*args.schedules, *((*TORCHS, *PEERS) if args.peer else ())])
    for accumulation, name in itertools.product(args.accumulation, names):
        ours = name not in PEERS
        if not _runs(name, args.stages, accumulation):
            continue
        for hop_ms, slack in itertools.product(hops if ours else [0.0], args.slack):
            if slack and not (ours and schedules.get(name).takes_slack):
                continue
            planned = slack == schedules.AUTO
            if planned:
                slack = planned_slack(name, args.stages, max(hop_ms, link_ms), args.emulate_ms)
            case = Case(
                schedule=name,
                accumulation=accumulation,
                slack=slack,
                hop_ms=hop_ms,
                chunks=schedules.get(name_of(name)).chunks,
                **case_options(args),
            )
            cases[replace(case, slack=0, hop_ms=0.0)] = False  # what the others are measured by
            cases[case] = cases.get(case, False) or planned
    return cases


def _runs(name: str, ranks: int, accumulation: int) -> bool:
    """Whether a schedule takes so many micro-batches; torch's DualPipeV wants as many as there are pieces."""
    family = schedules.get(name_of(name))
    if name == "torch-dualpipe-v" and accumulation < ranks * family.chunks:
        return False
    one = 1 if family.one_micro_batch_windows else accumulation
    where = {"chunks": family.chunks, "placement": family.placement}
    try:
        family.check(schedules.Shape(num_stages=ranks * family.chunks, accumulation=one, **where))
    except ValueError as error:
        print(f"  {name} is left out: {error}")
        return False
    return True


def emulated_compute(args: argparse.Namespace) -> str | None:
    """What takes the place of kernels, in words; None for a real model."""
    if args.emulate_ms is None:
        return None
    times = zip(args.emulate_ms, "FB" if len(args.emulate_ms) == 2 else "FIW", strict=True)
    return "EMULATED compute: sleeps of " + ", ".join(f"{ms:g} ms {name}" for ms, name in times)


def about_links(args: argparse.Namespace, measured_ms: float) -> list[str]:
    """What there is to know about the links, if anything."""
    notes = []
    if measured_ms:
        notes.append(f"a message takes {measured_ms:.3f} ms between two processes, and slack is planned for that")
    if any(args.hop_ms):
        notes.append("EMULATED latency of messages where it says so")
    return notes


COLUMNS = {
    "schedule": "schedule",
    "a": "accumulation",
    "micro-batches/s": "micro_batches_per_s",
    "over zero latency": "over_zero_latency",
    "utilization": "utilization",
    "nominal": "nominal_utilization",
    "exposed %": "exposed_comm_percent",
    "peak activations": "peak_activations",
    "max drift": "max_drift",
}
"""Key of a row by title of its column."""


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A row per case; a dash where there is no number."""

    def cell(value: Any) -> Any:
        if value is None:
            return "-"
        return value[0] if isinstance(value, tuple) else value  # a median, without its spread

    table = [[*(cell(row[key]) for key in COLUMNS.values()), row["peak_bytes"] / 2**20] for row in rows]
    print_table([*COLUMNS, "peak MiB"], table)


def print_ratios(compared: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """A row per ratio; returns a line for each that falls short of what is asked."""
    asks, missed, table = asked(args), [], []
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
    return missed


def short_of(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """A line for each number of a row that falls short of what is asked."""
    missed = []
    for row in rows:
        where = f"{row['schedule']} at a={row['accumulation']}"
        ask = asked_utilization(args).get(row["schedule"])
        if ask is not None and row["utilization"] < ask:
            missed.append(f"utilization of {where}: {row['utilization']:.3f} < {ask}")
        ask = asked_over_zero_latency(args, row)
        if ask is not None and row["over_zero_latency"] is not None and row["over_zero_latency"][0] < ask:
            missed.append(f"{where} over zero latency: {row['over_zero_latency'][0]:.3f} < {ask}")
    return missed + short_with_large_messages(rows, args)


def main() -> None:
    args = parse_arguments()
    measured_ms = link_ms(args)
    cases = make_cases(args, measured_ms)
    print(describe(args, emulated_compute(args), *about_links(args, measured_ms)))

    def progress(report: dict[str, Any]) -> None:
        print(f"  round {report['round']} of {args.repeats} done", flush=True)

    per_rank = launch.run(
        measure, args.stages, (list(cases), args.windows, args.repeats), threads=1, on_report=progress
    )
    rows = summarise(per_rank, args.windows)
    for row, planned in zip(rows, cases.values(), strict=True):
        row["planned_slack"] = planned
    print_rows(rows)
    print()
    compared = ratios(rows)
    missed = print_ratios(compared, args) + short_of(rows, args)
    finish("pipeline_throughput", [*rows, *compared], missed, args.json)


if __name__ == "__main__":
    main()
