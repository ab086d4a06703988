"""What do sums over replicas cost a stage, and how much memory does sharing the optimizer's state save?

    python benchmarks/replicas.py [--parameters 2000000] [--emulate-ms 12,24] [--windows 8] [--json FILE]

Two replicas of two stages, four processes on this host over gloo. Sleeps take the place of the model's computing, so
that four processes find room on few cores; gradients, sums, updates and messages are real. A row for each way:

- *reduce*: milliseconds of a window in which sums travel, of the stage where they take longest.
- *exposed*: milliseconds of a window in which a stage waits for them, and their share of the window. Asked is at most
  5 % with an overlap of half a window, where sums take at most half of one.
- *gather*: milliseconds in which a stage waits for weights of the other replica (ZeRO-1).
- bytes of optimizer state and masters per process by our count, and its resident memory by the operating system's.

Times are medians over the windows, of the process where they are largest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import paci_rt
from common import finish_measures, list_of, measure, positive
from paci_rt import launch

REPLICAS, STAGES = 2, 2
EXPOSED_PERCENT, MOST_REDUCE_PERCENT = 5.0, 50.0
WARM_UP_WINDOWS = 2
ROWS, WIDTH = 1, 16
SECONDS = {"reduce_ms": "reduce_s", "exposed_ms": "exposed_reduce_s", "gather_ms": "exposed_gather_s"}


@dataclass(frozen=True, kw_only=True)
class Way:
    """One row.

    Attributes:
        schedule: its name. overlap: micro-batches of the next window that run meanwhile. shard: ZeRO-1.
        lookahead: forwards before the update run at weights ahead.
        parameters: of a stage. accumulation: micro-batches a window. windows: measured ones.
        forward_s, backward_s: of a micro-batch, slept.
    """

    name: str
    schedule: str
    overlap: int
    shard: bool
    parameters: int
    accumulation: int
    windows: int
    forward_s: float
    backward_s: float
    lookahead: bool = False


class _Slept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward_s: float, backward_s: float) -> Tensor:
        time.sleep(forward_s)
        ctx.backward_s, ctx.grad = backward_s, torch.full_like(weight, 1e-3)
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        time.sleep(ctx.backward_s)
        return grad, ctx.grad, None, None


class SleepingStage(nn.Module):
    """Parameters whose gradients cost nothing, and a sleep for the computing."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(way.parameters, dtype=torch.bfloat16))
        self.first = nn.Parameter(torch.ones(WIDTH, dtype=torch.bfloat16))
        self._seconds = way.forward_s, way.backward_s

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Slept.apply(x * self.first, self.weight, *self._seconds)  # type: ignore[no-untyped-call]
        return out


def work(ctx: launch.Context, way: Way) -> dict[str, Any]:
    """One of the four processes."""
    mesh = dist.device_mesh.DeviceMesh(
        "cpu", torch.arange(REPLICAS * STAGES).view(REPLICAS, STAGES), mesh_dim_names=("dp", "pp")
    )
    at = mesh.get_local_rank("pp")
    stage = paci_rt.PipelineStage(SleepingStage(way), at, STAGES)
    options: dict[str, Any] = {"lookahead": way.lookahead} if way.schedule == "paci" else {}
    schedule = paci_rt.get_schedule_class(way.schedule)(
        stage,
        way.accumulation,
        lambda output, target: (output - target).float().square().mean(),
        optimizer=paci_rt.AdamW(stage.parameters(), lr=1e-4),
        mesh=mesh,
        shard_optimizer=way.shard,
        overlap=way.overlap,
        **options,
    )
    x = torch.ones(ROWS * way.accumulation, WIDTH, dtype=torch.bfloat16)
    for _ in range(WARM_UP_WINDOWS):
        schedule.step(x, target=x)
    samples: dict[str, list[float]] = {key: [] for key in ("window_ms", *SECONDS)}
    for _ in range(way.windows):
        schedule.reset_stats()
        begin = time.perf_counter()
        schedule.step(x, target=x)
        samples["window_ms"].append((time.perf_counter() - begin) * 1e3)
        stats = schedule.stats()
        for key, name in SECONDS.items():
            samples[key].append(stats[name] * 1e3)
    schedule.drain()
    schedule.close()
    return {
        **{key: statistics.median(values) for key, values in samples.items()},
        "memory": stats["memory"][at],
        "resident_bytes": resident_bytes(),
    }


