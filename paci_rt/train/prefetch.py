"""What training needs next, made ready by a thread while it is at work."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

AHEAD = 2


class Prefetch(Generic[T]):
    """Calls ``make(step)`` for one step after another in a thread; use as a context manager, which ends the thread.

    Args:
        make: what a step needs; a pure function of it.
        steps: in the order in which they are taken.
        ahead: how many may lie ready.
    """

    def __init__(self, make: Callable[[int], T], steps: range, *, ahead: int = AHEAD) -> None:
        self._make, self._steps, self._ahead = make, steps, ahead
        self._made: deque[tuple[int, T]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.stall_s = 0.0  # that the takers waited, the first one aside
        self._taken = 0

    def __enter__(self) -> Prefetch[T]:
        self._thread = threading.Thread(target=self._run, args=(iter(self._steps),), name="prefetch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._made.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def take(self, step: int) -> T:
        """What ``step`` needs; waits for it.

        Raises:
            Exception: what ``make`` raised for this step.
        """
        begin_s = time.perf_counter()
        with self._changed:
            waits = not self._made
            while not self._made and self._error is None:
                self._changed.wait()
            if waits and self._taken:
                self.stall_s += time.perf_counter() - begin_s
            self._taken += 1
            if not self._made:
                assert self._error is not None
                raise self._error
            made_for, value = self._made.popleft()
            self._changed.notify_all()
        assert made_for == step, f"step {step} was asked for where {made_for} comes next"
        return value

    def _run(self, steps: Iterator[int]) -> None:
        for step in steps:
            with self._changed:
                while len(self._made) >= self._ahead and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
            try:
                value = self._make(step)
            except BaseException as error:  # raised where it is missed
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if not self._closed:
                    self._made.append((step, value))
                    self._changed.notify_all()
