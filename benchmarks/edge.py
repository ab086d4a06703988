"""Which ways to look ahead survive the first updates at a rate near the edge of stability, with and without clipping?

    python benchmarks/edge.py [--seeds 21,24,30] [--clips 0,1] [--methods flush,look-ahead] [--jobs 2] [--json FILE]

Each run is the beginning of one of 200 updates (``iso_loss.py``'s: gpt-nano, P = a = 8, AdamW at 2e-3, 20 updates of
warm-up). Its number is the held-back loss after ``--updates``; *stuck* counts the seeds that are above ``STUCK`` there,
on the plateau where a model knows how often each character comes and little more. A clip of 0 is none.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from common import list_of, positive, print_table, write_json
from paci_rt import native
from paci_rt.report.machine import machine
from staleness.case import METHODS, Case
from staleness.run import run

STUCK = 3.25
"""Nats per token."""
SEEDS = (21, 24, 30, 31, 32, 33, 34, 35, 36, 37)
WAYS = ("flush", "look-ahead shared", "look-ahead", "look-ahead half newest")


class _Enough(Exception):
    """The run is as far as it has to go."""


def loss_of(case: Case, updates: int) -> float:
    """Held-back loss, nats per token, after ``updates`` of ``case``; the rest of it is not run."""
    torch.set_num_threads(1)
    native.set_num_threads(1)
    found: list[float] = []

    def look(update: int, loss: float) -> None:
        found.append(loss)
        if update >= updates:
            raise _Enough

    with suppress(_Enough):
        run(case, on_point=look)
    return found[-1]


def case_of(method: str, clip: float, seed: int, rate: float) -> Case:
    return Case(
        task="gpt-nano",
        stages=8,
        accumulation=8,
        method=method,
        lr=rate,
        seed=seed,
        updates=200,
        warmup=20,
        clip=clip or None,
    )


def rows_of(results: list[dict[str, Any]]) -> list[list[Any]]:
    """A line for each method and clip: mean and largest loss, seeds that are stuck, seeds."""
    lines = []
    for key in dict.fromkeys((one["method"], one["clip"]) for one in results):
        losses = [one["loss"] for one in results if (one["method"], one["clip"]) == key]
        stuck = sum(loss > STUCK for loss in losses)
        lines.append(
            [key[0], f"{key[1]:g}" if key[1] else "none", statistics.fmean(losses), max(losses), stuck, len(losses)]
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=list_of(str), default=list(WAYS))
    parser.add_argument("--clips", type=list_of(float), default=[0.0, 1.0])
    parser.add_argument("--seeds", type=list_of(int), default=list(SEEDS))
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--updates", type=positive, default=40)
    parser.add_argument("--jobs", type=positive, default=2)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(arguments)
    for method in args.methods:
        if method not in METHODS:
            parser.error(f"--methods has {method}: choose from {', '.join(METHODS)}")
    cases = [
        case_of(method, clip, seed, args.rate) for clip in args.clips for method in args.methods for seed in args.seeds
    ]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        losses = list(pool.map(partial(loss_of, updates=args.updates), cases))
    results = [
        {"method": case.method, "clip": case.clip, "seed": case.seed, "loss": loss}
        for case, loss in zip(cases, losses, strict=True)
    ]
    print_table(("method", "clip", "mean loss", "largest", "stuck", "seeds"), rows_of(results))
    if args.json:
        plan = {**asdict(cases[0]), "stopped_after": args.updates, "stuck_above": STUCK}
        for name in ("method", "clip", "seed"):
            del plan[name]
        write_json(args.json, {"benchmark": "edge", "machine": machine(), "case": plan, "rows": results})


if __name__ == "__main__":
    main()
