"""A real pipeline on a single GPU, measured and not simulated: schedules compared on the same stages.

Every stage has a partition of the multiprocessors, and links are copies between them. One thread issues everything
ahead of the GPU. README.md in this folder defines each number.

    python benchmarks/one_gpu.py
    python benchmarks/one_gpu.py --accumulation 8 --schedules 1f1b,paci --latency-us 500 --json one_gpu.json
    python benchmarks/one_gpu.py --device cpu --stages 2 --accumulation 2 --hidden 16 --tokens 8   # that it works
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt
from common import (
    finish_measures,
    gpu_facts,
    integer,
    list_of,
    measure,
    median_spread,
    positive,
    print_table,
    write_measures,
)
from onegpu.place import CONNECTIONS, GpuPlace, Place
from onegpu.reading import Reading, predict, read, step_costs
from onegpu.run import Case, Model, Sample, make_batch, make_modules, run
from paci_rt import schedules
from paci_rt.action import Op
from paci_rt.schedules import StepCosts, policies
from schedules import Link, read_link

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BASE, SPLIT = "1f1b", "zb-h1"
ASKED_STAGES, ASKED_ACCUMULATION, ASKED_RATIO = 8, 8, 1.7
HOST_SHARE = 0.9
"""Above this share of a period, the host's own hiccups can hold up the device."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What stays the same while schedules take turns.

    Attributes:
        place: where stages run. modules: theirs.
        batch: of the largest window.
        model: what the modules are.
        latency_us: of every link. windows: to measure in a repeat. repeats: measured ones.
    """

    place: Place
    modules: Sequence[nn.Module]
    batch: tuple[Tensor, Tensor]
    model: Model
    latency_us: int
    windows: int
    repeats: int

    def sample(self, case: Case) -> Sample:
        rows = case.accumulation * self.model.tokens
        batch = (self.batch[0][:rows], self.batch[1][:rows])
        return run(case, self.modules, batch, self.place, latency_us=self.latency_us, windows=self.windows)

    def reading(self, case: Case, sample: Sample) -> Reading:
        return read(sample.events, case, case.warm_up - 1, case.warm_up - 1 + self.windows)


Measured = dict[Case, list[tuple[Sample, Reading]]]


def calibrate(bench: Bench, stages: int, accumulation: int) -> StepCosts:
    """What F, I, W and a hop take on these stages, for the searched schedules; the first run only warms up."""
    links, reading = [], None
    for schedule in (SPLIT, BASE, SPLIT, BASE):
        case = Case(schedule=schedule, stages=stages, accumulation=accumulation)
        sample = bench.sample(case)
        if schedule == BASE:
            links.append(read_link(sample.events))
        else:
            reading = bench.reading(case, sample)
    assert reading is not None
    return step_costs(reading, max(0.0, links[-1].hop_s))


def take_turns(bench: Bench, cases: Sequence[Case], keep: Callable[[Measured], None]) -> Measured:
    """All cases, in alternation; the first round warms up. ``keep`` is called with what is there after each other."""
    results: Measured = defaultdict(list)
    for round_number in range(bench.repeats + 1):
        for case in cases:
            sample = bench.sample(case)
            if round_number:
                results[case].append((sample, bench.reading(case, sample)))
        print(f"  a={cases[0].accumulation}: round {round_number} of {bench.repeats} done", flush=True)
        if round_number:
            keep(dict(results))
    return dict(results)


def row_of(bench: Bench, case: Case, mine: list[tuple[Sample, Reading]], links: Sequence[Link]) -> dict[str, Any]:
    """What is known of one case, but for how it compares with others."""
    readings = [reading for _, reading in mine]
    rates = [reading.micro_batches_per_s for reading in readings]
    predicted = [predict(case, reading, link, bench.windows) for reading, link in zip(readings, links, strict=True)]
    host = [sample.host_s for sample, _ in mine if sample.host_s is not None]
    peaks = [sample.peak_bytes for sample, _ in mine if sample.peak_bytes is not None]
    period_s, host_s = 1 / statistics.median(rates), statistics.median(host) if host else None
    stats = mine[-1][0].stats
    took = {
        op.value: [
            statistics.median(reading.took_s[op][stage] for reading in readings) * 1e3 for stage in range(case.stages)
        ]
        for op in readings[0].took_s
    }
    return {
        "schedule": case.label,
        "stages": case.stages,
        "accumulation": case.accumulation,
        "sms_per_stage": bench.place.facts.get("sms_per_stage"),
        "micro_batches_per_s": statistics.median(rates),
        "utilization": statistics.median(reading.utilization for reading in readings),
        "period_ms": period_s * 1e3,
        "host_ms": None if host_s is None else host_s * 1e3,
        "host_bound": None if host_s is None else host_s > HOST_SHARE * period_s,
        "took_ms": took,
        "exposed_update_ms": statistics.median(statistics.mean(reading.update_s) for reading in readings) * 1e3,
        "hop_ms": statistics.median(link.hop_s for link in links) * 1e3,
        "predicted_micro_batches_per_s": statistics.median(predicted),
        "prediction_error": statistics.median(one / rate - 1 for one, rate in zip(predicted, rates, strict=True)),
        "peak_memory_bytes": max(peaks, default=None),
        "peak_activations": max(stats["peak_in_flight"].values()),
        "max_drift": stats["max_drift"],
        "limit": (case.accumulation + case.stages - 1) / case.accumulation,
        "repeats": {"micro_batches_per_s": rates, "utilization": [reading.utilization for reading in readings]},
    }


def summarise(bench: Bench, measured: Measured) -> list[dict[str, Any]]:
    """One row per case; ``measured`` holds cases of one number of micro-batches, 1F1B-flush among them."""
    (base,) = (case for case in measured if case.schedule == BASE)
    links = [read_link(sample.events) for sample, _ in measured[base]]
    rows = [row_of(bench, case, mine, links) for case, mine in measured.items()]
    theirs = next(row for row in rows if row["schedule"] == base.label)["repeats"]
    for row in rows:
        for name, key in (("relative_to_1f1b", "micro_batches_per_s"), ("relative_utilization", "utilization")):
            ratios = [ours / other for ours, other in zip(row["repeats"][key], theirs[key], strict=True)]
            row[name], *row["repeats"][name] = median_spread(ratios)
    return rows


# ---------------------------------------------------------------------------------------------------------- verdicts


def measures_of(rows: Sequence[dict[str, Any]], *, latency_us: int) -> list[dict[str, Any]]:
    """What is asked of a GPU, and what only informs: rows of ``make gpu``'s table."""
    found = []
    for row in rows:
        name = f"{row['stages']} stages, a={row['accumulation']}, {row['schedule']}"
        judged = row["host_ms"] is not None  # on the CPU nothing is
        asked = (
            row["schedule"] == "paci"
            and (row["stages"], row["accumulation"]) == (ASKED_STAGES, ASKED_ACCUMULATION)
            and not latency_us
        )
        if row["schedule"] != BASE:
            found.append(
                measure(
                    f"{name} over 1F1B-flush",
                    row["relative_to_1f1b"],
                    f"of at most {row['limit']:.3f}",
                    at_least=ASKED_RATIO if judged and asked else None,
                )
            )
        if judged:
            share = row["host_ms"] / row["period_ms"]
            found.append(measure(f"{name}: host time", share, "of a period", at_most=HOST_SHARE))
    return found


