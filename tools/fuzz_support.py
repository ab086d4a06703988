"""What all fuzz targets share: values, and the property that a call works or raises a documented error in time.

A target is a hypothesis strategy and a check. ``tests/fuzz`` runs each for a few examples, ``tools/fuzz.py`` for
as long as it is told to.
"""

from __future__ import annotations

import contextlib
import dis
import math
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from paci_rt.errors import ActionError, PaciError, ScheduleError

PACKAGE = Path(__file__).resolve().parents[1] / "paci_rt"
CASE_LIMIT_S = 20.0
LONGEST_LINE = 1500

counts: Counter[str] = Counter()
"""Cases by target, and by ``target: how it ended``."""


class Target(NamedTuple):
    """One thing to fuzz.

    Attributes:
        cost: about how many milliseconds a case takes; dear ones get fewer.
    """

    name: str
    strategy: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    cost: float = 1.0


class Undocumented(AssertionError):
    """A call ended as no documentation says."""


# ---------------------------------------------------------------------------------------------------------- values

WEIRD: list[Any] = [
    *(True, False, None, 0.5, -1.5, math.nan, math.inf, -math.inf, 1e308, -0.0, 5e-324),
    *("", "3", "auto", "\0", "a\nb", "\ud800", "x" * 5000, "ℵ", b"3", bytearray(b"3")),
    *([], {}, (), set(), [1, [2]], {"a": 1}, (1, 2), object(), Ellipsis, NotImplemented, int, len, 3 + 4j),
    *(np.int64(3), np.float64(2.0), np.zeros(3), np.array(4), torch.tensor(2), torch.zeros(2, 2), 10**400, -(10**400)),
    *(2**31, 2**31 - 1, 2**54, 2**63 - 1, 2**63, 2**64, -(2**63), 10**6, 10**9),
]
weird = st.sampled_from(WEIRD)
huge = st.sampled_from([2**20, 2**31 - 1, 2**31, 2**54, 2**63, 10**6, 10**12, 10**30, 10**400, -1, -(2**31), 0])
words = st.text(max_size=12) | st.sampled_from(["", "\0", "a\nb", "\ud800", "x" * 5000, "paci", "../..", "-1", "--x"])
floats = st.floats() | st.sampled_from([0.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, 1e-300, 1e300])


def often(usual: st.SearchStrategy[Any], *others: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """``usual`` in about five of six cases."""
    rest = st.one_of(*others) if others else weird
    return st.integers(0, 5).flatmap(lambda roll: rest if roll == 5 else usual)


def small(least: int, most: int) -> st.SearchStrategy[Any]:
    """An integer that is mostly in range."""
    return often(st.integers(least, most), huge, weird)


def times(most: int = 4) -> st.SearchStrategy[Any]:
    """A tuple of times, mostly fine ones."""
    fine = st.floats(0, 10)
    return often(st.lists(fine, min_size=1, max_size=most).map(tuple), st.lists(floats, max_size=5).map(tuple), weird)


def some_of(options: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """A few of the options, each with a value."""
    return st.fixed_dictionaries({}, optional=options)


# ------------------------------------------------------------------------------------------------------ the property


def last_frame(trace: TracebackType | None) -> tuple[FrameType, int]:
    """The frame that an exception came from, and its last instruction."""
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame, trace.tb_lasti


def why_undocumented(error: BaseException) -> str:
    """Empty for a documented error: one of the package's, or a ValueError or TypeError that it raises itself."""
    if isinstance(error, PaciError):
        pass
    elif not isinstance(error, (ValueError, TypeError)):
        return f"a {type(error).__name__}"
    else:
        frame, at = last_frame(error.__traceback__)
        if PACKAGE not in Path(frame.f_code.co_filename).parents:
            return f"a {type(error).__name__} from {Path(frame.f_code.co_filename).name}"
        if dis.opname[frame.f_code.co_code[at]] not in ("RAISE_VARARGS", "RERAISE"):
            return f"a {type(error).__name__} that Python raised in {Path(frame.f_code.co_filename).name}"
    text = str(error)
    if isinstance(error, (ScheduleError, ActionError)):  # which quote more: a grid, or the error of a module
        return ""
    if "\n" in text or "\r" in text or "\0" in text:
        return "a message of several lines"
    if len(text) > LONGEST_LINE:
        return f"a message of {len(text)} characters"
    return "" if text.strip() else "a message without a word"


@contextlib.contextmanager
def limit(seconds: float = CASE_LIMIT_S) -> Iterator[None]:
    """Raises Undocumented in a case that takes longer; in the main thread."""

    def late(_signal: int, frame: FrameType | None) -> None:
        where = "" if frame is None else f", in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        raise Undocumented(f"no end within {seconds:g} s{where}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


REFUSED = object()


def attempt(target: str, call: Callable[[], Any], *, seconds: float = CASE_LIMIT_S) -> Any:
    """The result of a call, or REFUSED where it raised a documented error.

    Raises:
        Undocumented: it ended otherwise.
    """
    try:
        with limit(seconds):
            result = call()
    except Undocumented:
        raise
    except Exception as error:
        why = why_undocumented(error)
        if why:
            raise Undocumented(f"{target}: {why}: {type(error).__name__}: {str(error)[:300]!r}") from error
        counts[f"{target}: {type(error).__name__}"] += 1
        return REFUSED
    counts[f"{target}: works"] += 1
    return result


def holds(condition: bool, what: str) -> None:
    """What an oracle says of a call that worked."""
    if not condition:
        raise Undocumented(f"wrong result: {what}")
