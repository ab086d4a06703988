"""The random generators that a forward may draw from: torch's, Python's, NumPy's, and those that a module has made.

Generators of its own are found where a module, or a list, tuple or dict of it, has them as an attribute.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_Ways = tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]


def _set_bits(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


_WAYS: dict[type, _Ways] = {
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (lambda generator: generator.bit_generator.state, _set_bits),
}
_KINDS = tuple(_WAYS)


def generators_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The generators that ``modules`` have as attributes, each once."""
    found: dict[int, Any] = {}
    for module in modules:
        for value in module.__dict__.values():
            held = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
            for one in held:
                if isinstance(one, _KINDS):
                    found[id(one)] = one
    return list(found.values())


def _ways(generator: Any) -> _Ways:
    return next(ways for kind, ways in _WAYS.items() if isinstance(generator, kind))


@dataclass(frozen=True, slots=True)
class RandomState:
    """Where all generators are.

    Attributes:
        cpu, gpu: torch's. python, numpy: theirs.
        own: generators of the modules', each with its state.
    """

    cpu: Tensor
    gpu: Tensor | None
    python: Any
    numpy: Any
    own: list[tuple[Any, Any]] = field(default_factory=list)

    @staticmethod
    def take(device: torch.device, own: Iterable[Any] = ()) -> RandomState:
        """The state now; takes some 150 us, most of it for NumPy's.

        Args:
            device: the GPU whose generator counts, or the CPU.
            own: generators of the modules'.
        """
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        states = [(generator, _ways(generator)[0](generator)) for generator in own]
        return RandomState(torch.get_rng_state(), gpu, random.getstate(), np.random.get_state(), states)

    @contextmanager
    def again(self, device: torch.device) -> Iterator[None]:
        """Within it, random numbers go on from here; those outside of it are not touched."""
        now = RandomState.take(device, [generator for generator, _ in self.own])
        self.put(device)
        try:
            yield
        finally:
            now.put(device)

    def put(self, device: torch.device) -> None:
        """Let random numbers go on from here."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        for generator, state in self.own:
            _ways(generator)[1](generator, state)


__all__ = ["RandomState", "generators_of"]
