"""torch's streams and events on the host twin: what Python tells a GPU, on a machine without one.

Tensors stay on the CPU and are computed at once; only the order that streams and events make is that of the twin.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from paci_rt import native
from paci_rt.optim import stage_optimizer
from paci_rt.optim.update_stream import UpdateStream
from paci_rt.runtime import engine, stage, streams
from paci_rt.runtime.device_clock import DeviceClock
from paci_rt.transport import local
from support.deadlines import deadline

core = native.core()


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing
        self.event = core.Event(0, FakeStream.twin)
        self.at_s = 0.0

    def record(self, stream: FakeStream | None = None) -> None:
        stream = stream or FakeStream.current
        FakeStream.twin.launch(0, stream.real, self._stamp)
        self.event.record(stream.real)

    def _stamp(self) -> None:
        self.at_s = time.perf_counter()

    def query(self) -> bool:
        return bool(self.event.done)

    def synchronize(self) -> None:
        self.event.synchronize()

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.timed and other.timed
        return (other.at_s - self.at_s) * 1e3


class FakeStream:
    twin: Any = None
    current: FakeStream

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("cuda", 0)
        self.real = core.Stream(0, priority, FakeStream.twin)
        self.cuda_stream = self.real.handle

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        event.event.block(self.real)


@contextmanager
def _use(stream: FakeStream) -> Iterator[None]:
    before, FakeStream.current = FakeStream.current, stream
    try:
        yield
    finally:
        FakeStream.current = before


def install(patch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Let stages believe that they are on a GPU; returns bytes and stream of every tensor that was kept for another
    stream than its own."""
    FakeStream.twin = native.testing().HostTwin(0, 0)
    FakeStream.current = FakeStream()
    kept: list[tuple[int, int]] = []
    patch.setattr(torch.cuda, "Stream", FakeStream)
    patch.setattr(torch.cuda, "Event", FakeEvent)
    patch.setattr(torch.cuda, "stream", _use)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream.current)
    patch.setattr(native, "make_weight_gate", lambda buckets, device: core.WeightGate(buckets, 0, FakeStream.twin))
    patch.setattr(stage_optimizer, "update_order", lambda device: UpdateStream(torch.device("cuda", 0)))
    patch.setattr(engine, "clock_for", lambda device: DeviceClock(torch.device("cuda", 0)))
    patch.setattr(streams, "_is_on_gpu", lambda tensor: True)
    patch.setattr(local, "_gpu_of", lambda message: torch.device("cuda", 0))
    patch.setattr(torch.Tensor, "record_stream", lambda self, stream: kept.append((self.nbytes, stream.cuda_stream)))
    return kept


def give_streams(stages: list[stage.PipelineStage]) -> None:
    for one in stages:
        one.stream = FakeStream()  # type: ignore[assignment]


def hold(stream: FakeStream) -> threading.Event:
    """Keeps a stream from going on until the event is set."""
    gate = threading.Event()
    FakeStream.twin.launch(0, stream.real, lambda: gate.wait(deadline(30)))
    return gate
