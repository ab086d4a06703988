"""The clock of the device that a stage runs on."""

from __future__ import annotations

import time
from collections import deque

import torch

from paci_rt.clock import Done, HostClock


class DeviceClock(HostClock):
    """For work on a GPU, which is issued long before it runs. Marks are events on the stream that is current in torch.

    Args:
        device: a CUDA device.
    """

    deferred = True
    KEPT = 4096
    """Pairs of marks that are kept at most before finished ones are read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._origin: tuple[torch.cuda.Event, float] | None = None
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, Done]] = deque()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        if self._origin is None:
            event.synchronize()  # once: from here on the two clocks go side by side
            self._origin = event, time.perf_counter()
        return event

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event, done: Done) -> None:
        self._pending.append((begin, end, done))
        if len(self._pending) > self.KEPT:
            while self._pending and self._pending[0][1].query():
                self._tell()

    def settle(self) -> None:
        while self._pending:
            self._pending[0][1].synchronize()
            self._tell()

    def _tell(self) -> None:
        begin, end, done = self._pending.popleft()
        assert self._origin is not None
        first, at_s = self._origin
        begin_s = at_s + first.elapsed_time(begin) / 1e3
        # CUDA tells milliseconds in fp32, whose steps are a quarter of one an hour after the origin: good enough for
        # when an action began, not for how long it took.
        done(begin_s, begin_s + begin.elapsed_time(end) / 1e3)


def clock_for(device: torch.device) -> HostClock:
    """The clock of work on a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()
