"""Speed of the native CPU kernels against torch's, one row per case.

    python benchmarks/kernels.py [--json FILE] [--megabytes 256] [--rounds 9] [--threads 1]
    python benchmarks/kernels.py --device cuda [--megabytes 1024]        # the Triton kernels: kernels_cuda.py

Both sides of a case run in alternation on buffers far beyond the caches; a ratio is torch's time over ours in the same
round. Rows give medians, with the quartiles of the ratio. Ends with OK, or with FAILED and exit code 1 where a median
ratio misses its target. Targets are for one thread; with more, rows only inform.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels_lion import ForeachLion
from paci_rt import native
from paci_rt.optim import SGD, AdamW, Lion, NAdam
from paci_rt.optim.accumulator import GradAccumulator
from paci_rt.optim.bind import bind_optimizer
from paci_rt.optim.flat import FlatGroup
from paci_rt.report.machine import machine


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two ways to do the same job.

    Attributes:
        name: what is done.
        peer: what torch does for it.
        bytes_moved: bytes that our side must read and write, for the GB/s column.
        target: least median ratio that counts as success, None where the row only informs.
        before: untimed, ahead of each of our calls.
    """

    name: str
    peer: str
    bytes_moved: int
    ours: Callable[[], object]
    theirs: Callable[[], object]
    target: float | None = None
    before: Callable[[], object] = lambda: None


def _parameter(numel: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.randn(numel).to(dtype))


def accumulate_case(numel: int, dtype: torch.dtype, target: float | None) -> Case:
    """A micro-batch's gradient added to the fp32 sum."""
    accumulator = GradAccumulator(FlatGroup([("w", _parameter(numel, dtype))]))
    grad = torch.randn(numel).to(dtype)
    accumulator.add(0, grad)
    total = torch.zeros(numel)
    return Case(
        name=f"accumulate {str(dtype).removeprefix('torch.')}",
        peer="acc.add_(grad)",
        bytes_moved=numel * (8 + dtype.itemsize),
        ours=lambda: accumulator.add(0, grad),
        theirs=lambda: total.add_(grad),
        target=target,
    )


def overwrite_case(numel: int) -> Case:
    """The first micro-batch of a window, against clearing and adding."""
    accumulator = GradAccumulator(FlatGroup([("w", _parameter(numel, torch.bfloat16))]))
    grad = torch.randn(numel).bfloat16()
    total = torch.zeros(numel)

    def empty() -> None:
        if accumulator.state == "filling":
            accumulator.seal()
            accumulator.consume()
            accumulator.release()

    return Case(
        name="overwrite bfloat16",
        peer="acc.zero_().add_(grad)",
        bytes_moved=numel * 6,
        ours=lambda: accumulator.add(0, grad),
        theirs=lambda: total.zero_().add_(grad),
        before=empty,
    )


def _bound(optimizer_class: type, numel: int, dtype: torch.dtype, **options: Any) -> tuple[Any, nn.Parameter, Tensor]:
    param = _parameter(numel, dtype)
    bound = bind_optimizer(optimizer_class([param], **options), {"w": param})
    return bound, param, torch.randn(numel) * 1e-2


def named(optimizer_class: type, options: dict[str, Any]) -> str:
    """An optimizer and how it is implemented, for people."""
    if optimizer_class is ForeachLion:
        return "Lion by torch._foreach_*"
    return f"torch.optim.{optimizer_class.__name__}({'fused' if options.get('fused') else 'foreach'}=True)"


def step_case(
    name: str,
    numel: int,
    dtype: torch.dtype,
    ours: tuple[type, dict[str, Any]],
    theirs: tuple[type, dict[str, Any]],
    bytes_per_element: int,
    target: float | None,
) -> Case:
    """A whole update from a filled accumulator to an empty one, against torch's step and the clearing of ``.grad``."""
    bound, param, grad = _bound(ours[0], numel, dtype, **ours[1])
    peer_param = nn.Parameter(torch.randn(numel))
    peer_param.grad = grad.clone()
    peer = theirs[0]([peer_param], **theirs[1])

    def torch_step() -> None:
        peer.step()
        peer.zero_grad(set_to_none=False)

    return Case(
        name=f"{name} {str(dtype).removeprefix('torch.')}",
        peer=f"{named(*theirs)} step + zero_grad, float32",
        bytes_moved=numel * bytes_per_element,
        ours=lambda: bound.update(4),
        theirs=torch_step,
        target=target,
        before=lambda: bound.accumulate(param, grad),
    )


