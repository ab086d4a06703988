"""Files of a checkpoint: parts with the state of some parameters and modules, and the index that names them."""

from __future__ import annotations

import io
import json
import os
import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "paci_rt checkpoint"
VERSION = 2
READABLE = (1, 2)
"""Version 1 kept no buffers, one scheduler for all stages, and no options of parameter groups."""
INDEX = "index.json"
KINDS = ("params", "buffers", "extra_state")
"""What is kept by name, and listed in the index."""


def part_of(
    state: Mapping[str, Any], names: Mapping[str, Iterable[str]], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of a part: the state of ``names``, which are by kind, and ``records`` of optimizers."""
    content: dict[str, Any] = {kind: {one: state[kind][one] for one in names[kind]} for kind in KINDS if kind in state}
    content["optimizer"] = {one: state["optimizer"][one] for one in names["params"] if one in state["optimizer"]}
    if "optimizers" in state:
        content["optimizers"] = list(records)
    else:
        content["lr_scheduler"] = state["lr_scheduler"]
    return content


def write_part(folder: Path, content: Mapping[str, Any], windows: int, at: int, count: int) -> dict[str, Any]:
    """Write one file, under a new name, so that the files of the checkpoint before stay whole; its entry of the
    index."""
    name = f"step-{windows:08d}-stage-{at}-of-{count}-{secrets.token_hex(4)}.pt"
    with _replacing(folder / name) as stream:
        torch.save(content, stream)
    names = {kind: list(content[kind]) for kind in KINDS if kind in content}
    return {"file": name, "bytes": (folder / name).stat().st_size, **names}


def write_index(
    folder: Path, files: list[dict[str, Any]], windows: int, extra: dict[str, Any], version: int = VERSION
) -> None:
    """Replace the index, then remove the files of the checkpoint before."""
    index = {"format": FORMAT, "version": version, "windows": windows, "extra": extra, "files": files}
    with _replacing(folder / INDEX) as stream:
        stream.write(json.dumps(index, indent=1).encode())
    kept = {file["file"] for file in files}
    for path in [*folder.glob("step-*-stage-*.pt"), *folder.glob(".step-*.part")]:  # replaced, or cut off while saving
        if path.name not in kept:
            path.unlink(missing_ok=True)


def read_parts(folder: Path, index: Mapping[str, Any], names: Mapping[str, set[str]]) -> dict[str, Any]:
    """State of ``names``, which are by kind, memory-mapped, from whichever files hold them, with the records of
    optimizers there."""
    kinds = KINDS if index["version"] > 1 else ("params",)
    found: dict[str, Any] = {kind: {} for kind in (*kinds, "optimizer")}
    records: dict[int, Any] = {}
    for file in index["files"]:
        mine = {kind: names[kind].intersection(file[kind]) for kind in kinds}
        if not any(mine.values()):
            continue
        content = torch.load(folder / file["file"], map_location="cpu", mmap=True, weights_only=True)
        for kind in kinds:
            found[kind].update({name: content[kind][name] for name in mine[kind]})
        entries = content["optimizer"].items()
        found["optimizer"].update({name: value for name, value in entries if name in mine["params"]})
        if "optimizers" in content:
            records.update({record["stage"]: record for record in content["optimizers"]})
        else:
            found["lr_scheduler"] = content["lr_scheduler"]
    if index["version"] > 1:
        found["optimizers"] = [record for _, record in sorted(records.items())]
    else:
        found.setdefault("lr_scheduler", None)
    return found


def beside(names: Iterable[str], layout: Sequence[Sequence[str]]) -> list[list[str]]:
    """For each group of parameter names those of ``names`` that are nearest to it in the model: whose path begins most
    like that of one of its parameters."""
    placed: list[list[str]] = [[] for _ in layout]
    paths = [[name.split(".") for name in group] for group in layout]
    for name in names:
        path = name.split(".")
        depths = [max((_alike(path, other) for other in group), default=-1) for group in paths]
        placed[depths.index(max(depths))].append(name)
    return placed


def _alike(one: Sequence[str], other: Sequence[str]) -> int:
    """How many entries two sequences begin with in common."""
    same = [left == right for left, right in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def check_savable(state: Mapping[str, Any]) -> None:
    """Make sure that what users' classes put into a state can be read again.

    Raises:
        ValueError: it cannot; the message names it and the remedy.
    """
    parts = {f"extra state {name!r}": value for name, value in state["extra_state"].items()}
    for record in state["optimizers"]:
        parts[f"the lr_scheduler of stage {record['stage']}"] = record["lr_scheduler"]
        parts[f"the parameter groups of stage {record['stage']}"] = record["groups"]
        parts[f"the optimizer's own state of stage {record['stage']}"] = record["other_state"]
    parts |= {f"the optimizer state of {name!r}": value for name, value in state["optimizer"].items()}
    for what, value in parts.items():
        if _is_plain(value):
            continue
        try:
            stream = io.BytesIO()
            torch.save(value, stream)
            stream.seek(0)
            torch.load(stream, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{what} cannot be kept in a file ({str(error).splitlines()[0]}): make it of numbers, text, tensors, "
                "lists and dicts, or call torch.serialization.add_safe_globals for its classes"
            ) from error


def _is_plain(value: Any) -> bool:
    if type(value) in (dict, OrderedDict, Counter):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str, Tensor)


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
