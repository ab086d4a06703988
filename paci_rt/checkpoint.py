"""Checkpoints that any cut of the same model can load.

A checkpoint is a folder: one file a stage, and ``index.json``, which says which parameter lies in which file.
Parameters and optimizer state carry the parameters' names in the uncut model, so a run may go on with another number
of stages, another partition or another schedule. A weight that lives on two stages is written once, by its owner.

Saving drains the pipeline first: what is written is a state in which all stages have applied the same updates, and a
run that goes on from it repeats, bit for bit, what the run that wrote it does next.

The index is replaced last and in one piece, so the folder always holds a whole checkpoint: the old one or the new one.
It has a hash of each file and of itself, and all of them are compared before anything in a pipeline is overwritten.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from paci_rt.errors import CheckpointError
from paci_rt.files import reason
from paci_rt.runtime import checkpoint_files as files_of
from paci_rt.runtime.beside import all_written, settle
from paci_rt.runtime.checkpoint_files import beside, part_of
from paci_rt.runtime.checkpoint_index import KINDS, digest_of, index_file, names_in, warn_of_age
from paci_rt.runtime.checkpoint_job import Save
from paci_rt.runtime.checkpoint_load import check_same_model, check_tensors, in_one_line, remembered, some, state_for
from paci_rt.runtime.checkpoint_save import check_seen, index_of
from paci_rt.runtime.checkpoint_write import Target, leave_folder
from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.folder_lock import FolderLock, Probe
from paci_rt.runtime.generators import check_generators
from paci_rt.runtime.replica_checkpoint import group_of, held_once, on_all, own_generators, several
from paci_rt.runtime.saving import Saving
from paci_rt.runtime.together import alone, gather, together
from paci_rt.schedules.lowering import TiedWeight

PathLike = str | os.PathLike[str]


def save(
    directory: PathLike,
    schedule: Pipeline,
    *,
    extra: Mapping[str, Any] | None = None,
    tied_weights: Sequence[TiedWeight] = (),
    group: dist.ProcessGroup | None = None,
    keep: int = 1,
    gathered: bool = False,
    blocking: bool = True,
) -> Saving | None:
    """Drain ``schedule`` and write its state; every process of the pipeline calls this, and of its replicas.

    Of replicas the first writes, once all have been found to have the same weights, with the random generators of all.

    Args:
        directory: made if it does not exist; a checkpoint in it is replaced, or kept beside the new one.
        schedule: a schedule or a ``LocalPipeline``.
        extra: JSON-ready values to keep with it, for example the trainer's options.
        tied_weights: those of the schedule.
        group: for the exchange between processes; None is the default group.
        keep: how many checkpoints the folder holds, this one included. With more than one, each has an index of its
            own beside ``index.json``, such as ``index-00000200.json`` after 200 updates, that :func:`load` takes too.
        gathered: the first process, that of stage 0, writes all files; the others send it theirs over ``group``, which
            must be of gloo. For hosts without a common file system: copy the folder to all of them before :func:`load`.
        blocking: False returns once there is a copy of the state in the CPU's memory, and a thread writes it while
            training goes on. The files have the same bits, and the folder holds the checkpoint before until the new one
            is whole. One is written at a time: a second one waits for the first.

    Returns:
        None, or with ``blocking=False`` what to wait for. An error of the thread comes out of its ``wait``, or else of
        the next step, save, :meth:`~paci_rt.runtime.engine.Pipeline.close` or end of :func:`hold`, as a
        CheckpointWriteError. Every process must come to one of the last three before its process group is destroyed.

    Raises:
        ValueError: two stages have a parameter of the same name; nothing is written then.
        CheckpointError: another run has the folder, or a weight is not finite.
        OSError: a file could not be written, by this process or another. What was saved before is intact, and nothing
            of the new one is left.

    Example:
        >>> import tempfile
        >>> from paci_rt import checkpoint
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 4), nn.Linear(4, 2)], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW
        ... )
        >>> _ = pipeline.step(torch.ones(8, 4), target=torch.ones(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(folder, pipeline, extra={"seed": 1})
        ...     checkpoint.read_index(folder)["windows"]
        1
    """
    if type(keep) is not int or keep < 1:
        raise ValueError(f"keep is {keep!r}: give an integer of at least 1")
    if type(blocking) is not bool:
        raise ValueError(f"blocking is {blocking!r}: give True or False")
    if gathered and not blocking:
        raise ValueError("gathered=True sends files over the group that trains meanwhile: give blocking=True with it")
    waited_s = settle(schedule)
    target = Target(folder=Path(directory), extra=extra, keep=keep, gathered=gathered)
    if blocking:
        Save(schedule, target, tied_weights, group_of(schedule, group)).now()
        return None
    return Save(schedule, target, tied_weights, group_of(schedule, group)).beside(waited_s)


@contextmanager
def hold(
    directory: PathLike, schedule: Pipeline, *, group: dist.ProcessGroup | None = None, gathered: bool = False
) -> Iterator[None]:
    """Have a folder to this run alone, and make sure at its start that all processes mean the same one.

    Every process of the pipeline enters this before its first step. :func:`save` locks the folder too, but only while
    it writes, and finds out only then that the files of another host are elsewhere.

    Args:
        directory: made if it does not exist.
        schedule: a schedule or a ``LocalPipeline``.
        group: for the exchange between processes; None is the default group.
        gathered: as for :func:`save`; the folder is that of the first process alone then.

    Raises:
        CheckpointError: another process holds the folder, it cannot be written, or the first process does not see
            what another one writes there.

    Example:
        >>> import tempfile
        >>> from paci_rt import checkpoint
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 2)], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW
        ... )
        >>> with tempfile.TemporaryDirectory() as folder, checkpoint.hold(folder, pipeline):
        ...     checkpoint.save(folder, pipeline)
    """
    replicas = several(schedule)
    held = _hold(Path(directory), schedule, group=group_of(schedule, group), gathered=gathered)
    with held if replicas is None else held_once(replicas, held):
        yield


@contextmanager
def _hold(folder: Path, schedule: Pipeline, *, group: dist.ProcessGroup | None, gathered: bool) -> Iterator[None]:
    lock: FolderLock | None = None
    probe: Probe | None = None
    new = False
    settle(schedule)
    try:
        first = schedule.stages[0].stage_index == 0
        with together(schedule, group), _writing(folder):
            new = not folder.exists() and (first or not gathered)
            if first or not gathered:
                folder.mkdir(parents=True, exist_ok=True)
            if first:
                lock = FolderLock(folder)
        if not alone(schedule) and not gathered:
            with together(schedule, group), _writing(folder):  # nothing is written into a folder that another run holds
                probe = Probe(folder)
            marks = gather((probe.mark, socket.gethostname()), schedule, group)
            with together(schedule, group):
                if first:
                    check_seen(folder, marks)
            probe.remove()
        with all_written(schedule):
            yield
    finally:
        if probe is not None:
            probe.remove()
        leave_folder(folder, lock, new)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What the system says about writing in ``folder``, as an error of checkpoints."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {reason(error)}: give another folder") from error


def read_index(directory: PathLike) -> dict[str, Any]:
    """The index of a checkpoint: ``windows`` (local updates so far), ``extra``, and ``files`` with their parameters.

    All files must be there with their sizes; :func:`verify` also reads them.

    Args:
        directory: of the checkpoint, or the path of an index in it.

    Raises:
        CheckpointError: no checkpoint there, or one that this version cannot read; where an older one in the folder is
            whole, the message says so.

    Example:
        >>> import tempfile
        >>> from paci_rt import checkpoint
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 2)], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(folder, pipeline, extra={"seed": 1})
        ...     index = checkpoint.read_index(folder)
        >>> index["extra"], [file["params"] for file in index["files"]]
        ({'seed': 1}, [['weight', 'bias']])
    """
    with files_of.offering_older(directory):
        return files_of.checked_index(index_file(directory))


def verify(directory: PathLike) -> dict[str, Any]:
    """Read a whole checkpoint and compare every byte with the hashes in its index, at about 1 GB/s; the index.

    Args:
        directory: of the checkpoint, or the path of an index in it.

    Raises:
        CheckpointError: as :func:`read_index`, or something is damaged.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from paci_rt import checkpoint
        >>> pipeline = paci_rt.LocalPipeline(
        ...     [nn.Linear(4, 2)], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(folder, pipeline)
        ...     part = Path(folder, checkpoint.verify(folder)["files"][0]["file"])
        ...     _ = part.write_bytes(part.read_bytes().replace(b"weight", b"Weight"))
        ...     checkpoint.verify(folder)
        Traceback (most recent call last):
        paci_rt.errors.CheckpointError: ... is damaged: its bytes do not have the hash that the index says
    """
    with files_of.offering_older(directory):
        return files_of.whole_index(index_file(directory))


def load(
    directory: PathLike,
    schedule: Pipeline,
    *,
    tied_weights: Sequence[TiedWeight] = (),
    group: dist.ProcessGroup | None = None,
    optimizer: bool = True,
) -> dict[str, Any]:
    """Put a checkpoint's state into ``schedule``, however it was cut when it was saved; every process calls this.

    Args:
        directory: of the checkpoint, or the path of an index in it, such as ``runs/a/index-00000200.json``.
        schedule: a schedule or a ``LocalPipeline`` of the same model.
        tied_weights: those of the schedule.
        group: for the exchange between processes; None is the default group.
        optimizer: False takes parameters, buffers and extra state alone; optimizers, schedulers and the count of
            updates stay as they are, and so do random generators.

    Returns:
        The ``extra`` values that were saved with it.

    Raises:
        CheckpointError: no readable checkpoint, a damaged one, or one that does not fit in its parameters, buffers,
            optimizers, parameter groups or schedulers, here or on another process; all of them are unchanged then. A
            class of yours whose ``set_extra_state`` or ``load_state_dict`` refuses does so once the other processes
            have taken their part.

    Example:
        Saved from one stage, loaded into two:

        >>> import tempfile
        >>> from collections import OrderedDict
        >>> from paci_rt import checkpoint
        >>> def pipeline_of(*stages):
        ...     modules = [nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in stage)) for stage in stages]
        ...     return paci_rt.LocalPipeline(modules, n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW)
        >>> whole, cut = pipeline_of(["first", "second"]), pipeline_of(["first"], ["second"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(folder, whole, extra={"seed": 1})
        ...     checkpoint.load(folder, cut)
        {'seed': 1}
        >>> torch.equal(cut.stages[1].submod.second.weight, whole.stages[0].submod.second.weight)
        True
    """
    with on_all(several(schedule)):
        return _load(directory, schedule, tied_weights, group_of(schedule, group), optimizer=optimizer)


def _load(
    directory: PathLike,
    schedule: Pipeline,
    tied_weights: Sequence[TiedWeight],
    group: dist.ProcessGroup | None,
    *,
    optimizer: bool,
) -> dict[str, Any]:
    source = {tie.reader: tie.owner for tie in tied_weights}
    wanted = {kind: [name for stage in names for name in stage] for kind, names in schedule.state_names().items()}
    index: dict[str, Any] = {}
    with together(schedule, group):
        index = read_index(directory)
    everyone = gather((wanted, digest_of(index)), schedule, group)
    used = {kind: {name for theirs, _ in everyone for name in theirs[kind]} for kind in KINDS}
    takes = []
    with together(schedule, group), in_one_line(directory):
        if len({digest for _, digest in everyone}) > 1:
            raise CheckpointError(
                f"the processes see different checkpoints in {directory}: give a folder that all hosts share, into "
                "which no other run saves"
            )
        warn_of_age(directory, index)
        check_same_model(directory, index, used, source)
        folder = index_file(directory).parent
        with files_of.offering_older(directory):
            stages = [stage.stage_index for stage in schedule.stages]
            state = state_for(folder, index, wanted, source, stages)
        generators = state.pop("generators")
        if not optimizer:
            del state["optimizer"]
        elif generators is not None and (mine := own_generators(generators, schedule)) is not None:
            takes.append(check_generators(mine, schedule.stages))
        check_tensors(directory, state["params"], dict(schedule.named_parameters()))
        takes.insert(0, schedule.check_state_dict(state))
    with together(schedule, group), in_one_line(directory):  # methods of users' classes may refuse
        for take in takes:
            take()
    return dict(index["extra"])


def reshard(source: PathLike, target: PathLike, layout: Sequence[Iterable[str]]) -> None:
    """Rewrite a checkpoint with one file for each group of parameter names; :func:`load` itself needs no such help.

    Buffers and extra state go where the parameters are that are nearest to them in the model. The state of random
    generators, which is that of processes, is left out.

    Args:
        source: folder of the checkpoint.
        target: folder of the new one, made if it does not exist.
        layout: parameter names, file by file.

    Raises:
        CheckpointError: no readable checkpoint, or another run has the folder of the new one.
        ValueError: a layout that does not name each of its parameters exactly once.

    Example:
        >>> import tempfile
        >>> from paci_rt import checkpoint
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> pipeline = paci_rt.LocalPipeline([model], n_microbatches=2, loss_fn=nn.MSELoss(), optimizer=paci_rt.AdamW)
        >>> with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        ...     checkpoint.save(one, pipeline)
        ...     checkpoint.reshard(one, two, [["0.weight", "0.bias"], ["1.weight", "1.bias"]])
        ...     [file["params"] for file in checkpoint.read_index(two)["files"]]
        [['0.weight', '0.bias'], ['1.weight', '1.bias']]
    """
    index = read_index(source)
    groups = [list(names) for names in layout]
    stored = sorted(names_in(index, "params"))
    asked = sorted(name for names in groups for name in names)
    if stored != asked:
        wrong = sorted(set(stored) ^ set(asked)) or sorted({name for name in asked if asked.count(name) > 1})
        raise ValueError(f"the layout must name each parameter of {source} exactly once; wrong: {some(wrong)}")
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {kind: list(names_in(index, kind)) for kind in KINDS[1:]}
    placed = {"params": groups, **{kind: beside(names, groups) for kind, names in kept.items()}}
    lock, parts = FolderLock(folder), []
    try:
        for at in range(len(groups)):
            names = {kind: set(placed[kind][at]) for kind in KINDS}
            state = files_of.read_parts(index_file(source).parent, index, names)
            content = part_of(state, {kind: placed[kind][at] for kind in KINDS}, state.get("optimizers", ()))
            parts.append(files_of.write_part(folder, content, index["windows"], at, len(groups)))
        if (safety := remembered(index)) is not None:
            parts[0]["safety"] = safety
        files_of.finish(folder, index_of(parts, index["windows"], index["extra"], index["version"]), keep=1)
    except BaseException:
        files_of.remove_parts(folder, [part["file"] for part in parts])
        raise
    finally:
        lock.release()
