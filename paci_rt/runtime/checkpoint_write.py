"""The two halves of saving: a snapshot of a drained pipeline, and the files and index that are written of it.

The first half needs the pipeline, the second does not, so that training may go on meanwhile. The bits of the files are
the same either way.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from paci_rt.errors import CheckpointError
from paci_rt.files import reason
from paci_rt.runtime import checkpoint_files as files_of
from paci_rt.runtime.checkpoint_collect import collect
from paci_rt.runtime.checkpoint_files import check_savable, part_of
from paci_rt.runtime.checkpoint_index import KINDS
from paci_rt.runtime.checkpoint_save import check_finite, finish, leave_to_one
from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.folder_lock import FolderLock
from paci_rt.runtime.together import FINE, Failure, failure_of, gather, raise_any, together
from paci_rt.schedules.lowering import TiedWeight
from paci_rt.transport.patience import GivenUp

Exchange = Callable[[Any], list[Any]]
"""Tells all processes of the pipeline a value, and returns those of all."""


@dataclass(kw_only=True)
class Snapshot:
    """What a process writes, in the CPU's memory and nobody else's.

    Attributes:
        parts: for each file the stage and its content; the first one has the random generators of ``stages``.
        windows: local updates so far. num_stages: of the whole pipeline. safety: what guards remember.
    """

    parts: list[tuple[int, dict[str, Any]]]
    stages: list[int]
    windows: int
    num_stages: int
    safety: dict[str, Any]

    def bytes_by_stage(self) -> dict[int, int]:
        return {at: _bytes_of(content) for at, content in self.parts}


@dataclass(kw_only=True)
class Target:
    """Where a snapshot goes.

    Attributes:
        lock: where this process has the folder. new: it was not there before.
        keep, extra, gathered: as for :func:`paci_rt.checkpoint.save`.
    """

    folder: Path
    extra: Mapping[str, Any] | None
    keep: int
    gathered: bool
    lock: FolderLock | None = None
    new: bool = False
    given_up: threading.Event = field(default_factory=threading.Event)

    def leave(self) -> None:
        """Let others into the folder, and remove it if it is new and nothing is in it."""
        leave_folder(self.folder, self.lock, self.new)
        self.lock = None


def leave_folder(folder: Path, lock: FolderLock | None, new: bool) -> None:
    """Let others into a folder, and remove it if it is ``new`` and nothing is in it."""
    if lock is not None:
        lock.release()
    if new:
        with suppress(OSError):  # other processes' files, or what was saved
            folder.rmdir()


def take_snapshot(
    schedule: Pipeline,
    tied_weights: Sequence[TiedWeight],
    group: dist.ProcessGroup | None,
    generators: dict[str, Any],
) -> Snapshot:
    """Drain, and copy what this process writes; every process of the pipeline calls this.

    Args:
        generators: of this process, and of the same stages in other replicas.

    Raises:
        ValueError: as for :func:`paci_rt.checkpoint.save`. CheckpointError: a weight is not finite.
    """
    names = schedule.state_names()
    readers = {tie.reader for tie in tied_weights}
    names["params"] = [[name for name in ours if name not in readers] for ours in names["params"]]
    schedule.drain()
    state: dict[str, Any] = {}
    with together(schedule, group):
        check_finite(schedule)
        state = schedule.state_dict()
        check_savable(state)
    leave_to_one(names, state, schedule, group)
    state = _on_host(state)
    stages, parts = [stage.stage_index for stage in schedule.stages], []
    for place, at in enumerate(stages):
        records = [record for record in state["optimizers"] if record["stage"] == at]
        content = part_of(state, {kind: names[kind][place] for kind in KINDS}, records)
        if place == 0:
            content["generators"] = generators
        parts.append((at, content))
    return Snapshot(
        parts=parts,
        stages=stages,
        windows=state["windows"],
        num_stages=schedule.stages[0].num_stages,
        safety=state["safety"],
    )


def _on_host(value: Any) -> Any:
    """A state with its tensors on the CPU, and nothing in it that the next update changes; tensors there are copies."""
    if isinstance(value, Tensor):
        return value.cpu()
    if type(value) is dict:
        return {key: _on_host(one) for key, one in value.items()}
    if type(value) is list:
        return [_on_host(one) for one in value]
    return copy.deepcopy(value)


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    held: Iterable[Any] = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sum(map(_bytes_of, held))


@contextmanager
def claimed(target: Target, schedule: Pipeline, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Make the folder, and lock it where this process has the first stage; left again where the block fails.

    Raises:
        CheckpointError: another run has it. OSError: it cannot be made, here or on another process.
    """
    stage, own, failure = schedule.stages[0].stage_index, None, FINE
    try:
        try:
            target.extra = json.loads(json.dumps(dict(target.extra or {})))  # the caller's may change
            target.new = not target.folder.exists()
            target.folder.mkdir(parents=True, exist_ok=True)
            target.lock = FolderLock(target.folder) if stage == 0 else None
        except OSError as error:
            failure = "OSError", _unwritten(stage, target.folder, error)
        except Exception as error:
            own, failure = error, failure_of(error)
        everyone = gather((failure, target.new), schedule, group)
        target.new = any(new for _, new in everyone)  # one process may have made it before another one looked
        if own is not None:
            raise own
        raise_any([one for one, _ in everyone])
        yield
    except BaseException:
        target.leave()
        raise


