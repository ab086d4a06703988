"""When actions began and ended: by the host's clock, or on a GPU by events on the stream that they ran on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Done = Callable[[float, float], None]
"""Is told seconds of begin and end, on the scale of ``time.perf_counter``."""


class HostClock:
    """For work that is over when its call returns."""

    deferred = False
    """Whether seconds are told later, since marks are not read at once."""

    def mark(self) -> Any:
        """Now, for :meth:`between`."""
        return time.perf_counter()

    def between(self, begin: Any, end: Any, done: Done) -> None:
        """Tell ``done`` about two marks, now or later."""
        done(begin, end)

    def settle(self) -> None:
        """Wait until ``done`` has been told about everything."""
