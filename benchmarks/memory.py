"""How much memory does each stage take, by our count and by the operating system's?

    python benchmarks/memory.py [--seq-len 256,1024] [--schedules 1f1b,zb-2p,paci,paci-bare] [--dtypes fp32,bf16]
                                [--model gpt2-medium --stages 8] [--windows 3] [--json FILE]

One process per stage trains a real model on random tokens for a few updates; no data and no GPU are needed. A row for
each stage of each case:

- *system*: the largest proportional set size of the process, sampled from ``/proc/self/smaps_rollup`` from the second
  update on, less what the same process took after it had trained a tiny model in the same way. (In the first update,
  pages of messages that the other process has not looked at yet would count whole for the sender.)
- *by owner*: the same with messages counted for the process that owns them. In a proportional set size, pages that the
  receiver has not looked at yet count whole for the sender, so it depends on the moment.
- *malloc*: of that, freed memory that the C library keeps, by its own account at the peak (``mallinfo2``), less what it
  kept before.
- *counted*: ``stats()["memory"]``, what ``paci-rt train`` prints.
- *1f1b*: system, over that of the same stage under 1F1B-flush with equal options.

``paci-bare`` is PACI without look-ahead. ``autocast`` among the dtypes is fp32 under ``torch.autocast`` to bf16. Cases
run one after another; with ``--json`` those that the file has already are not run again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common import finish_measures, integer, list_of, measure, positive, write_measures
from paci_rt import launch
from paci_rt.report.text import size as text_of
from paci_rt.train.build import build_pipeline
from paci_rt.train.config import TrainConfig
from resident import Watch, kept_by_malloc_bytes, resident_parts

SCHEDULES = ("1f1b", "zb-2p", "paci", "paci-bare")
DTYPES = ("fp32", "bf16", "autocast")
AGREE = 0.05
"""Share of the count by which the system's may differ from it."""
EQUAL = 0.02
"""Share of 1F1B's memory by which PACI without look-ahead may differ from it."""
SLACK_BYTES = 32 << 20
"""What malloc keeps of freed memory, which no run repeats."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    Attributes:
        schedule: of ``SCHEDULES``. dtype: of ``DTYPES``.
        partition: blocks by stage; empty is the default. windows: updates.
    """

    schedule: str
    dtype: str
    seq_len: int
    model: str
    layers: int | None
    stages: int
    partition: tuple[int, ...]
    accumulation: int
    windows: int

    def config(self, *, tiny: bool = False) -> TrainConfig:
        """What ``paci-rt train`` would be told."""
        options: dict[str, Any] = {"partition": self.partition} if self.partition else {}
        options |= {} if self.layers is None else {"layers": self.layers}
        if tiny:
            options |= {"width": 16, "heads": 2, "vocab_size": 512}
        return TrainConfig(
            schedule="paci" if self.schedule == "paci-bare" else self.schedule,
            dtype="bf16" if self.dtype == "bf16" else "fp32",
            stages=self.stages,
            accumulation=self.accumulation,
            batch_size=self.accumulation,
            seq_len=min(64, self.seq_len) if tiny else self.seq_len,
            model=self.model,
            steps=self.windows,
            **({"lookahead": False} if self.schedule == "paci-bare" else {}),
            **options,
        )


def train(ctx: launch.Context, config: TrainConfig, case: Case, watch: Watch | None = None) -> dict[str, Any]:
    """Some updates, watched from the second on; the statistics of this process's stage."""
    pipeline, _ = build_pipeline(config, ctx)
    vocabulary = config.shape.vocab_size
    generator = torch.Generator().manual_seed(0)
    for window in range(case.windows):
        if watch is not None and window == 1:
            watch.start()
        tokens = torch.randint(vocabulary, (2, case.accumulation, config.seq_len), generator=generator)
        with torch.autocast("cpu", torch.bfloat16) if case.dtype == "autocast" else nullcontext():
            pipeline.step(
                *((tokens[0],) if pipeline.has_first else ()),
                target=tokens[1] if pipeline.has_last else None,
                return_outputs=False,
            )
    stats = pipeline.stats()
    pipeline.drain()
    if watch is not None:
        watch.stop()
    pipeline.close()
    return {"memory": stats["memory"][ctx.rank], "transport": stats["transport"]}


def work(ctx: launch.Context, case: Case) -> dict[str, Any]:
    """One stage: a tiny model first, which loads and starts all that a process needs, then the real one."""
    train(ctx, case.config(tiny=True), case)
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    bare, bare_kept = resident_parts(), kept_by_malloc_bytes()
    watch = Watch()
    found = train(ctx, case.config(), case, watch)
    kept = watch.kept_by_malloc - bare_kept
    return {**found, "bare": bare, "peak": watch.peak, "samples": watch.samples, "kept_by_malloc": kept}


