"""Checkpoints that any cut of the same model can load.

A checkpoint is a folder: one file a stage, and ``index.json``, which says which parameter lies in which file.
Parameters and optimizer state carry the parameters' names in the uncut model, so a run may go on with another number
of stages, another partition or another schedule. A weight that lives on two stages is written once, by its owner.

Saving drains the pipeline first: what is written is a state in which all stages have applied the same updates, and a
run that goes on from it repeats, bit for bit, what the run that wrote it does next.

The index is replaced last and in one piece, so the folder always holds a whole checkpoint: the old one or the new one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paci_rt.runtime.checkpoint_files import (
    FORMAT,
    INDEX,
    KINDS,
    READABLE,
    beside,
    check_savable,
    part_of,
    read_parts,
    write_index,
    write_part,
)
from paci_rt.runtime.engine import Pipeline
from paci_rt.schedules.lowering import TiedWeight
from paci_rt.transport.collective import gather

PathLike = str | os.PathLike[str]


def save(
    directory: PathLike,
    schedule: Pipeline,
    *,
    extra: Mapping[str, Any] | None = None,
    tied_weights: Sequence[TiedWeight] = (),
    group: dist.ProcessGroup | None = None,
) -> None:
    """Drain ``schedule`` and write its state; every process of the pipeline calls this.

    Args:
        directory: made if it does not exist; a checkpoint in it is replaced.
        schedule: a schedule or a ``LocalPipeline``.
        extra: JSON-ready values to keep with it, for example the trainer's options.
        tied_weights: those of the schedule.
        group: for the exchange between processes; None is the default group.

    Raises:
        ValueError: two stages have a parameter of the same name; nothing is written then.
        OSError: a file could not be written, by this process or another. A checkpoint that was there is intact.

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
    folder = Path(directory)
    names = schedule.state_names()
    readers = {tie.reader for tie in tied_weights}
    names["params"] = [[name for name in ours if name not in readers] for ours in names["params"]]
    schedule.drain()
    state: dict[str, Any] = {}
    with _together(schedule, group):
        json.dumps(dict(extra or {}))
        state = schedule.state_dict()
        check_savable(state)
    _leave_to_one(names, state, schedule, group)
    first, num_stages = schedule.stages[0].stage_index, schedule.stages[0].num_stages
    parts, failure = [], ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place, stage in enumerate(schedule.stages):
            records = [record for record in state["optimizers"] if record["stage"] == stage.stage_index]
            content = part_of(state, {kind: names[kind][place] for kind in KINDS}, records)
            parts.append(write_part(folder, content, state["windows"], stage.stage_index, num_stages))
    except (OSError, RuntimeError) as error:  # torch's writer turns some of the former into the latter
        failure = f"cannot write the checkpoint: stage {first}: {error}"
    gathered = _gather((parts, failure), schedule, group)
    _raise_any([one for _, one in gathered], OSError)
    if first == 0:
        failure = _finish(folder, [file for theirs, _ in gathered for file in theirs], state["windows"], extra)
    _raise_any(_gather(failure, schedule, group), OSError)  # and nobody returns before the checkpoint is whole


def _finish(folder: Path, files: list[dict[str, Any]], windows: int, extra: Mapping[str, Any] | None) -> str:
    """Write the index, which makes the files a checkpoint; returns what went wrong."""
    try:
        write_index(folder, files, windows, dict(extra or {}))
    except OSError as error:
        return f"cannot write the checkpoint: {INDEX}: {error}"
    return ""


def _leave_to_one(
    names: dict[str, list[list[str]]], state: Mapping[str, Any], schedule: Pipeline, group: dist.ProcessGroup | None
) -> None:
    """Take out of ``names`` what a process before this one writes: buffers and extra state that several processes have.

    Raises:
        ValueError: they differ in the value, or two stages have a parameter of the same name.
    """
    ours = {kind: [name for stage in names[kind] for name in stage] for kind in KINDS}
    everyone = _gather(ours, schedule, group)
    seen = {kind: Counter(name for theirs in everyone for name in theirs[kind]) for kind in KINDS}
    twice = [name for name, count in seen["params"].items() if count > 1]
    if twice:
        raise ValueError(
            f"two stages have a parameter named {twice[0]!r}: name them as in the uncut model, where each is one, "
            "or give tied_weights if it is the same weight"
        )
    shared = [(kind, name) for kind in KINDS[1:] for name, count in seen[kind].items() if count > 1]
    if not shared:
        return
    digests = _gather({at: _digest(state[at[0]].get(at[1])) for at in shared if at[1] in ours[at[0]]}, schedule, group)
    here = dist.get_rank(group)
    for kind, name in shared:
        values = [theirs[kind, name] for theirs in digests if (kind, name) in theirs]
        if len(set(values)) > 1:
            raise ValueError(
                f"two stages have state named {name!r} with different values: name modules as in the uncut model, "
                "where each is one"
            )
        if any((kind, name) in theirs for theirs in digests[:here]):
            names[kind] = [[one for one in stage if one != name] for stage in names[kind]]


def _digest(value: Any) -> str:
    stream = io.BytesIO()
    torch.save(value, stream)
    return hashlib.sha256(stream.getvalue()).hexdigest()


