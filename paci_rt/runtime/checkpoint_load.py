"""What a process reads of a checkpoint, and whether it is of its model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from paci_rt.errors import CheckpointError, PaciError
from paci_rt.files import reason
from paci_rt.runtime import guard_memory
from paci_rt.runtime.checkpoint_files import read_parts
from paci_rt.runtime.checkpoint_index import KINDS, names_in

PathLike = str | os.PathLike[str]


@contextmanager
def in_one_line(directory: PathLike) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is looked at is about the checkpoint.

    Raises:
        CheckpointError: in place of any error that is not about the pipeline itself.
    """
    try:
        yield
    except ValueError as error:
        raise CheckpointError(" ".join(str(error).splitlines())) from error
    except PaciError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint in {directory} cannot be used: {type(error).__name__}: {reason(error)}"
        ) from error


def state_for(
    folder: Path,
    index: Mapping[str, Any],
    wanted: Mapping[str, list[str]],
    source: Mapping[str, str],
    stages: Sequence[int],
) -> dict[str, Any]:
    """What a process with ``stages`` reads: all that it ``wanted``, followers with the values of their ``source``."""
    names = {kind: {source.get(name, name) for name in wanted[kind]} for kind in KINDS}
    state = read_parts(folder, index, names, stages)
    state["params"] = {name: state["params"][source.get(name, name)] for name in wanted["params"]}
    state["optimizer"] = {name: value for name, value in state["optimizer"].items() if name in wanted["params"]}
    state["windows"] = index["windows"]
    state["safety"] = remembered(index)
    return state


def remembered(index: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the guards of all stages remembered; None where they had nothing to remember."""
    parts = [file["safety"] for file in index["files"] if "safety" in file]
    return guard_memory.joined(parts) if parts else None


def check_same_model(
    directory: PathLike, index: Mapping[str, Any], used: Mapping[str, set[str]], source: Mapping[str, str]
) -> None:
    for kind in KINDS if index["version"] > 1 else KINDS[:1]:
        stored = set(names_in(index, kind))
        needed = {source.get(name, name) for name in used[kind]} if kind == "params" else used[kind]
        missing, unexpected = sorted(needed - stored), sorted(stored - used[kind])
        if missing or unexpected:
            raise CheckpointError(
                f"the checkpoint in {directory} is of another model: "
                f"missing {some(missing)}, left over {some(unexpected)}"
            )


def check_tensors(
    directory: PathLike, saved: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.nn.Parameter]
) -> None:
    for name, parameter in wanted.items():
        if saved[name].dtype != parameter.dtype or saved[name].shape != parameter.shape:
            raise CheckpointError(
                f"the checkpoint in {directory} has {name} as {saved[name].dtype} {tuple(saved[name].shape)}, "
                f"the model as {parameter.dtype} {tuple(parameter.shape)}"
            )


def some(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
