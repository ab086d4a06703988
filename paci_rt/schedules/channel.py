"""The channels between stages: what travels, from which stage, to which stage."""

from __future__ import annotations

from typing import NamedTuple

_ANSWER = {"F": "B", "B": "F", "TG": "TW", "TW": "TG", "NF": "NB", "NB": "NF"}


class Channel(NamedTuple):
    """Messages of one kind from one stage to another. They arrive in the order in which they were sent.

    Attributes:
        kind: "F" (activations), "B" (their gradients), "TG<n>" (the gradient of tied weight ``n``), "TW<n>" (the
            updated weight), or "NF" and "NB" (norms of a window, to the last stage and back).
        sender, receiver: stages.
    """

    kind: str
    sender: int
    receiver: int

    @property
    def name(self) -> str:
        """For people, for example ``F 0->1``."""
        return f"{self.kind} {self.sender}->{self.receiver}"

    @property
    def is_tied(self) -> bool:
        """Whether a tied weight or its gradient travels here."""
        return self.kind[0] == "T"

    @property
    def tied_weight(self) -> int:
        """The number of the tied weight; only where ``is_tied``."""
        return int(self.kind[2:])

    def opposite(self) -> Channel:
        """The channel that answers: gradients to activations, tied weights to their gradients."""
        letters, number = (self.kind[:2], self.kind[2:]) if self.is_tied else (self.kind, "")
        return Channel(_ANSWER[letters] + number, self.receiver, self.sender)

    def __str__(self) -> str:
        return self.name
