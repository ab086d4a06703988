"""Seconds of actions on a GPU, with events that tell time as CUDA's do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from paci_rt.runtime.device_clock import DeviceClock


class Event:
    """Milliseconds since the last start of a GPU, and between two events in fp32."""

    times: Iterator[float]

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.at_ms = next(Event.times)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        elapsed_ms = other.at_ms - self.at_ms
        assert elapsed_ms >= 0, "whether CUDA tells negative times is nowhere promised"
        return float(torch.tensor(elapsed_ms, dtype=torch.float32))


def test_short_actions_have_their_seconds_after_hours_too(monkeypatch: pytest.MonkeyPatch) -> None:
    hours_ms = 3 * 3.6e6
    Event.times = iter([5.0, 6.0, hours_ms + 0.3, hours_ms + 0.7, hours_ms + 0.1, hours_ms + 0.25])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    clock, seen = DeviceClock(torch.device("cuda", 0)), list[tuple[float, float]]()
    for _ in range(3):  # the third on another stream, where it began before the second
        begin = clock.mark()
        clock.between(begin, clock.mark(), lambda start, end: seen.append((start, end)))
    clock.settle()
    assert [end - start for start, end in seen] == pytest.approx([1e-3, 0.4e-3, 0.15e-3], abs=1e-7)
    assert seen[1][0] - seen[0][0] == pytest.approx(hours_ms / 1e3, abs=1e-2)
