"""A GPT with tied embeddings on real ranks: PACI in a line and in a V, throughput and memory.

    python benchmarks/v_tied.py [--stages 2] [--accumulation 8] [--width 192] [--layers 12] [--vocab-size 12544]

The default is GPT-2 in small: 12 blocks, and a vocabulary of 65 times the width as in GPT-2, so that embedding, blocks
and head have the same shares of the work. All schedules run in the same processes, one thread each, in alternation, on
the same random tokens. A first round measures how long F, I and W of each piece take and how long a message does;
``paci-v`` is fitted to that. Memory is what ``stats()`` counts, and its largest process is compared; *predicted* is
what the simulator says of the same durations.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

import paci_rt
from common import finish_measures, integer, list_of, measure, positive, print_table
from paci_rt import launch, schedules
from paci_rt.profiling.link import SMALL_BYTES, measure_link
from paci_rt.simulate import Costs, simulate
from paci_rt.train.build import build_pipeline
from paci_rt.train.config import TrainConfig
from schedules import durations

LEAST_THROUGHPUT, MOST_ERROR = 0.97, 0.03


def config_of(args: argparse.Namespace, schedule: str, **more: Any) -> TrainConfig:
    """What ``paci-rt train`` would be told."""
    name, _, limit = schedule.partition("@")
    return TrainConfig(
        schedule=name,
        activation_limit=float(limit) if limit else None,
        stages=args.stages,
        accumulation=args.accumulation,
        batch_size=args.accumulation * args.rows,
        seq_len=args.seq_len,
        model="gpt2",
        layers=args.layers,
        width=args.width,
        heads=max(1, args.width // 64),
        vocab_size=args.vocab_size,
        tied=True,
        steps=1,
        trace=True,
        **more,
    )


class Run:
    """One schedule in this process."""

    def __init__(self, config: TrainConfig, ctx: launch.Context) -> None:
        self.config = config
        self.pipeline, _ = build_pipeline(config, ctx)
        self.step_number = 0

    def steps(self, count: int) -> None:
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.step_number)
            shape = (2, self.config.batch_size, self.config.seq_len)
            x, y = torch.randint(self.config.shape.vocab_size, shape, generator=generator)
            pipe = self.pipeline
            pipe.step(*((x,) if pipe.has_first else ()), target=y if pipe.has_last else None, return_outputs=False)
            self.step_number += 1

    def measure(self, windows: int) -> dict[str, Any]:
        """Seconds of ``windows`` windows between full pipelines."""
        self.steps(2)  # until the warm-up is over everywhere
        self.pipeline.reset_stats()
        self.pipeline.events.clear()
        start_s = time.perf_counter()
        self.steps(windows)
        wall_s = time.perf_counter() - start_s
        stats = self.pipeline.stats()
        events = list(self.pipeline.events)
        self.pipeline.drain()
        dist.barrier()
        return {"wall_s": wall_s, "stats": stats, "events": events}


def fitted(ctx: launch.Context, args: argparse.Namespace, link_ms: float) -> paci_rt.StepCosts:
    """Costs of the pieces in milliseconds, the same on all ranks."""
    run = Run(config_of(args, "paci-v"), ctx)
    run.steps(1)
    events = run.measure(2)["events"]
    run.pipeline.close()
    everyone: list[Any] = [None] * args.stages
    dist.all_gather_object(everyone, events)
    took = durations([event for one in everyone for event in one], 2 * args.stages, args.accumulation).mean_s
    ms = [tuple(round(1e3 * one, 3) for one in took[op]) for op in took if str(op.value) in "FIW"]
    by_op = dict(zip([str(op.value) for op in took if str(op.value) in "FIW"], ms, strict=True))
    return paci_rt.StepCosts(by_op["F"], by_op["I"], by_op["W"], hop=link_ms)


def work(ctx: launch.Context, args: argparse.Namespace, link_ms: float) -> dict[str, Any]:
    """All runs of one process."""
    costs = fitted(ctx, args, link_ms)
    runs = {}
    for name in args.schedules:
        config = config_of(args, name)
        takes = schedules.get(config.schedule).takes_costs and config.chunks == 2
        runs[name] = Run(replace(config, step_costs=costs) if takes else config, ctx)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for number in range(args.repeats + 1):
        for name, run in runs.items():
            result = run.measure(args.windows if number else 1)
            if number:
                found[name].append(result)
        if ctx.rank == 0:
            ctx.report({"round": number})
    placed = {name: (run.config.partition, run.config.chunks, run.config.places.name) for name, run in runs.items()}
    return {"found": found, "costs": costs, "placed": placed}


def rank_bytes(stats: dict[str, Any]) -> dict[str, int]:
    """Bytes of a process by kind; activations of its stages are those that it held at once."""
    parts: dict[str, int] = {}
    for one in stats["memory"].values():
        for key, value in one.items():
            parts[key] = parts.get(key, 0) + value
    parts["activations"] += stats["peak_bytes"] - parts["total"]
    return {**parts, "total": stats["peak_bytes"]}


def predicted(args: argparse.Namespace, name: str, placed: Any, ranks: list[dict[str, Any]], hop_s: float) -> float:
    """Micro-batches a second by the simulator, from what the actions of this repeat took."""
    _, chunks, place = placed
    family = schedules.get(name.partition("@")[0])
    stats = ranks[0]["stats"]
    shape = schedules.Shape(
        num_stages=args.stages * chunks,
        accumulation=args.accumulation,
        chunks=chunks,
        placement=place,
        **({"costs": ranks[0]["costs"], "activation_limit": ranks[0]["limit"]} if family.takes_costs else {}),
    )
    took = durations([event for one in ranks for event in one["events"]], shape.num_stages, args.accumulation)
    zero = (0.0,) * shape.num_stages
    means = {str(op.value): value for op, value in took.mean_s.items()}
    between = statistics.median(one["between_s"] for one in ranks)
    costs = Costs(
        forward_s=plus(means["F"], between),
        input_grad_s=plus(means["I"] if family.split else means["B"], between),
        weight_grad_s=plus(means["W"], between) if family.split else zero,
        update_s=plus(means["U"], between),
        predict_s=took.predict_s,
        hop_s=hop_s,
        noise=took.noise,
    )
    found = simulate(family, shape, costs, windows=4 * args.windows, policy=stats["policy"])
    return found.micro_batches_per_s


def plus(seconds: tuple[float, ...], more_s: float) -> tuple[float, ...]:
    return tuple(one + more_s for one in seconds)


def between_s(events: list[Any]) -> float:
    """The usual time from the end of an action to the start of the next one that had not to wait, in this process."""
    ordered = sorted(events, key=lambda one: one.start_s)
    gaps = sorted(later.start_s - one.end_s for one, later in itertools.pairwise(ordered))
    return float(gaps[len(gaps) // 4])


def summarise(args: argparse.Namespace, results: list[dict[str, Any]], hop_s: float) -> list[dict[str, Any]]:
    """A row for each schedule."""
    rows = []
    for name in args.schedules:
        repeats = list(zip(*(one["found"][name] for one in results), strict=True))
        limit = name.partition("@")[2]
        rates, told = [], []
        for ranks in repeats:
            wall_s = statistics.mean(one["wall_s"] for one in ranks)
            rates.append(args.windows * args.accumulation / wall_s)
            given = [{**one, "costs": results[0]["costs"], "limit": float(limit) if limit else None} for one in ranks]
            for one in given:
                one["between_s"] = between_s(one["events"])
            told.append(predicted(args, name, results[0]["placed"][name], given, hop_s) / rates[-1] - 1)
        memory = [rank_bytes(one["found"][name][0]["stats"]) for one in results]
        stats = [one["found"][name][0]["stats"] for one in results]
        rows.append(
            {
                "schedule": name,
                "partition": list(results[0]["placed"][name][0]),
                "micro_batches_per_s": statistics.median(rates),
                "prediction_error": statistics.median(told),
                "worst_rank_bytes": max(one["total"] for one in memory),
                "ranks": memory,
                "peak_activations": max(
                    peak / results[0]["placed"][name][1]
                    for one in stats
                    for peak in one["peak_rank_in_flight"].values()
                ),
                "max_drift": max(one["max_drift"] for one in stats),
                "max_delay": max(one["max_delay"] for one in stats),
                "repeats": {"micro_batches_per_s": rates, "prediction_error": told},
            }
        )
    return rows


def measures_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Against PACI in a line, repeat by repeat."""
    by_name = {row["schedule"]: row for row in rows}
    found = []
    base = by_name.get("paci")
    for name, row in by_name.items():
        error = 100 * abs(row["prediction_error"])
        found.append(measure(f"{name}: simulator off by", error, "%", at_most=100 * MOST_ERROR))
        if base is None or not name.startswith("paci-v"):
            continue
        pairs = zip(row["repeats"]["micro_batches_per_s"], base["repeats"]["micro_batches_per_s"], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        found.append(measure(f"{name}: throughput over paci", ratio, at_least=LEAST_THROUGHPUT))
        share = row["worst_rank_bytes"] / base["worst_rank_bytes"]
        found.append(measure(f"{name}: worst rank's bytes over paci", share, at_most=1.0))
    return found


def show(rows: list[dict[str, Any]]) -> None:
    columns = ["schedule", "blocks", "micro-batches/s", "error", "activations", "MiB of each rank", "drift", "delay"]
    table = [
        [
            row["schedule"],
            ",".join(map(str, row["partition"])),
            row["micro_batches_per_s"],
            f"{row['prediction_error']:+.1%}",
            f"{row['peak_activations']:g}",
            ", ".join(f"{one['total'] / 2**20:.1f}" for one in row["ranks"]),
            row["max_drift"],
            row["max_delay"],
        ]
        for row in rows
    ]
    print_table(columns, table)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=list_of(str), default=["1f1b", "paci", "paci-v"], help="NAME[@LIMIT], ...")
    parser.add_argument("--stages", type=positive, default=2)
    parser.add_argument("--accumulation", type=positive, default=8)
    parser.add_argument("--layers", type=positive, default=12)
    parser.add_argument("--width", type=positive, default=192)
    parser.add_argument("--vocab-size", type=positive, default=12544)
    parser.add_argument("--seq-len", type=positive, default=256)
    parser.add_argument("--rows", type=positive, default=2, help="sequences per micro-batch")
    parser.add_argument("--windows", type=integer(2), default=3)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    message_bytes = 4 * args.rows * args.seq_len * args.width
    link = measure_link(max(message_bytes, 4 * SMALL_BYTES), transport="auto")
    hop_s = link.hop_s + message_bytes / link.bandwidth_bytes_per_s
    print(
        f"{args.stages} processes, one thread each; GPT-2 in small: {args.layers} blocks of width {args.width}, "
        f"vocabulary {args.vocab_size}, tied; {args.rows} x {args.seq_len} tokens per micro-batch; a message takes "
        f"{1e3 * hop_s:.2f} ms; {args.repeats} repeats of {args.windows} windows of {args.accumulation}"
    )
    results = launch.run(
        work, args.stages, (args, 1e3 * hop_s), threads=1, on_report=lambda seen: print(seen, flush=True)
    )
    rows = summarise(args, results, hop_s)
    show(rows)
    details = {"rows": rows, "options": {key: value for key, value in vars(args).items() if key != "json"}}
    details["costs_ms"] = results[0]["costs"]._asdict()
    return finish_measures("v_tied", measures_of(rows), details, args.json)


if __name__ == "__main__":
    sys.exit(main())
