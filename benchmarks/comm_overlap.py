"""How fast do messages travel between stages, and how much of that hides behind compute?

Processes in a chain, one thread each, over every transport that works here and over torch.distributed's own calls.
README.md in this folder defines each number.

    python benchmarks/comm_overlap.py --json runs/overlap.json --plot runs/overlap.png
    python benchmarks/comm_overlap.py --processes 8 --transport shm,gloo --bytes 4096,4194304 --emulate
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import torch.distributed as dist

from common import finish, integer, list_of, positive, print_table
from overlap import measure, picture, report
from overlap.compute import EMULATED, GEMM
from overlap.wires import TRANSPORTS, WIRES
from paci_rt import launch
from paci_rt.cli.outputs import check_file
from paci_rt.errors import StageFailed
from paci_rt.report.machine import machine

CPU_BYTES = (4 << 10, 64 << 10, 1 << 20, 4 << 20)
GPU_BYTES = (*CPU_BYTES, 64 << 20)
QUICK_BYTES = (4 << 10, 4 << 20)
TIMEOUT_S = 1800.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", type=list_of(_transport), default=None, metavar="NAME,...",
                        help=f"from {', '.join(TRANSPORTS)} (default: all that work here)")  # fmt: skip
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True,
                        help="torch.distributed's isend/irecv and batch_isend_irecv too (default: yes)")  # fmt: skip
    parser.add_argument("--bytes", type=list_of(positive), default=None, metavar="N,...",
                        help="bytes per message (default: 4 KiB to 4 MiB, on a GPU to 64 MiB)")  # fmt: skip
    parser.add_argument("--processes", type=integer(2), default=2, metavar="N", help="in the chain (default: 2)")
    parser.add_argument("--compute-ms", type=list_of(_milliseconds), default=[10.0], metavar="MS,...",
                        help="compute that is to hide a transfer (default: 10)")  # fmt: skip
    parser.add_argument("--emulate", action=argparse.BooleanOptionalAction, default=None,
                        help="on a CPU: only sleeps in place of matrix products, or none (default: both)")  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=None, help="of everything (default: 5)")
    parser.add_argument("--quick", action="store_true", help="2 sizes, 2 repeats, fewer rounds")
    parser.add_argument("--json", default=None, metavar="FILE")
    parser.add_argument("--plot", default=None, metavar="FILE.png", help="hidden against exposed time")
    args = parser.parse_args(argv)
    try:
        picture.check(args.plot)
        check_file("--plot", args.plot)
        check_file("--json", args.json)
    except ValueError as error:
        parser.error(str(error))
    return args


def _transport(text: str) -> str:
    if text not in TRANSPORTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a transport: choose from {', '.join(TRANSPORTS)}")
    return text


def _milliseconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} ms of compute: give a number above 0")
    return value


def refusal(name: str, processes: int) -> str | None:
    """Why a wire cannot work here, as far as this process can know, and what to do about it."""
    kind = WIRES[name]
    if kind.device == "cuda":
        if not torch.cuda.is_available():
            return (
                "torch finds no CUDA device: run this on a machine with an NVIDIA GPU (paci-rt doctor says what is "
                "missing), or name others with --transport"
            )
        if kind.rival and not dist.is_nccl_available():
            return "this torch was built without NCCL: install one with CUDA"
        if kind.rival and processes > torch.cuda.device_count():
            return (
                f"torch.distributed takes one GPU per process, and there are {processes} processes for "
                f"{torch.cuda.device_count()}: use more GPUs, or --no-rivals"
            )
    if kind.backend == "gloo" and not dist.is_gloo_available():
        return "this torch was built without gloo: install one with it, or use --no-rivals"
    return None


def choose(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Wires to measure, and why others are left out, by name."""
    asked = args.transport or TRANSPORTS
    devices = {WIRES[name].device for name in asked}
    names = [
        name for name, kind in WIRES.items() if name in asked or (args.rivals and kind.rival and kind.device in devices)
    ]
    refused = {name: reason for name in names if (reason := refusal(name, args.processes)) is not None}
    return [name for name in names if name not in refused], refused


