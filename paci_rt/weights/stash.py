"""Policies ``stash`` and ``2bw``: whole versions of a stage's weights.

They keep whole flat buffers, allocated once. An update copies the current version into the buffer of the oldest one,
which nobody needs any more, and steps there; parameters are then views of that buffer. What autograd saved in a forward
is either a view of the buffer that the forward used, or the parameter itself, which points to that buffer again for the
time of the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from paci_rt.optim.flat import FlatGroup, FlatHome
from paci_rt.schedules import policies
from paci_rt.weights.base import StageWeights


class KeptVersions(StageWeights):
    """Policies ``stash`` and ``2bw``.

    Args:
        policy: one of the two.
        groups: the stage's flat parameters.
        held: versions to keep, the current one among them.
    """

    whole = True

    def __init__(self, policy: str, groups: Sequence[FlatGroup], held: int) -> None:
        self._policy, self._groups, self._held = policy, list(groups), held
        self._homes: list[list[FlatHome]] = [
            [group.home, *(group.make_home() for _ in range(held - 1))] for group in self._groups
        ]
        self._shift = 0
        self.extra_bytes = sum(home.weight.nbytes for homes in self._homes for home in homes[1:])

    def for_forward(self, window: int, current: int, start: int) -> tuple[int, AbstractContextManager[None]]:
        version = policies.forward_version(self._policy, window, current, start)
        return version, self._at(version, current)

    def for_backward(self, at_forward: int, current: int) -> tuple[int, AbstractContextManager[None]]:
        version = policies.backward_version(self._policy, at_forward, current)
        return version, self._at(version, current)

    def begin_update(self, current: int) -> None:
        if self._held == 1:
            return
        for group, homes in zip(self._groups, self._homes, strict=True):
            new = homes[self._slot(current + 1)]
            new.weight.copy_(group.weight)
            group.move_to(new)

    def restart(self, current: int) -> None:
        if self._groups:
            now = self._groups[0].home
            self._shift = next(at for at, home in enumerate(self._homes[0]) if home is now) - current

    def _slot(self, version: int) -> int:
        return (version + self._shift) % self._held

    def _at(self, version: int, current: int) -> AbstractContextManager[None]:
        assert 0 <= current - version < self._held, f"version {version} is gone: {self._held} are kept up to {current}"
        return nullcontext() if version == current else self._pointing(version, current)

    @contextmanager
    def _pointing(self, version: int, current: int) -> Iterator[None]:
        for group, homes in zip(self._groups, self._homes, strict=True):
            group.move_to(homes[self._slot(version)])
        try:
            yield
        finally:
            for group, homes in zip(self._groups, self._homes, strict=True):
                group.move_to(homes[self._slot(current)])
