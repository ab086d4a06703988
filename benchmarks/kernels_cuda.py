"""Cases of ``kernels.py --device cuda``: the Triton kernels against torch's sequences, CuPy, and plain copying.

A case's bandwidth is what its kernel must move at least (``paci_rt.kernels.*_bytes``) over its time; the yardstick is a
device-to-device copy in the same run. Buffers hold parameters of the shapes of GPT-2 Medium's blocks, as many as fill
``--megabytes`` of fp32, and every side works on its own.
"""

from __future__ import annotations

import functools
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common import could_not, measure
from kernels_cuda_sides import CUPY, WIDTH, WINDOW, Buffers, TorchSide, cupy_sides, foreach_lion, torch_nadam
from paci_rt import kernels
from paci_rt.kernels.wgrad import CUBLAS
from paci_rt.kernels.wgrad_routes import measure_ms as routes_measure_ms

LINEAR_SHAPES = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
COPY_SHARE = 0.92
PAIRS = ("pair", "pair, our sum")
AHEAD_CYCLES = 10_000_000
"""The device sleeps so long, some 5 ms, before what is timed: by then all of it has been issued, so that the time is
the device's and not the interpreter's."""

FLUSH_BYTES = 256 << 20
"""Written before each call that is timed."""
SETTLE_S = 1.0

