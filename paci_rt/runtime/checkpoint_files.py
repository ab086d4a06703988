"""Files of a checkpoint: parts with the state of some parameters and modules, and the index that names them."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from paci_rt.errors import CheckpointError
from paci_rt.files import open_plain, reason, replacing
from paci_rt.optim.group_options import same
from paci_rt.runtime.checkpoint_content import ContentChecker
from paci_rt.runtime.checkpoint_index import INDEX, KINDS, index_file, older_indexes, parse_index, write_index
from paci_rt.transport.patience import GivenUp

LATE_S = 5.0
"""How long a file that another process wrote may take to be seen here."""
BLOCK_BYTES = 1 << 20


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


def write_part(
    folder: Path,
    content: Mapping[str, Any],
    windows: int,
    at: int,
    count: int,
    generators: Sequence[int] | None = None,
    *,
    given_up: threading.Event | None = None,
) -> dict[str, Any]:
    """Write one file, under a new name, so that the files of the checkpoint before stay whole; its entry of the index.

    Args:
        generators: the stages of this process, where ``content`` has the state of its random generators.
        given_up: ends it where another thread does not want the file any more.

    Raises:
        OSError: it cannot be written; nothing is left of it then. GivenUp: nor was it wanted.
    """
    path = folder / f"step-{windows:08d}-stage-{at}-of-{count}-{secrets.token_hex(4)}.pt"
    with replacing(path) as stream:
        hashing = _Hashing(stream, given_up)
        try:
            torch.save(content, hashing)  # type: ignore[arg-type]
        except RuntimeError:
            if hashing.failure is not None:  # torch's writer has its own words for it
                raise hashing.failure from None
            raise
    names = {kind: list(content[kind]) for kind in KINDS if kind in content}
    entry = {"file": path.name, "bytes": hashing.bytes, "sha256": hashing.sha256.hexdigest(), **names}
    return entry if generators is None else {**entry, "generators": list(generators)}


class _Hashing:
    """A stream that hashes what passes."""

    def __init__(self, stream: BinaryIO, given_up: threading.Event | None) -> None:
        self._stream, self._given_up = stream, given_up
        self.sha256, self.bytes = hashlib.sha256(), 0
        self.failure: Exception | None = None

    def write(self, data: Any) -> int:
        try:
            if self._given_up is not None and self._given_up.is_set():
                raise GivenUp("it was given up")
            self._stream.write(data)
        except Exception as error:
            self.failure = error
            raise
        self.sha256.update(data)
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._stream.flush()


def remove_parts(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a checkpoint that did not come about, as far as the system allows."""
    for name in names:
        with suppress(OSError):
            (folder / name).unlink()


def finish(folder: Path, index: dict[str, Any], keep: int) -> None:
    """Write the index, which makes the files that it names a checkpoint, and remove those that no kept one needs.

    Raises:
        OSError: a file of another process cannot be seen here, or the system refuses.
    """
    for file in index["files"]:
        if not _appears(folder / file["file"], file["bytes"]):
            raise OSError(
                f"{folder / file['file']} was written by another process and cannot be seen here: choose a folder on a "
                "file system that all hosts share"
            )
    kept = set(write_index(folder, index, keep))
    for pattern in ("step-*-stage-*.pt", ".step-*.part", ".index*.part", ".probe-*"):  # replaced, or cut off
        for path in folder.glob(pattern):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _appears(path: Path, size: int) -> bool:
    """Whether a file is there, or comes soon: a file system in a network may be a little late."""
    until = time.monotonic() + LATE_S
    while True:
        with suppress(OSError):
            if path.lstat().st_size == size:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.05)


def read_part(folder: Path, entry: Mapping[str, Any], version: int) -> dict[str, Any]:
    """The content of one file, memory-mapped, after its hash and all of its structure were found right.

    Raises:
        CheckpointError: it is missing, damaged or not what ``entry`` says.
    """
    path = folder / entry["file"]
    try:
        with open_plain(path) as stream:
            check_file(path, stream, entry)
            name = f"/proc/self/fd/{stream.fileno()}"  # what was checked, whatever lies under its name by now
            source = name if os.path.exists(name) else str(path)
            content = torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} is missing or incomplete: {reason(error)}") from error
    except Exception as error:  # whatever torch makes of wrong bytes
        raise CheckpointError(f"{path} is damaged: torch cannot read it ({reason(error)})") from error
    return ContentChecker(path, entry, version).check(content)