@contextmanager
def _together(schedule: Pipeline, group: dist.ProcessGroup | None) -> Iterator[None]:
    """What fails in here on one process ends in an error on all of them.

    Raises:
        ValueError: it failed on another one.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    failures = _gather("" if own is None else f"{own}", schedule, group)
    if own is not None:
        raise own
    _raise_any(failures, ValueError)


def _raise_any(failures: Sequence[str], kind: type[Exception]) -> None:
    if any(failures):
        raise kind("; ".join(dict.fromkeys(one for one in failures if one)))


def read_index(directory: PathLike) -> dict[str, Any]:
    """The index of a checkpoint: ``windows`` (local updates so far), ``extra``, and ``files`` with their parameters.

    Args:
        directory: of the checkpoint.

    Raises:
        ValueError: no checkpoint there, or one that this version cannot read.

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
    path = Path(directory) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{directory} holds no checkpoint: it has no {INDEX}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path} is not the index of a {FORMAT}")
    if index["version"] not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise ValueError(f"{path} has version {index['version']}; this version of paci_rt reads {known}")
    for file in index["files"]:
        part = path.with_name(file["file"])
        if not part.is_file() or part.stat().st_size != file["bytes"]:
            raise ValueError(f"{part} is missing or incomplete: the checkpoint cannot be used")
    return index


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
        directory: of the checkpoint.
        schedule: a schedule or a ``LocalPipeline`` of the same model.
        tied_weights: those of the schedule.
        group: for the exchange between processes; None is the default group.
        optimizer: False takes parameters, buffers and extra state alone; optimizers, schedulers and the count of
            updates stay as they are.

    Returns:
        The ``extra`` values that were saved with it.

    Raises:
        ValueError: no readable checkpoint, or one that does not fit in its parameters, buffers, optimizers, parameter
            groups or schedulers, here or on another process; all of them are unchanged then.

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
    source = {tie.reader: tie.owner for tie in tied_weights}
    wanted = {kind: [name for stage in names for name in stage] for kind, names in schedule.state_names().items()}
    everyone = _gather(wanted, schedule, group)
    used = {kind: {name for theirs in everyone for name in theirs[kind]} for kind in KINDS}
    index: dict[str, Any] = {}
    take = None
    with _together(schedule, group):
        index = read_index(directory)
        _check_same_model(directory, index, used, source)
        state = _state_for(Path(directory), index, wanted, source)
        if not optimizer:
            del state["optimizer"]
        _check_tensors(directory, state["params"], dict(schedule.named_parameters()))
        take = schedule.check_state_dict(state)
    assert take is not None
    take()
    return dict(index["extra"])


def _state_for(
    folder: Path, index: Mapping[str, Any], wanted: Mapping[str, list[str]], source: Mapping[str, str]
) -> dict[str, Any]:
    """What a process reads: all that it ``wanted``, followers with the values of their ``source``."""
    names = {kind: {source.get(name, name) for name in wanted[kind]} for kind in KINDS}
    state = read_parts(folder, index, names)
    state["params"] = {name: state["params"][source.get(name, name)] for name in wanted["params"]}
    state["optimizer"] = {name: value for name, value in state["optimizer"].items() if name in wanted["params"]}
    state["windows"] = index["windows"]
    return state


def _check_same_model(
    directory: PathLike, index: Mapping[str, Any], used: Mapping[str, set[str]], source: Mapping[str, str]
) -> None:
    for kind in KINDS if index["version"] > 1 else KINDS[:1]:
        stored = {name for file in index["files"] for name in file[kind]}
        needed = {source.get(name, name) for name in used[kind]} if kind == "params" else used[kind]
        missing, unexpected = sorted(needed - stored), sorted(stored - used[kind])
        if missing or unexpected:
            raise ValueError(
                f"the checkpoint in {directory} is of another model: "
                f"missing {_some(missing)}, left over {_some(unexpected)}"
            )


def _check_tensors(
    directory: PathLike, saved: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.nn.Parameter]
) -> None:
    for name, parameter in wanted.items():
        if saved[name].dtype != parameter.dtype or saved[name].shape != parameter.shape:
            raise ValueError(
                f"the checkpoint in {directory} has {name} as {saved[name].dtype} {tuple(saved[name].shape)}, "
                f"the model as {parameter.dtype} {tuple(parameter.shape)}"
            )


def reshard(source: PathLike, target: PathLike, layout: Sequence[Iterable[str]]) -> None:
    """Rewrite a checkpoint with one file for each group of parameter names; :func:`load` itself needs no such help.

    Buffers and extra state go where the parameters are that are nearest to them in the model.

    Args:
        source: folder of the checkpoint.
        target: folder of the new one, made if it does not exist.
        layout: parameter names, file by file.

    Raises:
        ValueError: no readable checkpoint, or a layout that does not name each of its parameters exactly once.

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
    stored = sorted(name for file in index["files"] for name in file["params"])
    asked = sorted(name for names in groups for name in names)
    if stored != asked:
        wrong = sorted(set(stored) ^ set(asked)) or sorted({name for name in asked if asked.count(name) > 1})
        raise ValueError(f"the layout must name each parameter of {source} exactly once; wrong: {_some(wrong)}")
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {kind: [name for file in index["files"] for name in file.get(kind, ())] for kind in KINDS[1:]}
    placed = {"params": groups, **{kind: beside(names, groups) for kind, names in kept.items()}}
    files = []
    for at in range(len(groups)):
        names = {kind: set(placed[kind][at]) for kind in KINDS}
        state = read_parts(Path(source), index, names)
        content = part_of(state, {kind: placed[kind][at] for kind in KINDS}, state.get("optimizers", ()))
        files.append(write_part(folder, content, index["windows"], at, len(groups)))
    write_index(folder, files, index["windows"], index["extra"], index["version"])


def _gather(value: Any, schedule: Pipeline, group: dist.ProcessGroup | None) -> list[Any]:
    """``value`` of every process of the pipeline, in the order of the stages."""
    if len(schedule.stages) == schedule.stages[0].num_stages:
        return [value]
    what = "have not come to this point of saving or loading a checkpoint"
    return gather(value, group, schedule.transfer_timeout_s, kind="checkpoint", what=what)


def _some(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