Measure = Callable[[Callable[[], None]], float]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A speed that is asked for.

    Attributes:
        over: what the rivals are called together.
        rivals: the fastest of them counts.
        at_least: their time over ours.
        missing: why there are none.
    """

    over: str
    rivals: tuple[str, ...]
    at_least: float
    missing: str | None = None


@dataclass(frozen=True, kw_only=True)
class CudaCase:
    """One job done by us and by others.

    Attributes:
        name: what is done.
        bytes_moved: bytes that our side must move at least.
        ours: does it once.
        rivals: the others, by name.
        copy_share: least share of the copy bandwidth that is asked of our side, None where none is.
        shares_copy: whether that share is worth a row of its own where none is asked.
        asked: least speed over rivals.
    """

    name: str
    bytes_moved: int
    ours: Callable[[], object]
    rivals: dict[str, Callable[[], object]] = field(default_factory=dict)
    copy_share: float | None = None
    shares_copy: bool = False
    asked: tuple[Asked, ...] = ()


def flat_cases(numel: int, device: str) -> list[CudaCase]:
    """Accumulation and updates."""
    buffers = Buffers(numel, device)
    torch_side = TorchSide(buffers.shapes, buffers.grads, device)
    sides, missing = cupy_sides(buffers)
    count, low = buffers.count, torch.bfloat16
    adding = kernels.accumulate_bytes(count, low, overwrite=False)
    first = kernels.accumulate_bytes(count, low, overwrite=True)
    update = kernels.adamw_bytes(count, low)

    def rivals(job: str, run: Callable[[], object]) -> dict[str, Callable[[], object]]:
        return {"torch": run, **{name: getattr(side, job) for name, side in sides.items()}}

    def clear_and_add() -> None:
        torch._foreach_zero_(torch_side.sums)
        torch_side.accumulate()

    return [
        CudaCase(
            name="accumulate bf16",
            bytes_moved=adding,
            ours=buffers.accumulate,
            rivals=rivals("accumulate", torch_side.accumulate),
            copy_share=COPY_SHARE,
        ),
        CudaCase(
            name="overwrite bf16",
            bytes_moved=first,
            ours=lambda: buffers.accumulate(overwrite=True),
            rivals={"torch": clear_and_add},
        ),
        CudaCase(
            name="adamw bf16",
            bytes_moved=update,
            ours=buffers.step,
            rivals=rivals("step", torch_side.step),
            copy_share=COPY_SHARE,
        ),
        CudaCase(
            name="adamw bf16 + last gradients",
            bytes_moved=kernels.adamw_bytes(count, low, fused_gradient=True),
            ours=lambda: buffers.step(fused=True),
        ),
        CudaCase(
            name=f"window of {WINDOW}",
            bytes_moved=first + (WINDOW - 1) * adding + update,
            ours=buffers.window,
            rivals=rivals("window", torch_side.window),
            asked=(
                Asked(over="torch", rivals=("torch",), at_least=1.5),
                Asked(over="CuPy", rivals=CUPY, at_least=1.0, missing=missing),
            ),
        ),
    ]


def other_updates(numel: int, device: str) -> list[CudaCase]:
    """Updates of which no speed is asked, on buffers of their own."""
    buffers = Buffers(numel, device)
    cases = []
    for name, ours, theirs, moved in (
        ("nadam", buffers.nadam, torch_nadam, kernels.nadam_bytes),
        ("lion", buffers.lion, foreach_lion, kernels.lion_bytes),
    ):
        side = TorchSide(buffers.shapes, buffers.grads, device, theirs)
        case = CudaCase(
            name=f"{name} bf16",
            bytes_moved=moved(buffers.count, torch.bfloat16),
            ours=ours,
            rivals={"torch": side.step},
            shares_copy=True,
        )
        cases.append(case)
    return cases


def wgrad_case(rows: int, n: int, k: int, device: str, measure_ms: Measure = routes_measure_ms) -> CudaCase:
    """The fused weight gradient by its fastest route, against a bf16 product that is accumulated afterwards, by torch
    or by our own kernel, and each route alone."""
    dy = torch.randn(rows, n, device=device).bfloat16()
    x = torch.randn(rows, k, device=device).bfloat16()
    front, total = torch.zeros(n, k, device=device), torch.zeros(n, k, device=device)
    layout = kernels.FlatLayout([(0, n * k)], n * k, torch.device(device))
    statistics = kernels.GradientStatistics(layout)
    routes = kernels.WgradRoutes(measure_ms)
    routes(front, dy, x, overwrite=True)

    def pair() -> None:
        kernels.accumulate(layout, statistics, total.view(-1), [(dy.t() @ x).view(-1)], overwrite=False)

    rivals: dict[str, Callable[[], object]] = {PAIRS[0]: lambda: total.add_(dy.t() @ x), PAIRS[1]: pair}
    for route in kernels.routes_for(dy.dtype, dy.device):
        name = CUBLAS if route == CUBLAS else route.replace("triton:", "")
        rivals[name] = lambda route=route: kernels.wgrad(front, dy, x, overwrite=False, route=route)  # type: ignore[misc]
    return CudaCase(
        name=f"wgrad {rows}x{n}x{k}",
        bytes_moved=kernels.wgrad_bytes(rows, n, k, dy.dtype, overwrite=False, bias=False),
        ours=lambda: routes(front, dy, x, overwrite=False),
        rivals=rivals,
        asked=(Asked(over="the unfused pair", rivals=PAIRS, at_least=1.10),),
    )


@functools.cache
def flush_buffer(device: str) -> Tensor:
    """More than any second-level cache holds."""
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


def time_ms(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, by events on the device, whose caches hold nothing of use when it begins."""
    if device == "cpu":
        start_s = time.perf_counter()
        run()
        return (time.perf_counter() - start_s) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush_buffer(device).zero_()
    torch.cuda._sleep(AHEAD_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


class Copy:
    """A copy of ``numel`` fp32 on a device, the yardstick; it takes part in every round of every case."""

    def __init__(self, numel: int, device: str) -> None:
        self._source, self._target = torch.randn(numel, device=device), torch.empty(numel, device=device)
        self.bytes_moved = 2 * self._source.nbytes
        """Read and written."""

    def __call__(self) -> None:
        self._target.copy_(self._source)

    def settle(self, device: str) -> None:
        """Keep the device at it until its clocks have gone up."""
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            self()
            if device != "cpu":
                torch.cuda.synchronize()


def able(case: CudaCase, device: str) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Rivals of a case that run, and why the others do not. Ours has to."""
    case.ours()
    rivals, refused = {}, {}
    for name, run in case.rivals.items():
        try:
            run()
            if device != "cpu":
                torch.cuda.synchronize()
        except Exception as error:  # a rival's failure, whatever it is, costs that rival
            refused[name] = f"{name} failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
        else:
            rivals[name] = run
    return rivals, refused


def run_case(case: CudaCase, rounds: int, copy: Copy, device: str) -> dict[str, Any]:
    """All sides and the copy in turn, ``rounds`` times; medians, and medians of the ratios within a round."""
    rivals, refused = able(case, device)
    sides = {"copy": copy, "ours": case.ours, **rivals}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 3):
        for name, run in sides.items():
            elapsed = time_ms(run, device)
            if number >= 3:  # the first ones compile and fill caches of addresses
                times[name].append(elapsed)
    ratios = {
        name: statistics.median(theirs / ours for ours, theirs in zip(times["ours"], times[name], strict=True))
        for name in rivals
    }
    ours_ms, copy_ms = statistics.median(times["ours"]), statistics.median(times["copy"])
    copied = statistics.median(once / ours for ours, once in zip(times["ours"], times["copy"], strict=True))
    share = copied * case.bytes_moved / copy.bytes_moved
    judged = measures(case, share, ratios, refused)
    return {
        "case": case.name,
        "ours_ms": ours_ms,
        "rivals_ms": {name: statistics.median(times[name]) for name in rivals},
        "refused": refused,
        "gb_per_s": case.bytes_moved / ours_ms / 1e6,
        "copy_gb_per_s": copy.bytes_moved / copy_ms / 1e6,
        "copy_share": share,
        "ratios": ratios,
        "times_ms": times,
        "measures": judged,
        "ok": all(row["ok"] is not False for row in judged),
    }


def measures(case: CudaCase, share: float, ratios: dict[str, float], refused: dict[str, str]) -> list[dict[str, Any]]:
    """What is asked of a case, and what it gave."""
    rows = []
    if case.copy_share is not None or case.shares_copy:
        rows.append(measure(case.name, share, "of copy bandwidth", at_least=case.copy_share))
    for asked in case.asked:
        speed = min((ratios[name] for name in asked.rivals if name in ratios), default=None)
        failed = "; ".join(refused[name] for name in asked.rivals if name in refused)
        note = failed or (asked.missing if speed is None else None)
        rows.append(measure(f"{case.name} over {asked.over}", speed, "x", at_least=asked.at_least, note=note))
    return rows


def run_all(
    numel: int,
    rounds: int,
    *,
    only: str = "",
    rows: int = 8192,
    device: str = "cuda",
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Run and print every case whose name contains ``only``; returns a row per case, the copy first.

    A case that fails is a row that says why, and the others go on. ``keep`` is called with the rows behind each case.
    """
    copy = Copy(numel, device)
    copy.settle(device)
    copy_ms = statistics.median(time_ms(copy, device) for _ in range(rounds + 3))
    bandwidth = copy.bytes_moved / copy_ms / 1e6
    print(f"{'device-to-device copy':30s} {bandwidth:29.1f} GB/s")
    print(f"{'case':30s} {'ours ms':>9s} {'GB/s':>8s} {'of copy':>8s}  rivals: time over ours")
    copied = measure("device-to-device copy", bandwidth, "GB/s")
    done: list[dict[str, Any]] = [{"case": "copy", "gb_per_s": bandwidth, "measures": [copied], "ok": True}]

    def judge(name: str, make: Callable[[], CudaCase]) -> None:
        if only not in name:
            return
        try:
            row = run_case(make(), rounds, copy, device)
        except Exception as error:
            traceback.print_exc()
            done.append({"case": name, "measures": [could_not(name, error)], "ok": False})
        else:
            done.append(row)
            show(row)
        keep(done)

    def judge_all(name: str, make: Callable[[], list[CudaCase]]) -> None:
        try:
            cases = make()
        except Exception as error:
            traceback.print_exc()
            done.append({"case": name, "measures": [could_not(name, error)], "ok": False})
            return
        for case in cases:
            judge(case.name, lambda case=case: case)  # type: ignore[misc]

    # One list after the other, of which nothing is left behind: both need not fit into memory.
    for title, make in (("flat buffers", flat_cases), ("other updates", other_updates)):
        judge_all(title, functools.partial(make, numel, device))
    for n, k in LINEAR_SHAPES:
        judge(f"wgrad {rows}x{n}x{k}", lambda n=n, k=k: wgrad_case(rows, n, k, device))  # type: ignore[misc]
    return done


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    absent = [f"({judged['note']})" for judged in row["measures"] if judged.get("note")]
    others = "  ".join([*(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items()), *absent])
    print(
        f"{row['case']:30s} {row['ours_ms']:9.3f} {row['gb_per_s']:8.1f} {row['copy_share']:8.2f}  {others}"
        f"{'' if row['ok'] else '  MISSED'}",
        flush=True,
    )