def report(rows: Sequence[dict[str, Any]]) -> None:
    columns = ["schedule", "a", "over 1f1b", "by utilization", "limit", "micro-batches/s", "predicted", "error"]
    columns += ["utilization", "period ms", "host ms", "F ms", "update ms", "SMs", "peak GiB"]
    table = []
    for row in rows:
        peak, host_ms = row["peak_memory_bytes"], row["host_ms"]
        mark = " HOST-BOUND" if row["host_bound"] else ""
        table.append(
            [
                row["schedule"],
                row["accumulation"],
                row["relative_to_1f1b"],
                row["relative_utilization"],
                row["limit"],
                row["micro_batches_per_s"],
                row["predicted_micro_batches_per_s"],
                f"{row['prediction_error']:+.1%}",
                row["utilization"],
                row["period_ms"],
                "-" if host_ms is None else f"{host_ms:.3f}{mark}",
                statistics.mean(row["took_ms"][Op.F.value]),
                row["exposed_update_ms"],
                row["sms_per_stage"] or "-",
                "-" if peak is None else f"{peak / 2**30:.1f}",
            ]
        )
    print_table(columns, table)


# --------------------------------------------------------------------------------------------------------------- main


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stages", type=integer(2), default=8)
    parser.add_argument("--accumulation", type=list_of(positive), default=[8, 24], help="micro-batches per window")
    parser.add_argument("--schedules", type=list_of(_schedule), default=["1f1b", "zb-h1", "zb-2p", "paci"])
    parser.add_argument("--hidden", type=positive, default=6144, help="width of the linear layers")
    parser.add_argument("--layers", type=positive, default=3, help="linear layers a stage")
    parser.add_argument("--tokens", type=positive, default=4096, help="rows of a micro-batch")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--latency-us", type=integer(0), default=0, help="of every link, on top of the copy")
    parser.add_argument("--slack", type=integer(0), default=0, help="warm-up forwards more, for paci")
    parser.add_argument(
        "--min-sms", type=positive, default=None, help="multiprocessors per stage (as many as possible)"
    )
    parser.add_argument("--windows", type=positive, default=3, help="windows to measure in a repeat")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--json", default=None)
    args = parser.parse_args(arguments)
    if args.device == "cpu" and args.latency_us:
        parser.error(f"--latency-us {args.latency_us}: links have a latency on a GPU only; leave it out")
    if args.device == "cpu" and args.min_sms is not None:
        parser.error(f"--min-sms {args.min_sms}: a CPU has no multiprocessors to split; leave it out")
    args.schedules = list(dict.fromkeys([BASE, *args.schedules]))
    for name in args.schedules:
        for accumulation in args.accumulation:
            try:
                case = Case(schedule=name, stages=args.stages, accumulation=accumulation)
                case.family.check(case.shape)
                policies.resolve(case.family, case.shape, None)
            except ValueError as error:
                parser.error(f"--schedules {name} with --accumulation {accumulation}: {error}")
    return args


