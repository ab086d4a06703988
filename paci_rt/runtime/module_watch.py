"""Follows modules that change between steps: what a stage has is compared with what it is bound to, and bound anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from paci_rt.errors import StageError
from paci_rt.runtime.assemble import Setup, bind
from paci_rt.runtime.bound_facts import BoundFacts
from paci_rt.runtime.module_checks import check_wrappers
from paci_rt.runtime.shared_memory import check_memory
from paci_rt.runtime.stage_runtime import StageRuntime


class ModuleWatch:
    """The facts of all stages of a process.

    Args:
        setup: what the pipeline runs.
        runtimes: by stage index, as the executor has them; a stage that is bound anew gets another one.
        here: ranks of this process, one or all.
        late: forwards of a step may run in a later one, with the modules of their own.
    """

    def __init__(self, setup: Setup, runtimes: dict[int, StageRuntime], *, here: int, late: bool = False) -> None:
        self._setup, self._runtimes, self._late = setup, runtimes, late
        self._all_here = here == setup.lowering.shape.ranks
        self._facts = {at: _facts_of(runtime) for at, runtime in runtimes.items()}
        self._failed: set[int] = set()
        self._left: dict[int, set[nn.Parameter]] = {at: set() for at in runtimes}

    def _changed(self) -> list[StageRuntime]:
        return [
            runtime
            for at, runtime in self._runtimes.items()
            if at in self._failed or self._facts[at].changed(runtime.stage.submod)
        ]

    def follow(self, drain: Callable[[], None], *, owed: bool) -> None:
        """Before a step: bind the stages anew that changed, with the optimizer state of the parameters that stay.

        Args:
            drain: runs what is owed.
            owed: micro-batches are in flight.

        Raises:
            StageError, ValueError: the change cannot be followed; the message names the parameter. Nothing has run.
        """
        changed = self._changed()
        for runtime in list(changed):
            stage, at = runtime.stage, runtime.stage.stage_index
            check_wrappers(stage.submod, at)
            if at not in self._failed and self._facts[at].only_modules_changed(stage.submod):
                if owed and self._late:
                    raise StageError(
                        f"stage {at}: {self._facts[at].difference(stage.submod)} while forwards of earlier "
                        "micro-batches are still to run in it: put it back, call drain() on all ranks, then change it"
                    )
                self._facts[at] = _facts_of(runtime)
                changed.remove(runtime)
        if not changed:
            return
        if owed:
            if not self._all_here:
                stage = changed[0].stage
                what = self._facts[stage.stage_index].difference(stage.submod)
                raise StageError(
                    f"stage {stage.stage_index}: {what} while micro-batches are in flight: call drain() on every rank, "
                    "now or before such a change"
                )
            drain()
        check_memory([runtime.stage for runtime in self._runtimes.values()], self._setup.lowering.ties)
        for runtime in changed:
            self._bind_anew(runtime)

    def _bind_anew(self, old: StageRuntime) -> None:
        stage = old.stage
        at = stage.stage_index
        what = self._facts[at].difference(stage.submod)
        if old.optimizer.shards is not None:
            raise StageError(
                f"stage {at}: {what} since the schedule was made, and its optimizer's state is shared out among "
                "replicas: save a checkpoint before such a change, and load it into a new schedule after it"
            )
        self._failed.add(at)
        self._left[at].update(self._facts[at].trained())
        stage.detach()
        old.optimizer.unbind()
        optimizer = old.optimizer.optimizer
        try:
            new = bind(self._setup, stage, old.audit.rank, optimizer, old.clock, may_wait=False, left=self._left[at])
        except ValueError as error:
            remedy = (
                ""
                if "was replaced" not in what
                else (
                    "; to change values only, copy them in place (load_state_dict() without assign=True, param.copy_())"
                )
            )
            raise StageError(f"stage {at}: {what} since the schedule was made, and {error}{remedy}") from error
        new.audit, new.after_update = old.audit, old.after_update
        new.weights.restart(old.audit.version)
        if new.guard is not None and old.guard is not None:
            new.guard.follow(old.guard)
            new.guard.restart(old.audit.version)
        self._runtimes[at] = new
        self._facts[at] = _facts_of(new)
        self._failed.discard(at)

    @contextmanager
    def as_begun(self) -> Iterator[None]:
        """Within it, micro-batches in flight are finished with the parameters trained that were when they began."""
        with ExitStack() as stack:
            for runtime in self._changed():
                facts = self._facts[runtime.stage.stage_index]
                stack.enter_context(facts.as_begun(runtime.stage.submod, runs_again=runtime.recompute or self._late))
            yield

    def check_after_step(self) -> None:
        """Make sure that no parameter came in the middle of a step.

        Raises:
            StageError: one did; the message names it.
        """
        for runtime in self._changed():
            stage = runtime.stage
            unbound = self._facts[stage.stage_index].unbound(stage.submod)
            if unbound:
                raise StageError(
                    f"stage {stage.stage_index}: parameter {unbound[0]!r} came, or was unfrozen, in the middle of a "
                    "step, whose gradients of it are lost: make and unfreeze parameters between steps"
                )


def _facts_of(runtime: StageRuntime) -> BoundFacts:
    return BoundFacts(runtime.stage.submod, runtime.optimizer.optimizer)
