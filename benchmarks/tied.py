"""How long do stages wait for an embedding and a head that share one table? Nothing is asked of PACI but not to stall.

The first stage looks rows up in the table and updates it, the last one multiplies by its copy; all other work of a
stage is a sleep. In every window the last stage sends a gradient of the table's size and takes the updated table.

    python benchmarks/tied.py [--rows 50257 --width 1024 --stages 4 --accumulation 8 --emulate-ms 150,300] [--json FILE]

*exposed* are the seconds that a stage spends in sending and taking gradient and table, waiting included, over those of
its windows; *copies* is what the same messages take where they are ready at once: four copies of the table.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
from torch import Tensor, nn

import paci_rt
from common import finish, list_of, positive, print_table
from paci_rt import launch
from paci_rt.action import Op

ASKED_SHARE = 0.05
TIED = (Op.SEND_TG, Op.RECV_TG, Op.SEND_TW, Op.RECV_TW)


class Sleep(torch.autograd.Function):
    """Takes its times, forward and backward, and changes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times_s: tuple[float, float]) -> Tensor:
        time.sleep(times_s[0])
        ctx.backward_s = times_s[1]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.backward_s)
        return grad, None


class Block(nn.Module):
    """One stage: the table where it is first or last, a small weight, and a sleep."""

    def __init__(self, args: argparse.Namespace, at: int) -> None:
        super().__init__()
        self.times_s = (args.emulate_ms[0] / 1e3, args.emulate_ms[1] / 1e3)
        self.first, self.last = at == 0, at == args.stages - 1
        if self.first:
            self.table: nn.Module = nn.Embedding(args.rows, args.width)
        elif self.last:
            self.table = nn.Linear(args.width, args.rows, bias=False)
        if self.first or self.last:
            nn.init.normal_(self.table.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        self.scale = nn.Parameter(torch.ones(args.width))

    def forward(self, x: Tensor) -> Tensor:
        """Token numbers to hidden states on the first stage, hidden states to logits on the last one."""
        x = self.table(x) if self.first else x
        x = Sleep.apply(x, self.times_s) * self.scale
        return self.table(x) if self.last else x  # type: ignore[no-any-return]


def stage(ctx: launch.Context, args: argparse.Namespace, schedule: str) -> dict[str, Any]:
    """One stage of one case: seconds in each kind of message of the tied table, and in all windows."""
    module = Block(args, ctx.rank)
    own = paci_rt.PipelineStage(module, ctx.rank, args.stages)
    last = args.stages - 1
    tie = paci_rt.TiedWeight(owner_stage=0, owner="table.weight", reader_stage=last, reader="table.weight")
    pipe = paci_rt.get_schedule_class(schedule)(
        own,
        args.accumulation,
        lambda logits, ids: nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()),
        optimizer=paci_rt.AdamW(own.parameters(), lr=1e-3),
        tied_weights=[tie],
    )
    seconds = dict.fromkeys(TIED, 0.0)
    _watch(pipe, seconds)
    ids = torch.randint(args.rows, (args.accumulation, args.tokens), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        pipe.step(*((ids,) if ctx.rank == 0 else ()), target=ids if ctx.rank == last else None, return_outputs=False)

    for _ in range(2):
        step()
    pipe.reset_stats()
    seconds.update(dict.fromkeys(TIED, 0.0))
    begin_s = time.perf_counter()
    for _ in range(args.windows):
        step()
    wall_s, exposed = time.perf_counter() - begin_s, {op.value: taken for op, taken in seconds.items()}
    pipe.drain()
    digest = paci_rt.params_sha256([("table", module.table.weight)]) if hasattr(module, "table") else ""
    pipe.close()
    return {"wall_s": wall_s, "exposed_s": exposed, "table_sha256": digest}


def _watch(pipe: Any, seconds: dict[Op, float]) -> None:
    """Count the seconds of some operations of a pipeline."""
    run = pipe._executor._run_op

    def timed(op: Op, inner: Any) -> Any:
        def call(*args: Any) -> Any:
            begin_s = time.perf_counter()
            try:
                return inner(*args)
            finally:
                seconds[op] += time.perf_counter() - begin_s

        return call

    for op in seconds:
        run[op] = timed(op, run[op])


def row_of(schedule: str, args: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the stages of one case report."""
    first, last = results[0], results[-1]
    parts = {name: first["exposed_s"][name] + last["exposed_s"][name] for name in first["exposed_s"]}
    table = torch.empty(args.rows, args.width)
    begin_s = time.perf_counter()
    for _ in range(4):
        table.clone()
    copies_s = time.perf_counter() - begin_s
    window_s = max(one["wall_s"] for one in results) / args.windows
    return {
        "schedule": schedule,
        "table_mb": round(table.nbytes / 1e6, 1),
        "window_s": round(window_s, 4),
        **{f"{name}_s": round(taken / args.windows, 4) for name, taken in parts.items()},
        "exposed_share": round(max(sum(one["exposed_s"].values()) / one["wall_s"] for one in (first, last)), 4),
        "copies_s": round(copies_s, 4),
        "equal_copies": first["table_sha256"] == last["table_sha256"],
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--schedules", type=list_of(str), default=["paci", "1f1b"])
    parser.add_argument("--rows", type=positive, default=50257)
    parser.add_argument("--width", type=positive, default=1024)
    parser.add_argument("--tokens", type=positive, default=4, help="of a micro-batch, for the head")
    parser.add_argument("--stages", type=positive, default=4)
    parser.add_argument("--accumulation", type=positive, default=8)
    parser.add_argument("--emulate-ms", type=list_of(float), default=[150.0, 300.0], metavar="F,B")
    parser.add_argument("--windows", type=positive, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = [row_of(name, args, launch.run(stage, args.stages, (args, name), timeout_s=900)) for name in args.schedules]
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    missed = [
        f"{row['schedule']}: exposed {100 * row['exposed_share']:.1f} % of a window (at most {100 * ASKED_SHARE:.0f} %)"
        for row in rows
        if row["schedule"] == "paci" and row["exposed_share"] > ASKED_SHARE
    ]
    missed += [f"{row['schedule']}: the copies differ" for row in rows if not row["equal_copies"]]
    finish("tied", rows, missed, args.json)


if __name__ == "__main__":
    main()
