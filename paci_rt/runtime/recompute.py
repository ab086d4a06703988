"""What it takes to run a forward once more, as if it were the first time: arguments, random numbers, buffers.

The second run sees the buffers and the plain attributes that the first one saw, and what it writes there does not
count.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paci_rt.errors import StageError
from paci_rt.runtime.activation_bytes import checkpoints, distinct_bytes
from paci_rt.runtime.modes import Mode, modules_of
from paci_rt.runtime.module_attributes import Attributes, Snapshot
from paci_rt.runtime.random_state import RandomState, generators_of
from paci_rt.runtime.trees import tensors

COMPARED_BYTES = 1 << 16
"""Larger buffers on the CPU are compared with their last copy before they are copied anew."""

Kept = dict[nn.Module, dict[str, Tensor | None]]
"""Copies of buffers, by module and name."""


class KeptBuffers:
    """Keeps what the buffers of a stage held before each forward; those that stand still are copied once."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the buffer, and its copy

    @torch.no_grad()
    def take(self, modules: Iterable[nn.Module]) -> tuple[Kept, int]:
        """Copies of all buffers of ``modules``, and the bytes that they take beyond those taken before."""
        kept: Kept = {}
        last, more_bytes = {}, 0
        for module in modules:
            if not module._buffers:
                continue
            copies: dict[str, Tensor | None] = {}
            for name, buffer in module._buffers.items():
                if buffer is None or not _copyable(buffer):
                    copies[name] = buffer
                    continue
                if id(buffer) not in last:  # modules may share it
                    known = self._last.get(id(buffer))
                    if known is None or not _unchanged(buffer, *known):
                        known = buffer, buffer.clone()
                        more_bytes += buffer.nbytes
                    last[id(buffer)] = known
                copies[name] = last[id(buffer)][1]
            kept[module] = copies
        self._last = last
        return kept, more_bytes


def _copyable(buffer: Tensor) -> bool:
    # A buffer that autograd knows is as good as a parameter; a meta tensor has nothing to keep.
    return not buffer.requires_grad and not buffer.is_meta


def _unchanged(buffer: Tensor, of: Tensor, copy: Tensor) -> bool:
    # By its values: neither batch normalization nor writes through .data move a version counter.
    if buffer is not of or not buffer.is_cpu or buffer.nbytes <= COMPARED_BYTES:
        return False
    return buffer.shape == copy.shape and buffer.dtype == copy.dtype and torch.equal(buffer, copy)


