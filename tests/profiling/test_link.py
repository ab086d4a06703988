"""Latency and bandwidth of links, and the clocks that tell them."""

from __future__ import annotations

import itertools

import pytest
import torch

from paci_rt.profiling.link import measure_link, ping_pong
from paci_rt.runtime.device_clock import clock_for
from support.marks import slow


@pytest.mark.parametrize("transport", [slow("auto"), slow("gloo"), "shm"])
def test_the_link_between_two_processes(transport):
    link = measure_link(1 << 18, transport=transport, rounds=3)
    assert 0 <= link.hop_s < 1
    assert link.bandwidth_bytes_per_s > 0


def test_links_that_cannot_be_measured(monkeypatch):
    with pytest.raises(ValueError, match="large_bytes is 1024: give at least 65536"):
        measure_link(1024)
    with pytest.raises(ValueError, match="rounds is 0"):
        measure_link(rounds=0)
    with pytest.raises(ValueError, match="unknown transport 'pigeon'"):
        measure_link(transport="pigeon")
    with pytest.raises(ValueError, match="transport 'local' passes messages by reference and has no link"):
        measure_link(transport="local")
    monkeypatch.setattr("paci_rt.profiling.link.check_transport", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="transport 'nccl' is for GPUs, and torch finds none here"):
        measure_link(transport="nccl")


def test_to_and_fro_on_two_clocks(monkeypatch):
    def play(device: str, first: bool) -> tuple[list[float], list[str]]:
        steps = []
        times = ping_pong(
            lambda: steps.append("send"),
            lambda: steps.append("recv"),
            first=first,
            rounds=3,
            clock=clock_for(torch.device(device)),
        )
        return times, steps

    now = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    assert play("cpu", True) == ([0.5] * 3, ["send", "recv"] * 13)
    assert play("cpu", False) == ([0.5] * 3, ["recv", "send"] * 13)

    class Event:
        waited = 0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            self.at_ms = float(next(now)) ** 2

        def synchronize(self) -> None:
            Event.waited += 1

        def elapsed_time(self, other: Event) -> float:
            return other.at_ms - self.at_ms

    now = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    times, _ = play("cuda", True)
    assert times == pytest.approx([0.5e-3, 1.5e-3, 2.5e-3])  # halves of 1 - 0, 4 - 1 and 9 - 4 ms
    assert Event.waited == 1 + 3  # for the first mark, and for the three ends once everything has been issued
