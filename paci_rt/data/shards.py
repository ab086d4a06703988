"""Folders of ``paci-rt prepare``: files of tokens, and a manifest that says what must be in them.

Together the shards of a part are one row of tokens, so what is read at a place does not depend on where a file ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paci_rt.data.token_files import Tokens
from paci_rt.errors import DataError
from paci_rt.files import reason
from paci_rt.wording import shown

MANIFEST = "manifest.json"
_SHARD_NAME = re.compile(r"(train|val)-[0-9]{5,}\.bin")
FORMAT, VERSION = "paci_rt tokens", 1
DTYPES = ("uint16", "uint32")
PARTS = ("train", "val")
BLOCK_BYTES = 1 << 20
REMEMBERED_BYTES = 16 << 20
"""Above so many bytes, a file that was hashed once is not hashed again while the system says that it is the same."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a part: its name in the folder, its tokens, and the sha256 of its bytes."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        dtype: of the tokens, little-endian: ``uint16`` or ``uint32``.
        tokenizer: ``name``, ``vocab_size``, ``end_token`` (or None) and ``sha256`` of what made the tokens.
        documents: how many there were. largest_token: in all shards.
        train, val: the shards of both parts, in order.
    """

    dtype: str
    tokenizer: dict[str, Any]
    documents: int
    largest_token: int
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n"


class Joined:
    """Several rows of tokens that are read as one: has a length, and slices that are arrays."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self._parts = list(parts)
        self._starts = [0]
        for part in parts:
            self._starts.append(self._starts[-1] + len(part))
        self.dtype = parts[0].dtype
        self.itemsize = self.dtype.itemsize

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def nbytes(self) -> int:
        return len(self) * self.itemsize

    def __getitem__(self, where: slice) -> Tokens:
        start, stop, step = where.indices(len(self))
        assert step == 1
        first = max(0, bisect_right(self._starts, start) - 1)
        found = []
        for at in range(first, len(self._parts)):
            offset = self._starts[at]
            if offset >= stop:
                break
            found.append(self._parts[at][max(0, start - offset) : stop - offset])
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty(0, self.dtype)


def is_prepared(path: Path) -> bool:
    """Whether ``path`` is a folder of ``paci-rt prepare``, or its manifest."""
    return path.is_file() if path.name == MANIFEST else (path / MANIFEST).is_file()


def refuse_orphan(file: Path) -> None:
    """Raise DataError for a shard of ``paci-rt prepare`` whose manifest is not beside it: without that, nothing says
    how many bytes a token has, and which files there must be."""
    if _SHARD_NAME.fullmatch(file.name) and not is_prepared(file.parent):
        raise DataError(
            f"{file} has the name of a shard of paci-rt prepare, and no {MANIFEST} is beside it, which says what its "
            "bytes are: copy that too; or rename the file, if it is nanoGPT's or llm.c's"
        )


def folder_of(shard: Path) -> Path | None:
    """The prepared folder that a file is a shard of; None where it is of none."""
    if not is_prepared(shard.parent):
        return None
    with suppress(DataError):
        manifest = read_manifest(shard.parent)
        if shard.name in {one.file for one in (*manifest.train, *manifest.val)}:
            return shard.parent
    return None


