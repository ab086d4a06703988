"""The last events of a channel's end, for transports whose channels are written in Python.

The native core's channels keep the same events, with the same names (``csrc/p2p/channel.hpp``).
"""

from __future__ import annotations

import json
import time
from collections import deque

KEPT = 64
"""Events that a channel's end remembers."""


class EventRing:
    """Events of one end of a channel.

    Args:
        edge: the channel's name. side: ``sender`` or ``receiver``.
    """

    def __init__(self, edge: str, side: str, timeout_s: float) -> None:
        self._edge, self._side, self._timeout_s = edge, side, timeout_s
        self._events: deque[tuple[int, str, int | None, int | None, int | None]] = deque(maxlen=KEPT)

    def note(self, event: str, sequence: int | None = None, index: int | None = None, size: int | None = None) -> None:
        """Remember that something happened now."""
        self._events.append((time.monotonic_ns(), event, sequence, index, size))

    def json(self, sent: int | None, taken: int | None) -> str:
        """The object of this end in a dump; ``sent`` and ``taken`` are sequence numbers, None where unknown."""
        events = []
        for at, event, sequence, index, size in self._events:
            fields = {"time_ns": at, "event": event, "sequence": sequence, "index": index, "bytes": size}
            events.append({key: value for key, value in fields.items() if value is not None})
        return json.dumps(
            {
                "edge": self._edge,
                "side": self._side,
                "slots": None,
                "timeout_s": self._timeout_s,
                "sent": sent,
                "taken": taken,
                "events": events,
            }
        )
