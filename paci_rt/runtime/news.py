"""What the stages of an asynchronous pipeline know of each other: norms, and windows that do not count.

Nothing is sent for it. A row for each stage rides on activations and gradients that travel anyway, whenever it has
changed; everyone keeps the newest row of each stage. What a stage knows at an action follows from the order of
actions, so all transports give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from paci_rt.action import Op
from paci_rt.runtime.other_norms import OtherNorms
from paci_rt.runtime.safety import KNOWN_WINDOWS
from paci_rt.transport.base import Message

UNKNOWN = -1.0
_MASK = (1 << KNOWN_WINDOWS) - 1


class News:
    """The newest row of each stage: windows decided, which of the last of them do not count, the sum of squares of the
    mean gradient in the last one that does, the loss scales of the last window decided and of the next one, and how
    often the row has changed.

    Args:
        stage, num_stages: whose they are.
    """

    def __init__(self, stage: int, num_stages: int) -> None:
        self.stage = stage
        self._rows: list[list[float]] = [_row(0) for _ in range(num_stages)]
        self._norms = OtherNorms(stage, num_stages)
        self._changes = 0
        self._sent: dict[Op, int] = {}
        self._packed: Tensor | None = None

    def restart(self, windows: int) -> None:
        """The pipeline is empty after ``windows`` windows: nobody knows more than that."""
        self._rows = [_row(windows) for _ in self._rows]
        self._norms.restart()
        self._sent.clear()
        self._changes = 0
        self._packed = None

    def decide(self, window: int, *, bad: bool, squares: float | None) -> None:
        """This stage has all gradients of ``window``."""
        row = self._rows[self.stage]
        mask = ((int(row[1]) << 1) | int(bad)) & _MASK
        known = row[2] if squares is None else squares
        if squares is not None:
            self._norms.hear(self.stage, window, squares)
        self._rows[self.stage] = [float(window + 1), float(mask), known, row[4], row[4], row[5] + 1]
        self._changed()

    def begin(self, scale: float) -> None:
        """The last stage: the next window to be decided has this loss scale."""
        if self._rows[self.stage][4] != scale:
            self._rows[self.stage][4] = scale
            self._rows[self.stage][5] += 1
            self._changed()

    def scale(self, window: int) -> float:
        """Loss scale of a window whose gradients are here, as the last stage has said."""
        row = self._rows[-1]
        return row[3] if int(row[0]) == window + 1 else row[4]

    def _changed(self) -> None:
        self._changes += 1
        self._packed = None

    def attach(self, op: Op, message: Message, device: torch.device) -> Message:
        """``message`` with what is new since the last one that went the same way, if anything is."""
        news = None
        if self._sent.get(op, 0) != self._changes:
            self._sent[op] = self._changes
            news = self.packed(device)
        return replace(message, tensors=(*message.tensors, news), requires_grad=(*message.requires_grad, news is None))

    def packed(self, device: torch.device) -> Tensor:
        """All rows, fp64 [stages, 6]."""
        if self._packed is None:
            self._packed = torch.tensor(self._rows, dtype=torch.float64)
        return self._packed if device.type == "cpu" else self._packed.to(device)

    def detach(self, message: Message) -> tuple[Message, bool]:
        """``message`` as it was, and whether anything in it was new."""
        news = message.tensors[-1]
        plain = replace(message, tensors=message.tensors[:-1], requires_grad=message.requires_grad[:-1])
        return plain, news is not None and self.merge(news)

    def merge(self, news: Tensor) -> bool:
        """Keep the newer rows of ``news``; whether there were any."""
        changed = False
        for at, theirs in enumerate(news.tolist()):
            if at != self.stage and theirs[5] > self._rows[at][5]:
                self._rows[at] = theirs
                changed = True
                window = int(theirs[0]) - 1
                if theirs[2] != UNKNOWN and not _marks(theirs, window):
                    self._norms.hear(at, window, theirs[2])
        if changed:
            self._changed()
        return changed

    def bad(self, windows: Iterable[int]) -> list[int]:
        """Those of ``windows`` that some stage has found not to count."""
        return [window for window in windows if any(_marks(row, window) for row in self._rows)]

    def decided_by_all(self) -> int:
        """Windows that every other stage has decided, from the first one on."""
        return int(min(row[0] for at, row in enumerate(self._rows) if at != self.stage))

    def lags(self, window: int) -> list[int]:
        """For each other stage by how many windows its last norm is older than ``window``; -1 where none has come."""
        others = (row for at, row in enumerate(self._rows) if at != self.stage)
        return [window + 1 - int(row[0]) if row[2] != UNKNOWN else -1 for row in others]

    def squares(self, window: int) -> float:
        """Sum of squares of the mean gradient of all stages in ``window``, which this stage has decided."""
        return self._norms.total(window)


def _row(windows: int) -> list[float]:
    return [float(windows), 0.0, UNKNOWN, 1.0, 1.0, 0.0]


def _marks(row: list[float], window: int) -> bool:
    back = int(row[0]) - 1 - window
    return 0 <= back < KNOWN_WINDOWS and bool(int(row[1]) >> back & 1)
