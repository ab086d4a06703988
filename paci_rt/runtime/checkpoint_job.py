"""One save of a pipeline, with or without training going on beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from paci_rt.runtime.beside import among_beside, gather_beside
from paci_rt.runtime.checkpoint_write import Snapshot, Target, claimed, take_snapshot, write
from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.generators import collect_generators
from paci_rt.runtime.replica_checkpoint import generators_of_all, on_all, several
from paci_rt.runtime.replicas import require_same_weights
from paci_rt.runtime.saving import Saving
from paci_rt.runtime.together import FINE, failure_of, gather, raise_any
from paci_rt.schedules.lowering import TiedWeight


class Save:
    """Every process of a pipeline, and of its replicas, makes one and calls the same method of it.

    Args:
        target: where to.
        group: of one pipeline's processes.
    """

    def __init__(
        self,
        schedule: Pipeline,
        target: Target,
        tied_weights: Sequence[TiedWeight],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._schedule, self._target, self._ties, self._group = schedule, target, tied_weights, group
        self._replicas = several(schedule)

    def now(self) -> None:
        """Return when the checkpoint is whole."""
        snapshot = self._snapshot()
        with on_all(self._replicas):
            if snapshot is not None:
                write(self._target, snapshot, lambda one: gather(one, self._schedule, self._group), self._group)

    def beside(self, waited_s: float) -> Saving:
        """Return when there is a snapshot, which a thread writes."""
        snapshot = self._snapshot()
        held = {} if snapshot is None else snapshot.bytes_by_stage()
        saving = Saving(self._schedule.windows_begun, held, waited_s)
        self._target.given_up = saving.given_up
        self._schedule.saving = saving
        self._count(held)
        saving.start(lambda: self._beside(snapshot, saving))
        return saving

    def _snapshot(self) -> Snapshot | None:
        """What this process writes; None in all replicas but the first. Where there is one, the folder is claimed."""
        if self._replicas is None:
            return self._own_snapshot(collect_generators(self._schedule.stages))
        self._schedule.drain()
        require_same_weights(self._replicas, self._schedule.stages)
        generators = generators_of_all(self._replicas, collect_generators(self._schedule.stages))
        snapshot = None
        try:
            with on_all(self._replicas):
                if self._replicas.group.rank == 0:
                    snapshot = self._own_snapshot(generators)
                elif self._replicas.shard_optimizer:
                    self._schedule.state_dict()  # the first one gathers it
        except BaseException:
            self._target.leave()
            raise
        return snapshot

    def _own_snapshot(self, generators: dict[str, object]) -> Snapshot:
        with claimed(self._target, self._schedule, self._group):
            return take_snapshot(self._schedule, self._ties, self._group, generators)

    def _beside(self, snapshot: Snapshot | None, saving: Saving) -> None:
        schedule, given_up = self._schedule, saving.given_up
        own: Exception | None = None
        try:
            if snapshot is not None:

                def exchange(one: object) -> list[object]:
                    return gather_beside(one, schedule, self._group, given_up)

                write(self._target, snapshot, exchange, self._group, then=lambda: self._count({}))
        except Exception as error:
            own = error
        self._count({})
        failures = [FINE]
        if self._replicas is not None:
            failures = among_beside(self._replicas, failure_of(own), given_up)
        if own is not None:
            raise own
        raise_any(failures)

    def _count(self, held: dict[int, int]) -> None:
        """Note the memory of the snapshot with the stages that it is of."""
        for audit in self._schedule.audits:
            audit.snapshot(held.get(audit.stage, 0))
