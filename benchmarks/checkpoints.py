"""What checkpoints cost in throughput: none, blocking ones, and ones that are written beside training.

Stretches of ``--updates`` updates take turns in the same processes, one of each kind a round, in an order that changes
from round to round. README.md in this folder defines the numbers.

    python benchmarks/checkpoints.py --rounds 8 --json checkpoints.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch.distributed as dist

from common import finish, positive, print_table
from paci_rt import checkpoint, launch
from paci_rt.runtime import checkpoint_job
from paci_rt.train.gpt import MODELS
from pipelines import Case, Pipe

ASKED_SHARE = 0.02
KINDS = ("none", "blocking", "beside")
T_QUANTILES = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Of Student's t for a 95 % interval, by degrees of freedom; for more of them the last one, which is too wide."""


class Writer:
    """CPU seconds of this process's threads within the writing of checkpoints, wherever that runs."""

    def __init__(self) -> None:
        self.cpu_s, self._write = 0.0, checkpoint_job.write
        checkpoint_job.write = self._timed  # type: ignore[assignment]

    def _timed(self, *args: Any, **options: Any) -> None:
        begin = time.thread_time()
        try:
            self._write(*args, **options)
        finally:
            self.cpu_s += time.thread_time() - begin


def stretch(pipe: Pipe, writer: Writer, kind: str, updates: int, folder: str) -> dict[str, float]:
    """Seconds of ``updates`` updates with a save in their middle, in which the pipeline is full: by the clock, of this
    process's CPU time, those in which the call to save did not return, and CPU seconds of what writes beside it."""
    saving, stopped_s, writer.cpu_s = None, 0.0, 0.0
    dist.barrier()
    begin, cpu = time.perf_counter(), time.process_time()
    for number in range(updates):
        if number == updates // 2 and kind != "none":
            call = time.perf_counter()
            saving = checkpoint.save(folder, pipe.schedule, blocking=kind == "blocking")
            stopped_s = time.perf_counter() - call
        pipe.step()
    pipe.schedule.drain()
    if saving is not None:
        saving.wait()
    cpu_s = time.process_time() - cpu
    dist.barrier()
    writer_s = writer.cpu_s if kind == "beside" else 0.0
    return {"wall_s": time.perf_counter() - begin, "cpu_s": cpu_s, "stopped_s": stopped_s, "writer_s": writer_s}


def stage(ctx: launch.Context, case: Case, updates: int, rounds: int, folder: str) -> list[dict[str, dict[str, float]]]:
    """By round, and in it by kind, what each stretch took."""
    pipe, writer = Pipe(case, ctx.rank), Writer()
    for kind in KINDS:
        stretch(pipe, writer, kind, 4, folder)
    found = []
    for number in range(rounds):
        kinds = [KINDS[(number + at) % len(KINDS)] for at in range(len(KINDS))]
        found.append({kind: stretch(pipe, writer, kind, updates, folder) for kind in kinds})
    pipe.schedule.close()
    return found


def lost(seconds: list[dict[str, float]], kind: str) -> dict[str, float]:
    """Share of throughput that saves of a kind lose, from each round's seconds by kind: mean, 95 % interval."""
    shares = [one[kind] / one["none"] - 1 for one in seconds]
    half = float("inf")
    if len(shares) > 1:
        half = T_QUANTILES[min(len(shares) - 1, max(T_QUANTILES))] * statistics.stdev(shares) / len(shares) ** 0.5
    mean = statistics.mean(shares)
    return {"share": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=positive, default=8)
    parser.add_argument("--updates", type=positive, default=100)
    parser.add_argument("--stages", type=positive, default=2)
    parser.add_argument("--schedule", default="paci")
    parser.add_argument("--model", choices=list(MODELS), default="gpt-tiny")
    parser.add_argument("--accumulation", type=positive, default=4)
    parser.add_argument("--rows", type=positive, default=2, help="sequences per micro-batch")
    parser.add_argument("--seq-len", type=positive, default=128)
    parser.add_argument("--json")
    args = parser.parse_args()
    case = Case(
        schedule=args.schedule,
        stages=args.stages,
        accumulation=args.accumulation,
        model=args.model,
        rows=args.rows,
        seq_len=args.seq_len,
    )
    with tempfile.TemporaryDirectory(prefix="paci_rt_checkpoints_") as folder:
        by_rank = launch.run(stage, args.stages, (case, args.updates, args.rounds, folder))
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        row: dict[str, Any] = {"kind": kind, "model": args.model, "schedule": args.schedule, "updates": args.updates}
        for name in ("wall_s", "cpu_s"):
            by_round = [
                {one: sum(ranks[one][name] for ranks in stretches) for one in KINDS}
                for stretches in zip(*by_rank, strict=True)
            ]
            row[name] = statistics.median(one[kind] for one in by_round) / args.stages
            row[f"lost_{name.removesuffix('_s')}"] = lost(by_round, kind)
        for name in ("stopped_s", "writer_s"):
            row[name] = max(statistics.median(one[kind][name] for one in found) for found in by_rank)
        row["most_share"] = (row["stopped_s"] + row["writer_s"]) / (rows[0] if rows else row)["wall_s"]
        rows.append(row)
    columns = ("kind", "seconds", "lost %", "from", "to", "CPU %", "from", "to", "stopped s", "writer s", "most %")
    table = [
        [row["kind"], row["wall_s"]]
        + [100 * row[lost_in][one] for lost_in in ("lost_wall", "lost_cpu") for one in ("share", "low", "high")]
        + [row["stopped_s"], row["writer_s"], 100 * row["most_share"]]
        for row in rows
    ]
    print_table(columns, table)
    beside, missed = rows[-1], []
    if beside["most_share"] > ASKED_SHARE:
        missed.append(f"beside training: up to {beside['most_share']:.2%} of throughput by stops and the writer's CPU")
    if beside["lost_wall"]["low"] > ASKED_SHARE:
        missed.append(f"beside training: {beside['lost_wall']['share']:.2%} of throughput by the clock")
    finish("checkpoints", rows, missed, args.json)


if __name__ == "__main__":
    main()
