"""What transfers are to hide behind: matrix products of a wanted length, or sleeps in their place."""

from __future__ import annotations

import ctypes
import statistics
import time
from typing import Protocol

import torch
import torch.distributed as dist

from paci_rt.profiling.link import seconds_between
from paci_rt.runtime.device_clock import clock_for

PR_SET_TIMERSLACK = 29  # <linux/prctl.h>
GEMM, EMULATED = "gemm", "emulated"
CPU_SIZE, GPU_SIZE = 256, 4096
CALIBRATION_ROUNDS = 9


class Compute(Protocol):
    def run(self) -> None:
        """Compute: until it is done on a CPU, on the current stream of a GPU."""


class Gemm:
    """Products of square matrices on ``device``, as many as take ``milliseconds`` on rank 0 while the others wait.

    fp32 matrices of 256 x 256 on a CPU, on the thread of the caller; bf16 of 4096 x 4096 on a GPU, which fill it.
    """

    def __init__(self, milliseconds: float, device: torch.device) -> None:
        cuda = device.type == "cuda"
        size, dtype = (GPU_SIZE, torch.bfloat16) if cuda else (CPU_SIZE, torch.float32)
        self._a, self._b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self._out = torch.empty(size, size, device=device, dtype=dtype)
        self.products = 8
        self.run()  # everywhere, so that a GPU has loaded its kernels before anything there waits for a neighbour
        found = [0]
        if dist.get_rank() == 0:
            clock = clock_for(device)
            marks = [clock.mark()]
            for _ in range(CALIBRATION_ROUNDS):
                self.run()
                marks.append(clock.mark())
            each_s = statistics.median(seconds_between(clock, marks)[1:]) / self.products
            found = [max(1, round(milliseconds / 1e3 / each_s))]
        dist.broadcast_object_list(found, 0)
        self.products = found[0]

    def run(self) -> None:
        for _ in range(self.products):
            torch.mm(self._a, self._b, out=self._out)


class Emulated:
    """A sleep: the core stays free, as a CPU is while a GPU computes."""

    def __init__(self, milliseconds: float) -> None:
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # sleeps end within microseconds
        self._seconds = milliseconds / 1e3

    def run(self) -> None:
        time.sleep(self._seconds)


def make_compute(name: str, milliseconds: float, device: torch.device) -> Compute:
    """``gemm`` or ``emulated``; all processes call it in the same order."""
    return Gemm(milliseconds, device) if name == GEMM else Emulated(milliseconds)