def resident_bytes() -> int:
    """Of this process, by the operating system."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


def row_of(way: Way, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of all processes."""
    worst = {key: max(one[key] for one in results) for key in ("window_ms", "reduce_ms", "exposed_ms", "gather_ms")}
    row = {
        "way": way.name,
        **{key: round(value, 3) for key, value in worst.items()},
        "exposed_percent": round(100 * max(one["exposed_ms"] / one["window_ms"] for one in results), 2),
        "reduce_percent": round(100 * max(one["reduce_ms"] / one["window_ms"] for one in results), 2),
        "resident_bytes": max(one["resident_bytes"] for one in results),
        **{f"{part}_bytes": max(one["memory"][part] for one in results) for part in ("optimizer", "masters", "total")},
    }
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def measures_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of the rows."""
    by_way = {row["way"]: row for row in rows}
    found = []
    for way in ("paci", "paci, ZeRO-1"):
        row = by_way[way]
        if row["reduce_percent"] > MOST_REDUCE_PERCENT:
            note = f"sums took {row['reduce_percent']:.0f} % of a window: measure on an idle machine"
            found.append(measure(f"{way}: exposed", row["exposed_percent"], "%", note=note))
        else:
            found.append(measure(f"{way}: exposed", row["exposed_percent"], "%", at_most=EXPOSED_PERCENT))
    whole, shards = by_way["paci"], by_way["paci, ZeRO-1"]
    held = [one["optimizer_bytes"] + one["masters_bytes"] for one in (whole, shards)]
    found.append(measure("optimizer and masters, whole over shared", held[0] / held[1], at_least=REPLICAS * 0.99))
    for way in ("paci, no overlap", "1f1b"):
        found.append(measure(f"{way}: exposed", by_way[way]["exposed_percent"], "%"))
    return found


def ways_of(args: argparse.Namespace) -> list[Way]:
    forward_ms, backward_ms = args.emulate_ms
    common = {
        "parameters": args.parameters,
        "accumulation": args.accumulation,
        "windows": args.windows,
        "forward_s": forward_ms / 1e3,
        "backward_s": backward_ms / 1e3,
    }
    half = args.accumulation // 2
    return [
        Way(name="1f1b", schedule="1f1b", overlap=0, shard=False, **common),
        Way(name="paci, no overlap", schedule="paci", overlap=0, shard=False, **common),
        Way(name="paci", schedule="paci", overlap=half, shard=False, **common),
        Way(name="paci, ZeRO-1", schedule="paci", overlap=half, shard=True, **common),
        Way(name="paci, look-ahead", schedule="paci", overlap=half, shard=False, lookahead=True, **common),
        Way(name="paci, ZeRO-1, look-ahead", schedule="paci", overlap=half, shard=True, lookahead=True, **common),
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=positive, default=2_000_000, help="of a stage")
    parser.add_argument("--accumulation", type=positive, default=8, help="micro-batches a window of one replica")
    parser.add_argument("--emulate-ms", type=list_of(float), default=[12.0, 24.0], metavar="F,B")
    parser.add_argument("--windows", type=positive, default=8)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    rows = [row_of(way, launch.run(work, REPLICAS * STAGES, (way,), timeout_s=600)) for way in ways_of(args)]
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    return finish_measures("replicas", measures_of(rows), {"settings": settings, "rows": rows}, args.json)


if __name__ == "__main__":
    sys.exit(main())
