"""Checkpoints that any cut of the same model can load.

A checkpoint is a folder: one file a stage, and ``index.json``, which says which parameter lies in which file.
Parameters and optimizer state carry the parameters' names in the uncut model, so a run may go on with another number
of stages, another partition or another schedule. A weight that lives on two stages is written once, by its owner.

Saving drains the pipeline first: what is written is a state in which all stages have applied the same updates, and a
run that goes on from it repeats, bit for bit, what the run that wrote it does next.

The index is replaced last and in one piece, so the folder always holds a whole checkpoint: the old one or the new one.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paci_rt.runtime.engine import Pipeline
from paci_rt.schedules.lowering import TiedWeight

_FORMAT = "paci_rt checkpoint"
_VERSION = 1
_INDEX = "index.json"

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
    state = schedule.state_dict()
    for tie in tied_weights:
        state["params"].pop(tie.reader, None)
    seen = Counter(name for mine in _gather(list(state["params"]), schedule, group) for name in mine)
    twice = [name for name, count in seen.items() if count > 1]
    if twice:
        raise ValueError(
            f"two stages have a parameter named {twice[0]!r}: name them as in the uncut model, where each is one, "
            "or give tied_weights if it is the same weight"
        )
    first, num_stages = schedule.stages[0].stage_index, schedule.stages[0].num_stages
    parts, failure = [], ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts = [_write_part(folder, names, at, num_stages, state) for at, names in _by_stage(schedule, state)]
    except (OSError, RuntimeError) as error:  # torch's writer turns some of the former into the latter
        failure = f"stage {first}: {error}"
    gathered = _gather((parts, failure), schedule, group)
    _raise_any([one for _, one in gathered])
    if first == 0:
        try:
            files = [file for theirs, _ in gathered for file in theirs]
            _write_index(folder, files, int(state["windows"]), dict(extra or {}))
        except OSError as error:
            failure = f"{_INDEX}: {error}"
    _raise_any(_gather(failure, schedule, group))  # and nobody returns before the checkpoint is whole


def _raise_any(failures: Sequence[str]) -> None:
    if any(failures):
        raise OSError(f"cannot write the checkpoint: {'; '.join(one for one in failures if one)}")


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
    path = Path(directory) / _INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{directory} holds no checkpoint: it has no {_INDEX}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise ValueError(f"{path} is not the index of a {_FORMAT}")
    if index["version"] != _VERSION:
        raise ValueError(f"{path} has version {index['version']}; this version of paci_rt reads {_VERSION}")
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
) -> dict[str, Any]:
    """Put a checkpoint's state into ``schedule``, however it was cut when it was saved; every process calls this.

    Args:
        directory: of the checkpoint.
        schedule: a schedule or a ``LocalPipeline`` of the same model.
        tied_weights: those of the schedule.
        group: for the exchange between processes; None is the default group.

    Returns:
        The ``extra`` values that were saved with it.

    Raises:
        ValueError: no readable checkpoint, or a parameter that is missing in it, left over, or of another shape or
            dtype; the schedule is unchanged then.

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
    index = read_index(directory)
    source = {tie.reader: tie.owner for tie in tied_weights}
    wanted = dict(schedule.named_parameters())
    used = {name for names in _gather(sorted(wanted), schedule, group) for name in names}
    _check_same_model(directory, index, {source.get(name, name) for name in used}, used)
    parts = _read_parts(Path(directory), index, {source.get(name, name) for name in wanted})
    params = {name: parts["params"][source.get(name, name)] for name in wanted}
    for name, parameter in wanted.items():
        if params[name].dtype != parameter.dtype or params[name].shape != parameter.shape:
            raise ValueError(
                f"the checkpoint in {directory} has {name} as {params[name].dtype} {tuple(params[name].shape)}, "
                f"the model as {parameter.dtype} {tuple(parameter.shape)}"
            )
    optimizer = {name: parts["optimizer"][name] for name in wanted if name in parts["optimizer"] and name not in source}
    schedule.load_state_dict(
        {"params": params, "optimizer": optimizer, "lr_scheduler": parts["lr_scheduler"], "windows": index["windows"]}
    )
    return dict(index["extra"])