def read_manifest(path: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        DataError: it is missing, no JSON, of another format, or has a field that cannot be.
    """
    file = path if path.name == MANIFEST else path / MANIFEST
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file} ({reason(error)}): prepare the data again") from None
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise DataError(f"{file} was not written by paci-rt prepare: its format is not {FORMAT!r}")
    version = fields.pop("version", None)
    if version != VERSION:
        raise DataError(f"{file} has version {shown(version)}: this one reads {VERSION}; prepare the data again")
    try:
        fields |= {part: tuple(Shard(**one) for one in fields[part]) for part in PARTS}
        manifest = Manifest(**fields)
        _check(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}: {error}): prepare the data again") from None
    return manifest


def _check(manifest: Manifest) -> None:
    if manifest.dtype not in DTYPES:
        raise ValueError(f"dtype is {shown(manifest.dtype)}")
    if type(manifest.largest_token) is not int or not isinstance(manifest.tokenizer, dict):
        raise ValueError("largest_token is not an integer, or tokenizer no table")
    for part in PARTS:
        shards = getattr(manifest, part)
        if not shards:
            raise ValueError(f"{part} has no shard")
        for shard in shards:
            if not isinstance(shard.file, str) or Path(shard.file).name != shard.file:
                raise ValueError(f"{shown(shard.file)} is no name of a file in this folder")
            if type(shard.tokens) is not int or shard.tokens < 1 or not isinstance(shard.sha256, str):
                raise ValueError(f"tokens or sha256 of {shown(shard.file)}")


def open_prepared(path: Path, vocab_size: int, remembered: Path | None = None) -> tuple[Joined, Joined]:
    """Training and validation tokens of a prepared folder, each shard as the manifest says that it is.

    Args:
        path: the folder, or its manifest.
        vocab_size: of the model that will read it.
        remembered: folder where it is noted which files have been hashed; None hashes all of them every time.

    Returns:
        Each uint16 or uint32 [tokens], mapped.

    Raises:
        DataError: a shard is missing, truncated or changed, or the tokens are of a larger vocabulary.
    """
    folder = path.parent if path.name == MANIFEST else path
    manifest = read_manifest(path)
    if manifest.largest_token >= vocab_size:
        text = f"prepare the data with another tokenizer than {manifest.tokenizer.get('name')}"
        raise DataError(
            f"{folder} holds token {manifest.largest_token} of tokenizer {manifest.tokenizer.get('name')} "
            f"({manifest.tokenizer.get('vocab_size')} tokens), but the model's vocabulary has {vocab_size}; choose a "
            f"model with a larger one, or {text}"
        )
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    shards = [*manifest.train, *manifest.val]
    for shard in shards:
        _check_size(folder, shard, dtype.itemsize)
    total_bytes = sum(shard.tokens for shard in shards) * dtype.itemsize
    for shard in shards:
        _check_hash(folder, shard, remembered if total_bytes > REMEMBERED_BYTES else None)
    train, val = (
        Joined([np.memmap(folder / shard.file, dtype=dtype, mode="r") for shard in part])
        for part in (manifest.train, manifest.val)
    )
    return train, val


def _check_size(folder: Path, shard: Shard, itemsize: int) -> None:
    file = folder / shard.file
    try:
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"shard {file} is missing ({reason(error)}): copy it here, or prepare the data again") from None
    if size != shard.tokens * itemsize:
        state = "truncated" if size < shard.tokens * itemsize else "too long"
        raise DataError(
            f"shard {file} is {state}: the manifest counts {shard.tokens:,} tokens, which makes "
            f"{shard.tokens * itemsize:,} bytes, and it has {size:,}; copy it again, or prepare the data again"
        )


def _check_hash(folder: Path, shard: Shard, remembered: Path | None) -> None:
    file = folder / shard.file
    note = None if remembered is None else remembered / f"hashed-{_identity(file, shard)}"
    if note is not None and note.exists():
        return
    try:
        found = sha256_of(file)
    except OSError as error:
        raise DataError(f"cannot read shard {file} ({reason(error)}): copy it again") from None
    if found != shard.sha256:
        raise DataError(
            f"shard {file} has changed: its sha256 is {found[:16]}..., and the manifest says {shard.sha256[:16]}...; "
            "copy it again, or prepare the data again"
        )
    if note is not None:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()


def _identity(file: Path, shard: Shard) -> str:
    """Of a file that has not been written to since: its change time cannot be set back."""
    now = os.stat(file)
    facts = (file.resolve(), now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns, shard.sha256)
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:32]


def sha256_of(file: Path) -> str:
    """Of all bytes of a file."""
    digest = hashlib.sha256()
    for block in _blocks(file):
        digest.update(block)
    return digest.hexdigest()


def _blocks(file: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            yield buffer[:count]
