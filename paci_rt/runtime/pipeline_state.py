"""What a pipeline saves and takes over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from paci_rt.optim.stage_optimizer import StageOptimizer
from paci_rt.runtime import guard_memory
from paci_rt.runtime.guard import Guard
from paci_rt.runtime.module_state import named_keepers
from paci_rt.runtime.stage import PipelineStage
from paci_rt.runtime.state_dict import Apply, Parts, check_state, collect_state

if TYPE_CHECKING:
    from paci_rt.runtime.replicas import Replicas
    from paci_rt.runtime.saving import Saving


class PipelineState(ABC):
    """The half of :class:`paci_rt.runtime.engine.Pipeline` that is about state."""

    saving: Saving | None = None
    """The checkpoint that is being written."""
    saving_wait_s = 0.0
    """Seconds that training has waited for one to be written."""
    _lr_schedulers: list[Any | None]
    _next_window: int
    _start_window: int

    @property
    @abstractmethod
    def stages(self) -> list[PipelineStage]:
        """The stages of this process."""

    @property
    @abstractmethod
    def replicas(self) -> Replicas | None:
        """The replicas of this process's stages."""

    @property
    @abstractmethod
    def transfer_timeout_s(self) -> float:
        """Deadline of a wait for another stage, in seconds."""

    @property
    @abstractmethod
    def guards(self) -> Mapping[int, Guard | None]:
        """By stage, what stands between gradients and weights; None where there is no optimizer."""

    @property
    @abstractmethod
    def _optimizers(self) -> list[StageOptimizer]: ...

    @abstractmethod
    def drain(self) -> None:
        """Run what is owed."""

    @abstractmethod
    def _check_usable(self) -> None: ...

    @abstractmethod
    def _follow_modules(self) -> None: ...

    @abstractmethod
    def _restart(self, version: int) -> None: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this process's stages. Names are the modules' own; where two stages share a name, all
        names are prefixed by ``stages.<index>.``."""
        pairs = [(stage, name, param) for stage in self.stages for name, param in stage.named_parameters()]
        unique = len({name for _, name, _ in pairs}) == len(pairs)
        for stage, name, param in pairs:
            yield (name if unique else f"stages.{stage.stage_index}.{name}"), param

    @property
    def windows_begun(self) -> int:
        """Local updates so far, with those that are still owed."""
        return self._next_window

    @property
    def _parts(self) -> Parts:
        return Parts(
            named=dict(self.named_parameters()),
            stages=self.stages,
            bounds=self._optimizers,
            schedulers=self._lr_schedulers,
        )

    def state_names(self) -> dict[str, list[list[str]]]:
        """For each stage the names of its ``params``, ``buffers`` and ``extra_state``; what several stages have is with
        the first of them."""
        parts = self._parts
        name_of, seen = parts.name_of, set[str]()
        names: dict[str, list[list[str]]] = {"params": [], "buffers": [], "extra_state": []}
        for stage in self.stages:
            names["params"].append([name_of[param] for param in stage.parameters()])
            for kind, keepers in zip(("buffers", "extra_state"), named_keepers([stage], parts.prefixed), strict=True):
                names[kind].append([name for name in keepers if name not in seen])
                seen.update(keepers)
        return names

    def state_dict(self) -> dict[str, Any]:
        """Drain, then return copies of all that training goes on from.

        Keys: ``params``, ``buffers`` (persistent ones) and ``extra_state`` (of ``get_extra_state``) by name;
        ``optimizer``, the state of each parameter by its name; ``optimizers``, for each stage the class of its
        ``optimizer``, the options of its parameter ``groups`` with their members' names, and its ``lr_scheduler``;
        ``windows``, the local updates so far; ``safety``, norms that spikes are told by, and loss scales.
        Random generators are the caller's.

        Raises:
            ValueError: stages of this process share the name of a buffer and differ in its value.
        """
        self.drain()
        self._follow_modules()
        state = collect_state(self._parts, self._next_window)
        return {**state, "safety": guard_memory.collect(self.guards, self.stages[0].num_stages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Drain, then take over a state of :meth:`state_dict`. Without ``optimizer`` in it, optimizers, schedulers and
        the count of updates stay as they are.

        Raises:
            ValueError: names, shapes, dtypes, optimizers, parameter groups or schedulers that do not fit; nothing but
                the drain has happened then.
        """
        self.drain()
        take = self.check_state_dict(state)
        take()

    def check_state_dict(self, state: dict[str, Any]) -> Apply:
        """Check a state without changing anything; what is returned drains and takes it over.

        Raises:
            ValueError: as :meth:`load_state_dict`.
        """
        self._check_usable()
        self._follow_modules()
        take_parts = check_state(state, self._parts)
        windows = int(state["windows"]) if "optimizer" in state else None
        guarded = windows is not None and state.get("safety") is not None
        recall = guard_memory.check(state["safety"], self.guards, self.stages[0].num_stages) if guarded else None

        def take() -> None:
            self.drain()
            take_parts()
            if windows is not None:
                self._next_window = self._start_window = windows
            self._restart(self._next_window)
            if recall is not None:
                recall()

        return take
