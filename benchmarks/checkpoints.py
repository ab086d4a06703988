"""What checkpoints cost in throughput: none, blocking ones, and ones that are written beside training.

    python benchmarks/checkpoints.py --rounds 5 --json checkpoints.json

Runs of ``paci-rt train`` take turns, one of each kind a round, in an order that changes from round to round, so that a
machine that slows down slows all of them. Each run saves once in ``--save-interval`` updates. A row has the updates per
second of one run between its first and its last update, by the wall clock: pauses, drains and snapshots count. The
summary has, for blocking and asynchronous saves, the share of throughput that was lost against the run without saves of
the same round: mean, and a 95 % interval over rounds. FAILED where the asynchronous share is above ``--most`` by all of
its interval.

On a machine that does other work the interval says so: it is wide, and nothing follows from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("none", "blocking", "async")
T_QUANTILES = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Of Student's t for a 95 % interval, by degrees of freedom; for more of them the last one, which is too wide."""


def measure(kind: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run; its updates per second of wall clock, without the start and the end."""
    out = folder / kind
    command = [sys.executable, "-m", "paci_rt", "train", "--stages", str(args.stages), "--schedule", args.schedule]
    command += ["--model", args.model, "--steps", str(args.steps), "--accumulation", str(args.accumulation)]
    command += ["--batch-size", str(args.batch_size), "--seq-len", str(args.seq_len), "--eval-interval", "0"]
    command += ["--eval-batches", "1", "--log-interval", "1", "--log", str(out / "log"), "--out", str(out)]
    if kind != "none":
        command += ["--save-interval", str(args.save_interval)]
        command.append("--async-checkpoint" if kind == "async" else "--no-async-checkpoint")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    log, times = out / "log" / "log.jsonl", dict[int, float]()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) as run:
        while run.poll() is None:
            if log.exists():
                count = sum('"loss"' in line for line in log.read_text().splitlines())
                times.setdefault(count, time.monotonic())
            time.sleep(0.01)
        error = run.stderr.read() if run.stderr is not None else ""
    if run.returncode:
        raise RuntimeError(f"{kind}: exit code {run.returncode}: {error[-500:]}")
    seen = sorted(count for count in times if count)
    first, last = seen[0], seen[-1]
    return {"kind": kind, "updates_per_s": (last - first) / (times[last] - times[first]), "updates": last - first}


def lost(rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Share of throughput that a kind lost, over rounds."""
    by_round: dict[int, dict[str, float]] = {}
    for row in rows:
        by_round.setdefault(row["round"], {})[row["kind"]] = row["updates_per_s"]
    shares = [1 - one[kind] / one["none"] for one in by_round.values()]
    half = float("inf")
    if len(shares) > 1:
        half = T_QUANTILES[min(len(shares) - 1, 9)] * statistics.stdev(shares) / len(shares) ** 0.5
    mean = statistics.mean(shares)
    return {"kind": kind, "lost": mean, "low": mean - half, "high": mean + half, "rounds": len(shares)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=401)
    parser.add_argument("--save-interval", type=int, default=100)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--schedule", default="paci")
    parser.add_argument("--model", default="gpt-tiny")
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--most", type=float, default=0.02, help="share of throughput that may be lost")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, rows = parse(argv), list[dict[str, Any]]()
    for number in range(args.rounds):
        for at in range(len(KINDS)):
            with tempfile.TemporaryDirectory(prefix="checkpoints_") as folder:
                row = {"round": number, **measure(KINDS[(at + number) % len(KINDS)], args, Path(folder))}
            rows.append(row)
            print(f"{row['round']:3}  {row['kind']:9} {row['updates_per_s']:9.3f} updates/s", flush=True)
    found = [lost(rows, kind) for kind in KINDS[1:]]
    for one in found:
        spread = f"[{100 * one['low']:.2f}, {100 * one['high']:.2f}]"
        print(f"{one['kind']:9} loses {100 * one['lost']:6.2f} % of throughput, 95 % interval {spread}")
    fine = found[-1]["low"] <= args.most
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows, "summary": found, "ok": fine}, indent=2) + "\n")
    print("OK" if fine else "FAILED")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