def check_size(path: Path, stream: BinaryIO, entry: Mapping[str, Any]) -> None:
    """Compare the size of a file with that in the index."""
    size = os.fstat(stream.fileno()).st_size
    if size != entry["bytes"]:
        raise CheckpointError(f"{path} is missing or incomplete: it has {size} bytes, not {entry['bytes']}")


def check_file(path: Path, stream: BinaryIO, entry: Mapping[str, Any]) -> None:
    """Compare a file with its size and its hash, if there is one.

    Raises:
        CheckpointError: they differ.
    """
    check_size(path, stream, entry)
    if "sha256" not in entry:
        return
    sha256 = hashlib.sha256()
    while block := stream.read(BLOCK_BYTES):
        sha256.update(block)
    if sha256.hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its bytes do not have the hash that the index says")


def read_parts(
    folder: Path, index: Mapping[str, Any], names: Mapping[str, set[str]], stages: Sequence[int] = ()
) -> dict[str, Any]:
    """State of ``names``, which are by kind, memory-mapped, from whichever files hold them, with the records of
    optimizers there.

    Args:
        stages: those of this process; ``generators`` is the state of the random generators of the process that had
            just these, None where no process had.

    Raises:
        CheckpointError: as :func:`read_part`.
    """
    kinds = KINDS if index["version"] > 1 else ("params",)
    found: dict[str, Any] = {kind: {} for kind in (*kinds, "optimizer")}
    records: dict[int, Any] = {}
    found["generators"] = None
    for file in index["files"]:
        mine = {kind: names[kind].intersection(file[kind]) for kind in kinds}
        same_stages = bool(stages) and file.get("generators") == list(stages)
        if not same_stages and not any(mine.values()):
            continue
        content = read_part(folder, file, index["version"])
        if same_stages:
            found["generators"] = content.get("generators")
        for kind in kinds:
            found[kind].update({name: content[kind][name] for name in mine[kind]})
        entries = content["optimizer"].items()
        found["optimizer"].update({name: value for name, value in entries if name in mine["params"]})
        if "optimizers" in content and any(mine.values()):
            for record in content["optimizers"]:
                if not same(records.setdefault(record["stage"], record), record):
                    raise CheckpointError(
                        f"{folder / file['file']} is damaged: the optimizer of stage {record['stage']} is there twice"
                    )
        elif index["version"] == 1:
            found["lr_scheduler"] = content.get("lr_scheduler")
    if index["version"] > 1:
        found["optimizers"] = [record for _, record in sorted(records.items())]
    else:
        found.setdefault("lr_scheduler", None)
    return found


def checked_index(path: Path) -> dict[str, Any]:
    """The index at ``path``, whose files are all there with the right sizes.

    Raises:
        CheckpointError: they are not.
    """
    index = parse_index(path)
    for file in index["files"]:
        part = path.with_name(file["file"])
        try:
            with open_plain(part) as stream:
                check_size(part, stream, file)
        except OSError as error:
            raise CheckpointError(f"{part} is missing or incomplete: {reason(error)}") from error
    return index


def whole_index(path: Path) -> dict[str, Any]:
    """The index at ``path``, whose files all have their hashes.

    Raises:
        CheckpointError: they have not.
    """
    index = checked_index(path)
    for file in index["files"]:
        with open_plain(path.with_name(file["file"])) as stream:
            check_file(path.with_name(file["file"]), stream, file)
    return index


@contextmanager
def offering_older(place: str | os.PathLike[str]) -> Iterator[None]:
    """If the checkpoint in the folder ``place`` is bad, say which older one is not, and how to go on from it.

    Raises:
        CheckpointError: of the block, with the offer.
    """
    try:
        yield
    except CheckpointError as error:
        path = index_file(place)
        if path.name != INDEX or " is whole " in str(error):
            raise
        for older, _ in older_indexes(path.parent):
            try:
                index = whole_index(older)
            except (CheckpointError, OSError):
                continue
            raise CheckpointError(
                f"{error}; the checkpoint after {index['windows']} updates in {older} is whole: resume from that file"
            ) from error
        raise


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
