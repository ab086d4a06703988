"""What do messages between stages on one GPU cost beside copying, and do they hide behind compute?

    python benchmarks/gpu_links.py [--transport ipc,nccl] [--bytes 4096,4194304,67108864] [--json FILE]

Two stages of one process, as ``paci_rt`` runs them, over each transport for GPUs: ``ipc`` copies, ``nccl`` sends to
itself. Between two GPUs, or two processes on one, measure with ``comm_overlap.py``. README.md in this folder defines
each number.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common import could_not, finish_measures, list_of, measure, positive, write_measures
from paci_rt import launch
from paci_rt.clock import HostClock
from paci_rt.profiling.link import seconds_between, written_bytes
from paci_rt.runtime.device_clock import clock_for
from paci_rt.schedules.channel import Channel
from paci_rt.transport.base import Message

TRANSPORTS = ("ipc", "nccl")
SIZES = (4 << 10, 4 << 20, 64 << 20)
DOWN = Channel("F", 0, 1)
JUDGED_BYTES = 64 << 20
"""From this size on bandwidth is judged: smaller messages stay in the caches, and latency counts."""
ASKED_SHARE = 0.90
ASKED_EXPOSED_PERCENT = 3.0
COPIES = 2
"""Of a message: into the channel's ring and out of it. On one GPU both are moved by the same memory."""
VOLUME_BYTES, LEAST_MESSAGES, MOST_MESSAGES = 2 << 30, 8, 64
WARM_UP = 4
SETTLE_PRODUCTS, MATRIX = 200, 4096
LIMIT_S = 75.0


class Wire:
    """A channel between two stages of this process."""

    def __init__(self, transport: Any) -> None:
        self._transport, self._number = transport, 0
        transport.open([DOWN])

    def send(self, tensor: Tensor) -> None:
        self._transport.send(DOWN, self._number, Message((tensor,), (False,)))

    def recv(self) -> Tensor:
        (tensor,) = self._transport.recv(DOWN, self._number).tensors
        assert tensor is not None
        self._number += 1
        return tensor

    def carry(self, tensor: Tensor) -> None:
        """One message, there and taken."""
        self.send(tensor)
        self.recv()


def seconds_of(work: Callable[[], object], count: int, clock: HostClock) -> float:
    """Mean seconds of a call, on the time line of the current stream, after a warm-up."""
    for _ in range(WARM_UP):
        work()
    marks = [clock.mark()]
    for _ in range(count):
        work()
    marks.append(clock.mark())
    return seconds_between(clock, marks)[0] / count


