"""Which behaviours of torch wait for a part of the package that is still to come."""

from __future__ import annotations

from typing import Any

import pytest


def waits(*parts: str) -> Any:
    """A test, or a case, that fails until these parts are there, and must not fail then."""
    return pytest.mark.xfail(strict=True, reason=f"waits for: {', '.join(parts)}")


def single(*parts: str) -> list[Any]:
    """torch's schedules of one stage a rank, as cases ``(class, several)`` that wait for ``parts``."""
    return [_case(kind, False, parts) for kind in ("ScheduleGPipe", "Schedule1F1B")]


def several(*parts: str) -> list[Any]:
    """torch's schedules of several stages a rank; two of them are still to come."""
    late = ("ScheduleLoopedBFS", "ScheduleInterleavedZeroBubble")
    return [_case("ScheduleInterleaved1F1B", True, parts), *(_case(kind, True, ("schedules",)) for kind in late)]


def _case(kind: str, many: bool, parts: tuple[str, ...]) -> Any:
    return pytest.param(kind, many, id=kind, marks=[waits(*parts)] if parts else [])