@contextmanager
def buffers_as(kept: Kept, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, ``modules`` have copies of the buffers in ``kept``; what is written into those is dropped."""
    now = [(module, dict(module._buffers)) for module in modules if module._buffers or module in kept]
    fresh: dict[int, Tensor] = {}  # buffers that were one tensor still are
    for module, _ in now:
        copies = kept.get(module, {})
        module._buffers.clear()
        for name, copy in copies.items():
            if copy is not None and _copyable(copy):
                if id(copy) not in fresh:
                    fresh[id(copy)] = copy.clone()
                copy = fresh[id(copy)]
            module._buffers[name] = copy
    try:
        yield
    finally:
        for module, buffers in now:
            module._buffers.clear()
            module._buffers.update(buffers)


@dataclass(kw_only=True, slots=True)
class Again:
    """A forward to be run once more.

    Attributes:
        args, kwargs, loss: what it was given.
        versions: of the tensors among them when it ran.
        random: state of the generators before it.
        attributes: of the modules, before it.
        modules, buffers: what their buffers held before it; buffer_bytes: what keeping that takes.
        roots: positions of the outputs that took part in autograd.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss: Callable[[Any], Tensor] | None
    versions: list[int]
    random: RandomState
    modules: Sequence[nn.Module]
    buffers: Kept
    buffer_bytes: int
    attributes: Snapshot
    roots: tuple[int, ...] = ()

    def kept_bytes(self, shares: Mapping[int, int]) -> int:
        """Bytes that are kept for it; of storages in ``shares`` no more than their share."""
        return self.buffer_bytes + distinct_bytes(tensors((*self.args, *self.kwargs.values())), shares=shares)

    @contextmanager
    def modules_back(self) -> Iterator[None]:
        """Within it, the modules' buffers and attributes hold what they held before the first run."""
        with buffers_as(self.buffers, self.modules), self.attributes.back():
            yield

    def check(self, stage: int, roots: tuple[int, ...] | None = None) -> None:
        """Make sure that the second run is one of the first.

        Args:
            stage: its number.
            roots: after the second run, positions of the outputs that took part in autograd.

        Raises:
            StageError: what it was given has been written to meanwhile, or an output has no gradient any more.
        """
        if roots is None:
            if versions_of(self.args, self.kwargs, self.loss) != self.versions:
                raise StageError(
                    f"stage {stage} runs its forward a second time, and what it was given has been modified in place "
                    "since the first: write into a tensor of its own instead, or use policy 'bounded' or 'stash'"
                )
        elif lost := sorted(set(self.roots) - set(roots)):
            raise StageError(
                f"stage {stage} runs its forward a second time, and output {lost[0]} no longer takes part in autograd, "
                "so its gradient would be lost: make the forward depend on nothing but inputs, weights, buffers and "
                "random numbers, or use policy 'bounded' or 'stash'"
            )


class Reruns:
    """Whether the forwards of one stage are run once more before their backwards, and why.

    Policy ``recompute`` says so itself. Activation checkpointing inside the module would compute a part of a forward
    anew at weights that the rest of it has not seen, where updates come in between: there, the whole forward is run
    again, as under that policy.

    Args:
        stage: its number.
        device: its device.

    Attributes:
        on: every forward is run again, because of checkpointing.
        possible: some may be.
        loss_modules: modules that the loss function is, or is a method of.
    """

    def __init__(self, stage: int, device: torch.device) -> None:
        self._stage, self._device = stage, device
        self.on = self.possible = self._drifts = False
        self.loss_modules: tuple[nn.Module, ...] = ()
        self._buffers = KeptBuffers()
        self._last: Mode | None = None  # looked for checkpointing under this mode
        self._looked: set[Any] = set()
        self._suspected = self._cleared = False
        self._attributes = Attributes()
        self._generators: list[Any] | None = None  # of the modules', as this step found them

    def watch(self, loss_fn: Any, *, recompute: bool, drifts: bool) -> None:
        """A schedule takes the stage.

        Args:
            loss_fn: of the last stage.
            recompute: the policy runs forwards again.
            drifts: weights may change between a forward and its backward.
        """
        self._drifts = drifts and not recompute
        self.possible = recompute or drifts
        while isinstance(loss_fn, partial):
            loss_fn = loss_fn.func
        owner = getattr(loss_fn, "__self__", loss_fn)
        self.loss_modules = (owner,) if isinstance(owner, nn.Module) else ()

    def doubtful(self, mode: Mode) -> bool:
        """Whether a forward under ``mode`` is the first, so that nobody knows whether it will checkpoint."""
        if not self._drifts or self.on or mode is self._last:
            return False
        self._last = mode
        return (mode.training, mode.checkpointing) not in self._looked

    def prepare(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Any, mode: Mode, roots: Sequence[nn.Module]
    ) -> Again:
        """Keep what it takes to run the forward again that comes now.

        Args:
            args, kwargs, loss: what it is given.
            mode: under which it runs.
            roots: the stage's module.
        """
        modules = mode.modules or modules_of((*roots, *self.loss_modules))
        buffers, buffer_bytes = self._buffers.take(modules)
        return Again(
            args=args,
            kwargs=kwargs,
            loss=loss,
            versions=versions_of(args, kwargs, loss),
            random=RandomState.take(self._device, self._own_generators(modules)),
            modules=modules,
            buffers=buffers,
            buffer_bytes=buffer_bytes,
            attributes=self._attributes.take(modules),
        )

    def begin(self) -> None:
        """A step begins: modules may be others since."""
        self._generators = None
        self._attributes.begin()

    def _own_generators(self, modules: Sequence[nn.Module]) -> list[Any]:
        if self._generators is None:
            self._generators = generators_of(modules)
        return self._generators

    def ran(self, again: Again) -> None:
        """The first run is over: see what it has changed."""
        if self._attributes.after(again.attributes):
            self._generators = None

    def wanted(self, outputs: Iterable[Tensor], mode: Mode, micro_batch: int) -> bool:
        """Whether the forward that has just run, prepared or not, is to be run again."""
        if not self.on:
            self._looked.add((mode.training, mode.checkpointing))
            if checkpoints(outputs):
                self._begin(micro_batch)
            elif self._suspected:
                self._cleared = True
        return self.on

    def seen_in_backward(self, micro_batch: int) -> None:
        """Layers of the stage have run in the backward of a micro-batch."""
        if self._drifts and not self.on:
            self._begin(micro_batch + 1)

    def nodes_made_in_backward(self) -> None:
        """Somebody has made autograd nodes in a backward: look at the next forward again.

        It may be a checkpoint, or a function whose backward calls another one. The latter is looked at once.
        """
        if self._drifts and not self.on and not self._cleared:
            self._suspected, self._last = True, None
            self._looked.clear()

    def _begin(self, micro_batch: int) -> None:
        self.on = True
        warnings.warn(
            f"stage {self._stage} checkpoints activations inside its module, and its weights change between a forward "
            f"and its backward: from micro-batch {micro_batch} on the whole forward runs again before the backward, at "
            "the weights of that time, which is what policy='recompute' means; policy='stash' has the plain gradient",
            stacklevel=2,
        )


def versions_of(args: Any, kwargs: Any, loss: Any) -> list[int]:
    """Version counters of all tensors that a forward is given."""
    given = (args, list(kwargs.values()), getattr(loss, "target", None))
    return [tensor._version for tensor in tensors(given) if not tensor.is_inference()]