def _check_same_model(directory: PathLike, index: Mapping[str, Any], needed: set[str], used: set[str]) -> None:
    stored = {name for file in index["files"] for name in file["params"]}
    missing, unexpected = sorted(needed - stored), sorted(stored - used)
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint in {directory} is of another model: "
            f"missing {_some(missing)}, left over {_some(unexpected)}"
        )


def reshard(source: PathLike, target: PathLike, layout: Sequence[Iterable[str]]) -> None:
    """Rewrite a checkpoint with one file for each group of parameter names; :func:`load` itself needs no such help.

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
    files = []
    for at, names in enumerate(groups):
        state = {**_read_parts(Path(source), index, set(names)), "windows": index["windows"]}
        files.append(_write_part(folder, names, at, len(groups), state))
    _write_index(folder, files, index["windows"], index["extra"])


def _by_stage(schedule: Pipeline, state: Mapping[str, Any]) -> Iterable[tuple[int, list[str]]]:
    """The names of each stage of this process."""
    names_of = {parameter: name for name, parameter in schedule.named_parameters()}
    for stage in schedule.stages:
        names = (names_of[parameter] for parameter in stage.parameters())
        yield stage.stage_index, [name for name in names if name in state["params"]]


def _write_part(folder: Path, names: Sequence[str], at: int, count: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """Write one file, under a new name, so that the files of the checkpoint before stay whole."""
    name = f"step-{state['windows']:08d}-stage-{at}-of-{count}-{secrets.token_hex(4)}.pt"
    content = {
        "params": {one: state["params"][one] for one in names},
        "optimizer": {one: state["optimizer"][one] for one in names if one in state["optimizer"]},
        "lr_scheduler": state["lr_scheduler"],
    }
    with _replacing(folder / name) as stream:
        torch.save(content, stream)
    return {"file": name, "bytes": (folder / name).stat().st_size, "params": list(names)}


def _write_index(folder: Path, files: list[dict[str, Any]], windows: int, extra: dict[str, Any]) -> None:
    index = {"format": _FORMAT, "version": _VERSION, "windows": windows, "extra": extra, "files": files}
    with _replacing(folder / _INDEX) as stream:
        stream.write(json.dumps(index, indent=1).encode())
    kept = {file["file"] for file in files}
    for path in [*folder.glob("step-*-stage-*.pt"), *folder.glob(".step-*.part")]:  # replaced, or cut off while saving
        if path.name not in kept:
            path.unlink(missing_ok=True)


class _replacing:
    """A file that appears under its name only once it is complete and on disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, path.with_name(f".{path.name}.part")

    def __enter__(self) -> Any:
        self._stream = self._part.open("wb")
        return self._stream

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()
        if kind is None:
            os.replace(self._part, self._path)
        else:
            self._part.unlink(missing_ok=True)


def _read_parts(folder: Path, index: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """Parameters and optimizer state of ``names``, memory-mapped, from whichever files hold them."""
    found: dict[str, Any] = {"params": {}, "optimizer": {}, "lr_scheduler": None}
    for file in index["files"]:
        mine = names.intersection(file["params"])
        if not mine:
            continue
        content = torch.load(folder / file["file"], map_location="cpu", mmap=True, weights_only=True)
        for kind in ("params", "optimizer"):
            found[kind].update({name: value for name, value in content[kind].items() if name in mine})
        found["lr_scheduler"] = content["lr_scheduler"]
    return found


def _gather(value: Any, schedule: Pipeline, group: dist.ProcessGroup | None) -> list[Any]:
    """``value`` of every process of the pipeline, in the order of the stages."""
    if len(schedule.stages) == schedule.stages[0].num_stages:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _some(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