def write(
    target: Target,
    snapshot: Snapshot,
    exchange: Exchange,
    group: dist.ProcessGroup | None,
    then: Callable[[], None] = lambda: None,
) -> None:
    """Write a snapshot's files, and once all processes have theirs, the index.

    Args:
        then: called when this process's files are written; the snapshot is free then.

    Raises:
        OSError: a file could not be written, here or by another process; nothing of the new checkpoint is left then.
    """
    first, parts, entries = 0 in snapshot.stages, list[dict[str, Any]](), list[dict[str, Any]]()
    unneeded = True  # no index has these files
    try:
        failure = _write_parts(target, snapshot, parts)
        windows = snapshot.windows
        snapshot.parts.clear()
        then()
        unneeded = first or failure != FINE
        everyone = exchange((parts, failure))
        entries, fine = [file for theirs, _ in everyone for file in theirs], all(one == FINE for _, one in everyone)
        travel = target.gathered and fine and len(everyone) > 1
        if travel:
            entries, failure = collect(target.folder, [theirs for theirs, _ in everyone], group)
        if first and fine and failure == FINE:
            failure = finish(target.folder, entries, windows, target.extra, target.keep)
            unneeded = failure != FINE
        # And nobody returns before the checkpoint is whole.
        failures = exchange(failure)
        unneeded = any(one != FINE for one in failures) or (travel and not first)
        raise_any(failures)
    finally:
        if unneeded:
            files_of.remove_parts(target.folder, [part["file"] for part in ([*parts, *entries] if first else parts)])
        target.leave()


def _write_parts(target: Target, snapshot: Snapshot, parts: list[dict[str, Any]]) -> Failure:
    """Write the files of this process, and add their entries to ``parts``; returns what went wrong."""
    try:
        for place, (at, content) in enumerate(snapshot.parts):
            ours = snapshot.stages if place == 0 else None
            where = target.folder, content, snapshot.windows, at, snapshot.num_stages, ours
            parts.append(files_of.write_part(*where, given_up=target.given_up))
        if snapshot.safety["of"]:
            parts[0]["safety"] = snapshot.safety
    except CheckpointError as error:
        return failure_of(error)
    except GivenUp:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer turns some of the former into the latter
        return "OSError", _unwritten(snapshot.stages[0], target.folder, error)
    except Exception as error:  # whatever it is, the others wait for a word
        return "CheckpointWriteError", _unwritten(snapshot.stages[0], target.folder, error)
    return FINE


def _unwritten(stage: int, folder: Path, error: BaseException) -> str:
    why = f"stage {stage}: {folder}: {reason(error)}"
    return f"cannot write the checkpoint: {why}; what was saved before is intact"
