"""Emulated stages last as long as they should, by a clock that only sleeps move."""

from __future__ import annotations

import pytest

import emulated


class Clock:
    def __init__(self) -> None:
        self.now, self.slept = 100.0, list[float]()

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.mark.parametrize(("work", "slept"), [(0.0, 3.0), (1.25, 1.75), (3.0, 0.0), (8.0, 0.0)])
def test_a_sleep_takes_what_the_work_has_left(monkeypatch: pytest.MonkeyPatch, work: float, slept: float) -> None:
    clock = Clock()
    monkeypatch.setattr(emulated, "time", clock)
    with emulated.lasting(3.0):
        clock.now += work
    assert clock.slept == [slept]


def test_work_that_fails_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(emulated, "time", clock)
    with pytest.raises(ZeroDivisionError), emulated.lasting(3.0):
        1 / 0  # noqa: B018
    assert clock.slept == []