def run_case(case: Case, rounds: int, *, judge: bool) -> dict[str, Any]:
    """Alternate both sides and summarise; ``judge`` holds the median ratio against the case's target."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for round_number in range(rounds + 2):
        for side, action in (("ours", case.ours), ("theirs", case.theirs)):
            if side == "ours":
                case.before()
            start = time.perf_counter()
            action()
            elapsed_s = time.perf_counter() - start
            if round_number >= 2:  # the first two fault pages in and build optimizer state
                times[side].append(elapsed_s)
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    ours_s = statistics.median(times["ours"])
    target = case.target if judge else None
    return {
        "case": case.name,
        "peer": case.peer,
        "ours_ms": ours_s * 1e3,
        "peer_ms": statistics.median(times["theirs"]) * 1e3,
        "gb_per_s": case.bytes_moved / ours_s / 1e9,
        "ratio": median,
        "ratio_quartiles": [low, high],
        "target": target,
        "ok": target is None or median >= target,
    }


def cases(numel: int) -> list[Callable[[], Case]]:
    """All cases, each built only when its turn comes so that buffers of one do not crowd another."""
    adamw = (torch.optim.AdamW, {"lr": 1e-3, "fused": True})
    sgd = (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "fused": True})
    our_sgd = (SGD, {"lr": 1e-3, "momentum": 0.9})
    decay: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
    # Of torch's implementations the fastest that there is: NAdam has none that is fused.
    nadam = (torch.optim.NAdam, {**decay, "decoupled_weight_decay": True, "foreach": True})
    lion = (ForeachLion, {**decay, "betas": (0.9, 0.99)})
    return [
        lambda: accumulate_case(numel, torch.bfloat16, 8.0),
        lambda: accumulate_case(numel, torch.float16, None),
        lambda: accumulate_case(numel, torch.float32, None),
        lambda: overwrite_case(numel),
        lambda: step_case("adamw step+reset", numel, torch.float32, (AdamW, {"lr": 1e-3}), adamw, 28, 1.05),
        lambda: step_case("adamw step+reset", numel, torch.bfloat16, (AdamW, {"lr": 1e-3}), adamw, 30, None),
        lambda: step_case("sgd step+reset", numel, torch.float32, our_sgd, sgd, 20, None),
        lambda: step_case("nadam step+reset", numel, torch.float32, (NAdam, decay), nadam, 28, None),
        lambda: step_case("nadam step+reset", numel, torch.bfloat16, (NAdam, decay), nadam, 30, None),
        lambda: step_case("lion step+reset", numel, torch.float32, (Lion, decay), lion, 20, None),
        lambda: step_case("lion step+reset", numel, torch.bfloat16, (Lion, decay), lion, 22, None),
    ]


def main() -> int:
    """Run all cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels (default cpu)")
    parser.add_argument("--megabytes", type=int, help="size of one fp32 buffer (default 256, on a GPU 1024)")
    parser.add_argument("--rounds", type=int, help="timed rounds a case (default 9, on a GPU 21)")
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides (default 1)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--isa", default="auto", help="instruction set of our side (default auto)")
    options = parser.parse_args()
    options.megabytes = options.megabytes or (256 if options.device == "cpu" else 1024)
    options.rounds = (9 if options.device == "cpu" else 21) if options.rounds is None else options.rounds
    if min(options.megabytes, options.threads) < 1 or options.rounds < 2:
        parser.error("--megabytes and --threads must be at least 1, --rounds at least 2")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.device == "cuda":
        return main_cuda(options, parser)
    native.set_isa(options.isa)
    print(
        f"{'case':26s} {'ours ms':>9s} {'peer ms':>9s} {'GB/s':>7s} {'ratio':>7s} {'quartiles':>15s} {'target':>7s}  "
    )
    rows = []
    for build in cases(options.megabytes * 2**18):
        case = build()
        if options.only not in case.name:
            continue
        row = run_case(case, options.rounds, judge=options.threads == 1)
        rows.append(row)
        low, high = row["ratio_quartiles"]
        target = "-" if row["target"] is None else f"{row['target']:.2f}"
        print(
            f"{row['case']:26s} {row['ours_ms']:9.2f} {row['peer_ms']:9.2f} {row['gb_per_s']:7.1f} {row['ratio']:7.2f} "
            f"{low:7.2f}-{high:<7.2f} {target:>7s}  {'' if row['ok'] else 'MISSED'}",
            flush=True,
        )
    ok = all(row["ok"] for row in rows)
    if options.json is not None:
        measured_on = {
            **machine(),
            "isa": native.info()["isa"],
            "threads": options.threads,
            "huge_pages": _first_line(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        }
        document = {"benchmark": "kernels", "machine": measured_on, "options": _plain(options), "rows": rows, "ok": ok}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    print("OK" if ok else "FAILED")
    return 0 if ok else 1


def main_cuda(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The same on a GPU; returns the exit code."""
    if not torch.cuda.is_available():
        parser.error(
            "--device cuda: torch sees no CUDA device here; run it where there is one, or leave the option out"
        )
    from common import gpu_facts, write_json
    from kernels_cuda import run_all

    def keep(rows: list[dict[str, Any]]) -> None:
        if options.json is not None:
            document = {
                "benchmark": "kernels --device cuda",
                "machine": {**machine(), **gpu_facts()},
                "options": _plain(options),
                "measures": [judged for row in rows for judged in row["measures"]],
                "rows": rows,
                "ok": all(row["ok"] for row in rows),
            }
            write_json(options.json, document)

    rows = run_all(options.megabytes * 2**18, options.rounds, only=options.only, keep=keep)
    keep(rows)
    ok = all(row["ok"] for row in rows)
    print("OK" if ok else "FAILED")
    return 0 if ok else 1


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


def _first_line(path: Path) -> str | None:
    return path.read_text().splitlines()[0] if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