def _schedule(text: str) -> str:
    family = schedules.get(text)
    if family.takes_chunks or family.one_micro_batch_windows:
        raise ValueError(
            f"{text} has several stages per rank, or an update after every backward; schedules are compared here on "
            "the same stages and windows: choose from gpipe, 1f1b, zb-h1, zb-h2, zb-1p, zb-2p, pipedream-2bw and paci"
        )
    return str(family.name)


def find_place(args: argparse.Namespace) -> Place:
    """Where to run.

    Raises:
        ValueError, PaciError: there is no such place; the message says why and what to do.
    """
    if args.device == "cpu":
        print("on the CPU stages take turns: this shows that the benchmark works, and nothing of a pipeline's speed")
        torch.set_num_threads(1)
        return Place()
    if not torch.cuda.is_initialized():
        # Before CUDA starts: with fewer queues than streams, streams would wait for each other.
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = str(CONNECTIONS)
    if not torch.cuda.is_available():
        built = "sees no GPU" if torch.version.cuda else "is a CPU build"
        raise ValueError(
            f"--device cuda: torch {torch.__version__} {built}; run this where there is one (paci-rt doctor tells what "
            "is missing), or see with --device cpu and small sizes that it works"
        )
    place = GpuPlace(torch.device("cuda", torch.cuda.current_device()), args.stages, min_sms=args.min_sms)
    facts, versions = place.facts, gpu_facts()
    print(
        f"{versions['gpu']}, driver {facts['driver']}, CUDA {versions['cuda']}, torch {torch.__version__}: "
        f"{args.stages} stages of {facts['sms_per_stage']} of {facts['sms']} SMs, links on {facts['sms_of_links']}"
    )
    if facts["false_dependencies"]:
        print(
            f"note: {facts['false_dependencies']} pairs of streams wait for each other without need "
            f"(CUDA_DEVICE_MAX_CONNECTIONS is {facts['hardware_queues']}, for {facts['streams']} streams)"
        )
    return place


def execute(args: argparse.Namespace, place: Place) -> int:
    """Measure everything and report it; returns the exit code."""
    model = Model(hidden=args.hidden, layers=args.layers, tokens=args.tokens, dtype=DTYPES[args.dtype])
    bench = Bench(
        place=place,
        modules=make_modules(model, args.stages, place.device),
        batch=make_batch(model, max(args.accumulation), place.device),
        model=model,
        latency_us=args.latency_us,
        windows=args.windows,
        repeats=args.repeats,
    )
    cases = [
        Case(
            schedule=name,
            stages=args.stages,
            accumulation=accumulation,
            slack=args.slack if schedules.get(name).takes_slack else 0,
        )
        for accumulation in args.accumulation
        for name in args.schedules
    ]
    costs = None
    if any(case.family.takes_costs for case in cases):
        costs = calibrate(bench, args.stages, args.accumulation[0])
        print(f"measured step costs: {costs.text()} ms", flush=True)
    rows: list[dict[str, Any]] = []
    details = {
        "place": place.facts,
        "options": {key: value for key, value in vars(args).items() if key != "json"},
        "step_costs_ms": None if costs is None else costs._asdict(),
    }

    def keep(measured: Measured) -> None:
        early = [*rows, *summarise(bench, measured)]
        measures = measures_of(early, latency_us=args.latency_us)
        write_measures("one_gpu", measures, {**details, "rows": early}, args.json)

    for accumulation in args.accumulation:
        mine = [
            replace(case, costs=costs if case.family.takes_costs else None)
            for case in cases
            if case.accumulation == accumulation
        ]
        rows += summarise(bench, take_turns(bench, mine, keep))
    report(rows)
    return finish_measures(
        "one_gpu", measures_of(rows, latency_us=args.latency_us), {**details, "rows": rows}, args.json
    )


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        place = find_place(args)
    except (ValueError, paci_rt.PaciError) as error:
        print(f"one_gpu.py: {error}", file=sys.stderr)
        return 2
    try:
        return execute(args, place)
    except torch.OutOfMemoryError as error:
        problem = str(error).splitlines()[0]
        print(f"one_gpu.py: {problem} Lower --tokens, --hidden, --layers or --accumulation", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
