"""From documents to a folder of shards: ``paci-rt prepare``. The folder appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from paci_rt.data.documents import Document, Source
from paci_rt.data.shards import MANIFEST, PARTS, Manifest, Shard, sha256_of
from paci_rt.data.tokenizers import Tokenizer
from paci_rt.errors import DataError
from paci_rt.files import reason, sync_folder

SHARD_TOKENS = 100_000_000
VAL_SHARE = 0.01
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 4 << 20

Told = Callable[[int, int], Any]


def prepare(
    source: Source,
    out: Path,
    tokenizer: Tokenizer,
    *,
    val_share: float = VAL_SHARE,
    shard_tokens: int = SHARD_TOKENS,
    told: Told | None = None,
) -> Manifest:
    """Tokenize all documents of ``source`` into the new folder ``out``.

    Of ``1 / val_share`` documents in a row, the last is held back, or those that the source says are for validation.
    With fewer documents than that it is the end of the tokens.

    Args:
        source, tokenizer: what is tokenized, and by what.
        out: a folder that does not exist, or is empty.
        val_share: how much of it is held back, between 0 and 1.
        shard_tokens: tokens per file.
        told: called now and then with the documents and tokens so far.

    Raises:
        DataError: no text, a bad document, a folder that cannot be written, or no room left; ``out`` is then as it was.
    """
    if not 0 < val_share < 1:
        raise DataError(f"--val-share is {val_share!r}: give a share between 0 and 1, such as {VAL_SHARE}")
    if shard_tokens < 1:
        raise DataError(f"--shard-tokens is {shard_tokens}: give at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--out {out} is there already: choose a new folder, or remove it first")
    own: Path | None = None
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".part", dir=out.absolute().parent))
        manifest = _fill(own, source, tokenizer, val_share, shard_tokens, told)
        umask = os.umask(0)
        os.umask(umask)
        own.chmod(0o777 & ~umask)
        own.rename(out.absolute())
        own = None
        sync_folder(out.absolute().parent)
    except OSError as error:
        raise DataError(f"cannot write {out}: {reason(error)}") from error
    finally:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
    return manifest


def _fill(
    folder: Path, source: Source, tokenizer: Tokenizer, val_share: float, shard_tokens: int, told: Told | None
) -> Manifest:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writers = {part: _Writer(folder, part, np.dtype(dtype).newbyteorder("<"), shard_tokens) for part in PARTS}
    count, largest = 0, 0
    try:
        for batch in _batches(source.documents()):
            for document, numbers in zip(batch, tokenizer.encode([one.text for one in batch]), strict=True):
                held_back = document.held_back
                if held_back is None:
                    held_back = int((count + 1) * val_share) > int(count * val_share)
                tokens = _as_array(numbers, tokenizer, ends=document.ends)
                largest = max(largest, int(tokens.max(initial=0)))
                writers["val" if held_back else "train"].write(tokens)
                count += document.ends
            if told is not None:
                told(count, sum(writer.total for writer in writers.values()))
    finally:
        for writer in writers.values():
            writer.close()
    train, val = writers["train"], writers["val"]
    if train.total + val.total - count * (tokenizer.end_token is not None) <= 0:
        raise DataError("there is no text: all documents are empty")
    if val.total == 0:
        train.move_end(val, max(1, int(train.total * val_share)))
    for part, writer in writers.items():
        if writer.total == 0:
            raise DataError(f"there is not enough text: nothing is left for the {part} part; give more")
    shards = {part: writer.shards() for part, writer in writers.items()}
    manifest = Manifest(dtype=dtype, tokenizer=tokenizer.to_json(), documents=count, largest_token=largest, **shards)
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)
    return manifest


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Some documents at a time, so that a tokenizer can work on several at once."""
    while batch := list(islice(documents, 1)):
        characters = len(batch[0].text)
        while characters < BATCH_CHARACTERS and len(batch) < BATCH_DOCUMENTS:
            more = list(islice(documents, 1))
            if not more:
                break
            batch += more
            characters += len(more[0].text)
        yield batch


def _as_array(numbers: Sequence[int], tokenizer: Tokenizer, *, ends: bool) -> npt.NDArray[np.int64]:
    raw = np.frombuffer(numbers, dtype=np.uint8) if isinstance(numbers, bytes) else np.asarray(numbers)
    found = raw.astype(np.int64)
    if ends and tokenizer.end_token is not None:
        found = np.append(found, tokenizer.end_token)
    if len(found) and not 0 <= found.min() <= found.max() < tokenizer.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name} gave token {found.max()}, beyond its own vocabulary of {tokenizer.vocab_size}"
        )
    return found


class _Writer:
    """The files of one part, filled one after another."""

    def __init__(self, folder: Path, part: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder, self._part, self._dtype, self._most = folder, part, dtype, shard_tokens
        self._files: list[Path] = []
        self._stream: BinaryIO | None = None
        self._room = 0
        self.total = 0

    def write(self, tokens: npt.NDArray[np.int64]) -> None:
        raw = tokens.astype(self._dtype)
        while len(raw):
            if self._room == 0:
                self.close()
                self._files.append(self._folder / f"{self._part}-{len(self._files):05}.bin")
                self._stream, self._room = self._files[-1].open("xb"), self._most
            assert self._stream is not None
            now, raw = raw[: self._room], raw[self._room :]
            self._stream.write(now.tobytes())
            self._room -= len(now)
            self.total += len(now)

    def close(self) -> None:
        """Put the file on disk that is being written; the next write begins another one."""
        if self._stream is not None:
            stream, self._stream, self._room = self._stream, None, 0
            with stream:
                stream.flush()
                os.fsync(stream.fileno())

    def move_end(self, other: _Writer, count: int) -> None:
        """Hand the last ``count`` tokens, of several files perhaps, to ``other``."""
        moved: list[npt.NDArray[Any]] = []
        while count:
            file = self._files[-1]
            there = file.stat().st_size // self._dtype.itemsize
            taken = min(count, there)
            moved.insert(0, np.fromfile(file, dtype=self._dtype, offset=(there - taken) * self._dtype.itemsize))
            os.truncate(file, (there - taken) * self._dtype.itemsize)
            if taken == there:
                self._files.pop().unlink()
            count -= taken
            self.total -= taken
        for tokens in moved:
            other.write(tokens.astype(np.int64))
        other.close()

    def shards(self) -> tuple[Shard, ...]:
        """What a manifest says of the files, by what is on disk."""
        return tuple(
            Shard(file=file.name, tokens=file.stat().st_size // self._dtype.itemsize, sha256=sha256_of(file))
            for file in self._files
        )