class Bench:
    """One transport, size by size; every number of a size comes from the same ``repeats`` rounds."""

    def __init__(self, wire: Wire, device: torch.device, *, repeats: int, compute_ms: float) -> None:
        self._wire, self._device, self._repeats = wire, device, repeats
        self._clock = clock_for(device)
        self._clock.mark()  # the first one waits for the device
        cuda = device.type == "cuda"
        size = MATRIX if cuda else 64
        self._a, self._b = (torch.randn(size, size, device=device) for _ in range(2))
        if cuda:
            self._a, self._b = self._a.bfloat16(), self._b.bfloat16()
        self._out = torch.empty_like(self._a)
        for _ in range(SETTLE_PRODUCTS if cuda else 1):  # clocks go up
            self._product()
        self._products = max(1, round(compute_ms / 1e3 / seconds_of(self._product, 20, self._clock)))

    def _product(self) -> None:
        torch.mm(self._a, self._b, out=self._out)

    def _compute(self) -> None:
        for _ in range(self._products):
            self._product()

    def verify(self, nbytes: int) -> None:
        """Random bytes arrive as they were sent.

        Raises:
            RuntimeError: they do not.
        """
        sent = [torch.randint(256, (nbytes,), dtype=torch.uint8).to(self._device) for _ in range(2)]
        for tensor in sent:
            self._wire.send(tensor.clone())  # let go of at once
            if not torch.equal(self._wire.recv(), tensor):
                raise RuntimeError(f"a message of {nbytes} bytes arrived with other bytes than were sent")

    def size(self, nbytes: int) -> dict[str, Any]:
        """Seconds of a message, a copy, compute, and compute with a message, round by round."""
        self.verify(nbytes)
        source = written_bytes(nbytes, self._device)
        target = torch.empty_like(source)
        count = min(MOST_MESSAGES, max(LEAST_MESSAGES, VOLUME_BYTES // nbytes))

        def both() -> None:
            self._wire.send(source)
            self._compute()
            self._wire.recv()

        works: dict[str, tuple[Callable[[], object], int]] = {
            "copy_s": (lambda: target.copy_(source), count),
            "message_s": (lambda: self._wire.carry(source), count),
            "compute_s": (self._compute, LEAST_MESSAGES),
            "both_s": (both, LEAST_MESSAGES),
        }
        found: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self._repeats):
            for name, (work, times) in works.items():
                found[name].append(seconds_of(work, times, self._clock))
        return {"bytes": nbytes, "repeats": found}


def row_of(name: str, sample: dict[str, Any]) -> dict[str, Any]:
    """Medians, and medians of what is compared within a round."""
    found, nbytes = sample["repeats"], sample["bytes"]
    pairs = list(zip(*(found[key] for key in ("copy_s", "message_s", "compute_s", "both_s")), strict=True))
    exposed = [100 * (both - compute) / compute for _, _, compute, both in pairs]
    return {
        "transport": name,
        **sample,
        "message_us": statistics.median(found["message_s"]) * 1e6,
        "copy_gb_per_s": nbytes / statistics.median(found["copy_s"]) / 1e9,
        "message_gb_per_s": nbytes / statistics.median(found["message_s"]) / 1e9,
        "of_copy": statistics.median(copy / message for copy, message, _, _ in pairs),
        "of_copies": statistics.median(COPIES * copy / message for copy, message, _, _ in pairs),
        "compute_us": statistics.median(found["compute_s"]) * 1e6,
        "exposed_percent": statistics.median(exposed),
    }


def measures_of(row: dict[str, Any], *, judged: bool) -> list[dict[str, Any]]:
    """Rows of ``make gpu``'s table."""
    name = f"{row['transport']}, {size_text(row['bytes'])}"
    hides = judged and row["message_us"] <= row["compute_us"] / 2
    exposed = measure(
        f"{name}: exposed behind compute",
        row["exposed_percent"],
        f"% of {row['compute_us'] / 1e3:.2g} ms",
        at_most=ASKED_EXPOSED_PERCENT if hides else None,
    )
    if row["bytes"] < JUDGED_BYTES:
        return [measure(f"{name}: a message", row["message_us"], "us"), exposed]
    return [
        measure(f"{name}: of one copy", row["of_copy"], f"({row['copy_gb_per_s']:.0f} GB/s)"),
        measure(
            f"{name}: of the {COPIES} copies that it is",
            row["of_copies"],
            "",
            at_least=ASKED_SHARE if judged else None,
        ),
        exposed,
    ]


def size_text(nbytes: int) -> str:
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor and nbytes % factor == 0:
            return f"{nbytes // factor} {unit}"
    return f"{nbytes} B"


def work(ctx: launch.Context, name: str, sizes: Sequence[int], repeats: int, compute_ms: float) -> dict[str, Any]:
    """In a process of its own, since one that NCCL has left waiting cannot go on; rows are reported as they come."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    from paci_rt.transport.ipc import IpcTransport
    from paci_rt.transport.nccl import NcclTransport

    # Not by make_transport, which knows that stages of one process need none.
    kind = {"ipc": IpcTransport, "nccl": NcclTransport}[name]
    transport = kind(None, num_stages=2, chunks=2, device=device)
    try:
        bench = Bench(Wire(transport), device, repeats=repeats, compute_ms=compute_ms)
        for nbytes in sizes:
            ctx.report(row_of(name, bench.size(nbytes)))
        transport.flush()
        stats: dict[str, Any] = transport.stats()
        return stats
    finally:
        transport.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transport", type=list_of(_transport), default=list(TRANSPORTS), help="default: ipc,nccl")
    parser.add_argument("--bytes", type=list_of(positive), default=list(SIZES), help="of a message")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds of each size (default 5)")
    parser.add_argument("--compute-ms", type=float, default=5.0, help="compute that is to hide a message (default 5)")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    options = parser.parse_args(arguments)
    if not options.compute_ms > 0:
        parser.error(f"--compute-ms {options.compute_ms}: give a number above 0")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; run it where there is one")
    measures: list[dict[str, Any]] = []
    details: dict[str, Any] = {"rows": [], "transports": {}}

    def keep(row: dict[str, Any]) -> None:
        details["rows"].append(row)
        measures.extend(measures_of(row, judged=True))
        write_measures("gpu_links", measures, details, options.json)

    for name in options.transport:
        try:
            (stats,) = launch.run(
                work, 1, (name, options.bytes, options.repeats, options.compute_ms), on_report=keep, timeout_s=LIMIT_S
            )
            details["transports"][name] = stats
        except Exception as error:
            traceback.print_exc()
            measures.append(could_not(f"{name} on one GPU", error))
    return finish_measures("gpu_links", measures, details, options.json)


def _transport(text: str) -> str:
    if text not in TRANSPORTS:
        raise ValueError(f"{text!r} is not a transport for GPUs: choose from {', '.join(TRANSPORTS)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