def rows_of(case: Case, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each stage."""
    rows = []
    for stage, found in enumerate(results):
        system = {key: found["peak"][key] - found["bare"][key] for key in found["peak"]}
        row = {
            **asdict(case),
            "stage": stage,
            "transport": found["transport"],
            "system_bytes": system["Pss"],
            "system_anonymous_bytes": system["Pss_Anon"],
            "system_shared_bytes": system["Pss_Shmem"],
            "malloc_bytes": found["kept_by_malloc"],
            "bare_bytes": found["bare"]["Pss"],
            "counted_bytes": found["memory"]["total"],
            "counted": {key: value for key, value in found["memory"].items() if key != "total"},
            "system_over_counted": round(system["Pss"] / found["memory"]["total"], 4),
            "samples": found["samples"],
        }
        rows.append(row)
    return rows


def by_owner(row: dict[str, Any]) -> int:
    """What the system sees, with messages counted for the process that owns them."""
    return int(row["system_bytes"] - row["system_shared_bytes"] + row["counted"]["messages"])


def same_but(row: dict[str, Any], schedule: str, rows: list[dict[str, Any]], dtype: str | None = None) -> Any:
    """The row of the same stage and options under another schedule, or None."""
    keys = ("seq_len", "model", "stages", "accumulation", "stage")
    for other in rows:
        alike = other["schedule"] == schedule and other["dtype"] == (dtype or row["dtype"])
        if alike and all(other[key] == row[key] for key in keys):
            return other
    return None


def measures_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of the rows, the worst of each case."""
    found = []
    cases = dict.fromkeys((row["seq_len"], row["dtype"], row["schedule"]) for row in rows)
    for seq_len, dtype, schedule in cases:
        mine = [row for row in rows if (row["seq_len"], row["dtype"], row["schedule"]) == (seq_len, dtype, schedule)]
        name = f"{schedule}, {dtype}, sequence {seq_len}"
        off = max(abs(by_owner(row) - row["counted_bytes"]) / row["counted_bytes"] for row in mine)
        found.append(measure(f"{name}: system against count, worst", 100 * off, "%", at_most=100 * AGREE))
        pairs = [(row, same_but(row, "1f1b", rows)) for row in mine]
        pairs = [(row, other) for row, other in pairs if other is not None]
        if schedule == "paci-bare" and pairs:
            most = max(by_owner(row) / by_owner(other) - 1 for row, other in pairs)
            found.append(measure(f"{name}: over 1f1b, worst", 100 * most, "%", at_most=100 * EQUAL))
        if schedule == "paci" and pairs:
            # One copy of fp32 weights, half of that in bf16 beside masters: in either case one in the weights' dtype.
            over = max(
                (by_owner(row) - by_owner(other) - SLACK_BYTES) / row["counted"]["weights"] for row, other in pairs
            )
            found.append(measure(f"{name}: over 1f1b, copies of the weights", over, "", at_most=1.0))
        if schedule == "zb-2p" and pairs:
            first, other = pairs[0]
            ratio = first["counted"]["activations"] / other["counted"]["activations"]
            found.append(measure(f"{name}: activations over 1f1b, first stage", ratio))
        if dtype == "autocast":
            pairs = [(row, same_but(row, schedule, rows, "bf16")) for row in mine]
            saved = [row["system_bytes"] - other["system_bytes"] for row, other in pairs if other is not None]
            if saved:
                found.append(measure(f"{name}: autocast over bf16, first stage", saved[0] / 2**20, "MiB"))
    return found


def show(rows: list[dict[str, Any]], everything: list[dict[str, Any]]) -> None:
    """The table of one case."""
    first = rows[0]
    print(f"{first['schedule']}, {first['dtype']}, sequence {first['seq_len']} ({first['transport']})")
    parts = list(first["counted"])
    print(
        "  ".join(["stage", *(f"{part:>12s}" for part in [*parts, "counted", "system", "by owner", "malloc", "1f1b"])])
    )
    for row in rows:
        other = same_but(row, "1f1b", everything)
        over = "-" if other is None else f"{row['system_bytes'] / other['system_bytes']:.3f}"
        sizes = [text_of(row["counted"][part]) for part in parts]
        sizes += [text_of(row["counted_bytes"]), text_of(row["system_bytes"])]
        sizes += [text_of(by_owner(row)), text_of(row["malloc_bytes"]) if "malloc_bytes" in row else "-", over]
        print("  ".join([f"{row['stage']:5d}", *(f"{size:>12s}" for size in sizes)]), flush=True)


def cases_of(args: argparse.Namespace) -> list[Case]:
    return [
        Case(
            schedule=schedule,
            dtype=dtype,
            seq_len=seq_len,
            model=args.model,
            layers=args.layers,
            stages=args.stages,
            partition=tuple(args.partition or ()),
            accumulation=args.accumulation,
            windows=args.windows,
        )
        for seq_len in args.seq_len
        for dtype in args.dtypes
        for schedule in args.schedules
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=list_of(str), default=list(SCHEDULES), help=", ".join(SCHEDULES))
    parser.add_argument("--dtypes", type=list_of(str), default=["fp32", "bf16"], help=", ".join(DTYPES))
    parser.add_argument("--seq-len", type=list_of(positive), default=[256, 1024], metavar="N[,N...]")
    parser.add_argument("--model", default="gpt2-medium")
    parser.add_argument("--layers", type=positive, help="blocks in place of the model's own number")
    parser.add_argument("--stages", type=positive, default=8)
    parser.add_argument("--partition", type=list_of(positive), metavar="N,N,...", help="blocks of each stage")
    parser.add_argument("--accumulation", type=positive, default=8, help="micro-batches of one sequence per update")
    parser.add_argument("--windows", type=integer(2), default=3, help="updates")
    parser.add_argument("--timeout-s", type=positive, default=3600, help="of one case")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    for name, known in (("schedules", SCHEDULES), ("dtypes", DTYPES)):
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    if args.json and Path(args.json).exists():
        rows = json.loads(Path(args.json).read_text(encoding="utf-8")).get("rows", [])
    for case in cases_of(args):
        ident = json.loads(json.dumps(asdict(case)))
        mine = [row for row in rows if all(row.get(key) == value for key, value in ident.items())]
        if not mine:
            mine = rows_of(case, launch.run(work, case.stages, (case,), timeout_s=args.timeout_s))
            rows += json.loads(json.dumps(mine))
            write_measures("memory", [], {"rows": rows}, args.json)
        show(mine, rows)
    return finish_measures("memory", measures_of(rows), {"rows": rows}, args.json)


if __name__ == "__main__":
    sys.exit(main())