def lines_about(refused: dict[str, str]) -> list[str]:
    """One line a reason."""
    return [
        f"{', '.join(name for name in refused if refused[name] == reason)}: {reason}"
        for reason in dict.fromkeys(refused.values())
    ]


def make_plan(args: argparse.Namespace, device: str, wires: list[str]) -> measure.Plan:
    sizes = args.bytes or (QUICK_BYTES if args.quick else CPU_BYTES if device == "cpu" else GPU_BYTES)
    computes = (GEMM, EMULATED) if args.emulate is None else (EMULATED,) if args.emulate else (GEMM,)
    return measure.Plan(
        wires=tuple(wires),
        processes=args.processes,
        sizes=tuple(dict.fromkeys(sizes)),
        computes=computes if device == "cpu" else (GEMM,),
        compute_ms=tuple(dict.fromkeys(args.compute_ms)),
        repeats=args.repeats or (2 if args.quick else 5),
        quick=args.quick,
        gpus=torch.cuda.device_count() if device == "cuda" else 0,
    )


def run(plan: measure.Plan, device: str) -> list[measure.Results]:
    cores = machine()["cores"]
    print(f"\n{plan.processes} processes, one thread each, on {_where(device)}; {', '.join(plan.wires)}")
    print(f"compute of {', '.join(f'{ms:g}' for ms in plan.compute_ms)} ms: {' and '.join(plan.computes)}")
    if EMULATED in plan.computes:
        print("EMULATED compute: sleeps in place of the kernels, so the cores are free for transfers")
    if device == "cpu" and GEMM in plan.computes and 2 * plan.processes > cores:
        print(f"gemm: {plan.processes} computing processes leave none of {cores} cores to transfers only")

    def progress(found: dict[str, Any]) -> None:
        print(f"  repeat {found['repeat']} of {plan.repeats} done", flush=True)

    return launch.run(measure.run, plan.processes, (plan,), threads=1, on_report=progress, timeout_s=TIMEOUT_S)


def _where(device: str) -> str:
    if device == "cpu":
        return f"{machine()['cores']} cores"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


def print_rows(rows: list[report.Row], compared: list[report.Row]) -> None:
    for columns, measured, cells in (
        (report.LINK_COLUMNS, "link", report.link_cells),
        (report.OVERLAP_COLUMNS, "overlap", report.overlap_cells),
    ):
        print()
        for name, meaning in columns.items():
            print(f"  {name}: {meaning}")
        print()
        print_table(list(columns), [cells(row) for row in rows if row["measure"] == measured])
    if compared:
        print()
        columns = ["ratio", "bytes", "median", "spread", "asked"]
        print_table(columns, [_ratio_cells(entry) for entry in compared])


def _ratio_cells(entry: report.Row) -> list[Any]:
    spread = f"[{entry['low']:.3f}, {entry['high']:.3f}]"
    asked = "-" if entry["asked"] is None else f"{'<=' if 'latency' in entry['ratio'] else '>='} {entry['asked']:g}"
    return [entry["ratio"], report.size(entry["bytes"]), entry["median"], spread, asked]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    usable, refused = choose(args)
    rows: list[report.Row] = []
    for device in ("cpu", "cuda"):
        wires = [name for name in usable if WIRES[name].device == device]
        if not wires:
            continue
        plan = make_plan(args, device, wires)
        try:
            per_rank = run(plan, device)
        except (StageFailed, TimeoutError) as error:
            sys.exit(f"comm_overlap.py: {error}\nFAILED")
        refused |= per_rank[0].refused
        rows += report.summarise(per_rank, plan)
    compared = report.ratios(rows)
    if rows:
        print_rows(rows, compared)
    print()
    for line in lines_about(refused):
        print(f"skipped {line}")
    if args.plot and rows:
        picture.draw(args.plot, rows, f"Messages among {args.processes} processes, hidden behind compute and exposed")
        print(f"wrote {args.plot}")
    missed = lines_about({name: reason for name, reason in refused.items() if name in (args.transport or ())})
    if not (rows or missed):
        missed = ["nothing could be measured"]
    missed += report.missed(rows, compared, cores=machine()["cores"])
    finish("comm_overlap", [*rows, *compared], missed, args.json)


if __name__ == "__main__":
    main()
