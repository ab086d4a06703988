"""How many multiprocessors of a GPU transfers keep busy."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def blocks_in_use(work: Callable[[], None]) -> int:
    """Run ``work`` under ``torch.profiler``: the largest number of thread blocks that its kernels had at once.

    A block of a transfer kernel occupies one multiprocessor (NCCL's have up to 640 threads), whether it moves bytes or
    waits for the other side, so this is the number of multiprocessors that transfers take from compute at most. Copies
    by copy engines launch no kernel and count 0. ``work`` must leave nothing on the device that waits.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return most_blocks(events)


def most_blocks(events: Iterable[Mapping[str, Any]]) -> int:
    """The largest sum of the grids of kernels that run at the same time, in a Chrome trace of the profiler."""
    changes = []
    for event in events:
        if event.get("cat") == "kernel":
            blocks = math.prod(event["args"]["grid"])
            changes += [(event["ts"], blocks), (event["ts"] + event["dur"], -blocks)]
    running = most = 0
    for _, change in sorted(changes):  # at equal times those that end come first
        running += change
        most = max(most, running)
    return most
