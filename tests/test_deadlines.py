"""The deadlines of the tests themselves."""

from __future__ import annotations

import time

import pytest

from support import deadlines


def busy(monkeypatch: pytest.MonkeyPatch, load: float, slowness: float, cores: int = 2) -> None:
    monkeypatch.setattr(deadlines, "_measured", None)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(deadlines, "slowness", lambda: slowness)
    monkeypatch.setattr(deadlines, "usable_cores", lambda: cores)


@pytest.mark.parametrize(
    ("load", "slowness", "expected"),
    [
        (0.0, 0.1, 10.0),  # never shorter than what was asked for
        (2.0, 1.0, 10.0),
        (6.0, 1.0, 30.0),  # three want each core
        (0.5, 2.5, 25.0),  # the load average lags behind
        (1000.0, 1.0, 10.0 * deadlines.MOST),
    ],
)
def test_deadlines_grow_with_the_load(
    monkeypatch: pytest.MonkeyPatch, load: float, slowness: float, expected: float
) -> None:
    busy(monkeypatch, load, slowness)
    assert deadlines.deadline(10.0) == pytest.approx(expected)


def test_the_load_is_measured_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    busy(monkeypatch, 8.0, 1.0)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    assert deadlines.factor() == 4.0
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert deadlines.factor() == 4.0
    now[0] += 1.1 * deadlines.VALID_S
    assert deadlines.factor() == 1.0


def test_slowness_is_what_a_loop_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([5.0, 5.0 + 3 * deadlines.NOMINAL_S])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    assert deadlines.slowness() == pytest.approx(3.0)


def test_waiting_ends_when_it_holds_or_fails_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    busy(monkeypatch, 0.0, 1.0)
    answers = iter([False, False, True])
    deadlines.wait_until(lambda: next(answers), 60, "unused")
    start = time.monotonic()
    with pytest.raises(AssertionError, match="it never came"):
        deadlines.wait_until(lambda: False, 0.1, "it never came")
    assert time.monotonic() - start >= 0.1
