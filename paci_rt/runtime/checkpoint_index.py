"""The index of a checkpoint: which files belong to it, what is in them, and their hashes.

The index has a hash of itself. Whatever is wrong with it is one line that names the place in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from paci_rt.errors import CheckpointError
from paci_rt.files import open_plain, reason, replacing
from paci_rt.runtime import guard_memory

FORMAT = "paci_rt checkpoint"
VERSION = 4
"""There is no 3: one flipped bit would make a 1 or 2 of it, and those have no hashes."""
READABLE = (1, 2, VERSION)
"""Version 1 kept no buffers, one scheduler for all stages, and no options of parameter groups; 2 had no hashes."""
INDEX = "index.json"
OLDER = "index-{:08d}.json"
"""Name of the index under which a checkpoint can still be found when there is a newer one; by local updates."""
KINDS = ("params", "buffers", "extra_state")
"""What is kept by name, and listed in the index."""
MOST_BYTES = 1 << 28
"""An index is never so long."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def index_file(place: str | os.PathLike[str]) -> Path:
    """The index of ``place``, which is the folder of a checkpoint, or an index in it."""
    path = Path(place)
    return path if path.suffix == ".json" and not path.is_dir() else path / INDEX


def parse_index(path: Path) -> dict[str, Any]:
    """The index at ``path``; the files that it names are not looked at.

    Raises:
        CheckpointError: there is none, or something is wrong with it.
    """
    try:
        with open_plain(path) as stream:
            text = stream.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise CheckpointError(f"{path} is no index of a checkpoint: it has more than {MOST_BYTES} bytes")
        index = json.loads(text.decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path.parent} holds no checkpoint: it has no {path.name}") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    _Checker(path).check(index)
    found: dict[str, Any] = index
    if found["version"] < VERSION:
        for file in found["files"]:
            for key in ("sha256", "generators"):
                file.pop(key, None)  # not of that version, so nobody knows what it is of
    return found


def digest_of(index: Mapping[str, Any]) -> str:
    """SHA-256 over what an index says, but for this hash itself."""
    content = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def warn_of_age(place: str | os.PathLike[str], index: Mapping[str, Any]) -> None:
    """Say that nothing protects a checkpoint, if it is of a version without hashes."""
    if index["version"] < VERSION:
        warnings.warn(
            f"{place} is a checkpoint of format {index['version']}, which has no hashes: damage in it cannot be "
            "noticed; save it anew once it is loaded",
            RuntimeWarning,
            stacklevel=3,
        )


def older_indexes(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The readable indexes of ``folder`` other than ``index.json``, the last one saved first."""
    found = []
    for path in folder.glob("index-*.json"):
        try:
            found.append((path, parse_index(path)))
        except CheckpointError:
            continue
    return sorted(found, key=lambda pair: (pair[1].get("number", 0), pair[1]["windows"]), reverse=True)


def write_index(folder: Path, index: dict[str, Any], keep: int) -> list[str]:
    """Make the files that ``index`` names a checkpoint, and let go of all but the last ``keep`` ones.

    Returns:
        Names of the files that are still needed.
    """
    older = [(path, one) for path, one in older_indexes(folder) if path.name != OLDER.format(index["windows"])]
    numbers = [one.get("number", 0) for _, one in older]
    with suppress(CheckpointError):
        numbers.append(parse_index(folder / INDEX).get("number", 0))
    if index["version"] == VERSION:
        index = json.loads(json.dumps({**index, "number": 1 + max(numbers, default=0)}))
        index["sha256"] = digest_of(index)
    text = json.dumps(index, indent=1).encode()
    own = folder / OLDER.format(index["windows"])
    for path in [own, folder / INDEX] if keep > 1 else [folder / INDEX]:
        with replacing(path) as stream:
            stream.write(text)
    kept = older[: keep - 1]
    for path, _ in older[keep - 1 :]:
        path.unlink(missing_ok=True)
    if keep == 1:
        own.unlink(missing_ok=True)
    return [file["file"] for one in [index, *(one for _, one in kept)] for file in one["files"]]


class _Checker:
    """Looks at every field of an index."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self, index: Any) -> None:
        """Raise CheckpointError for the first thing that is wrong."""
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise CheckpointError(f"{self._path} is not the index of a {FORMAT}")
        version = index.get("version")
        if type(version) is not int or version not in READABLE:
            known = ", ".join(map(str, READABLE))
            raise CheckpointError(
                f"{self._path} has version {_short(version)}; this version of paci_rt reads {known}: use the one that "
                "wrote it"
            )
        if version == VERSION:
            try:
                same = index.get("sha256") == digest_of(index)
            except (ValueError, RecursionError):
                same = False
            if not same:
                raise CheckpointError(f"{self._path} is damaged: it does not have the hash that it says")
            self._integer("number", index.get("number"), 1)
        self._integer("windows", index.get("windows"), 0)
        if not isinstance(index.get("extra"), dict):
            self._wrong("extra", index.get("extra"), "an object")
        files = index.get("files")
        if not isinstance(files, list) or not files:
            self._wrong("files", files, "a list of files")
        for at, file in enumerate(files):
            self._file(f"files[{at}]", file, version)
        self._once("file", [file["file"] for file in files])
        for kind in KINDS if version > 1 else KINDS[:1]:
            self._once(kind, [name for file in files for name in file[kind]])

    def _file(self, at: str, file: Any, version: int) -> None:
        if not isinstance(file, dict):
            self._wrong(at, file, "an object")
        name = file.get("file")
        if not isinstance(name, str) or _NAME.fullmatch(name) is None or name.endswith(".json"):
            self._wrong(f"{at}.file", name, "the name of a file in the same folder")
        self._integer(f"{at}.bytes", file.get("bytes"), 1)
        if version == VERSION and not (isinstance(file.get("sha256"), str) and _SHA256.fullmatch(file["sha256"])):
            self._wrong(f"{at}.sha256", file.get("sha256"), "64 hexadecimal digits")
        for kind in KINDS if version > 1 else KINDS[:1]:
            if not _are_texts(file.get(kind)):
                self._wrong(f"{at}.{kind}", file.get(kind), "a list of names")
        stages = file.get("generators")
        if stages is not None and not (isinstance(stages, list) and all(type(one) is int for one in stages)):
            self._wrong(f"{at}.generators", stages, "a list of stages")
        problem = guard_memory.problem_of(file["safety"]) if "safety" in file else None
        if problem is not None:
            raise CheckpointError(f"{self._path} is damaged: {at}: {problem}")

    def _integer(self, at: str, value: Any, least: int) -> None:
        if type(value) is not int or not least <= value < 2**62:
            self._wrong(at, value, f"an integer of at least {least}")

    def _once(self, what: str, names: list[str]) -> None:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise CheckpointError(f"{self._path} is damaged: it names {what} {_short(name)} twice")
            seen.add(name)

    def _wrong(self, at: str, value: Any, wanted: str) -> NoReturn:
        raise CheckpointError(f"{self._path} is damaged: {at} is {_short(value)}, not {wanted}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one.isprintable() for one in value)


def _short(value: Any) -> str:
    """A value in at most about 60 characters, on one line."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**64:
        return f"an integer of {value.bit_length()} bits"
    said = " ".join(repr(value).split())
    return said if len(said) <= 60 else f"{said[:56]} ..."


def names_in(index: Mapping[str, Any], kind: str) -> Iterator[str]:
    """All names of a kind that an index lists."""
    return (name for file in index["files"] for name in file.get(kind, ()))
