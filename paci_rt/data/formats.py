"""What a file's name says of its content, and its bytes without compression."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from paci_rt.errors import DataError

HELD_BACK = frozenset({"validation", "valid", "val", "dev"})
LEFT_OUT = frozenset({"test"})
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
FOREIGN = {
    ".arrow": "give the folder that save_to_disk() of datasets wrote",
    ".bin": "give tokens to paci-rt train --data as they are",
    ".npy": "write text, or raw uint16 tokens to a .bin for paci-rt train --data",
    ".npz": "write text, or raw uint16 tokens to a .bin for paci-rt train --data",
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack it first"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".epub", ".odt", ".xls", ".xlsx"), "take the text out first"),
    **dict.fromkeys((".pkl", ".pt", ".safetensors", ".sqlite", ".db"), "write the text to JSON lines first"),
}
"""Endings of files that are no text, and what to do instead."""


class _Zstandard(io.RawIOBase):
    """Reads what a library for Zstandard unpacks; its errors are OSErrors."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._stream = _zstandard(file).open(file, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, place: Any) -> int:
        try:
            found: bytes = self._stream.read(len(place))
        except Exception as error:  # of the library's own kind
            raise OSError(str(error)) from error
        place[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _zstandard(file: Path) -> Any:
    for name in ("compression.zstd", "zstandard"):  # the first one is Python 3.14's own
        try:
            return import_module(name)
        except ImportError:
            continue
    raise DataError(f"{file} needs zstandard, which is not installed: pip install zstandard")


_PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(_Zstandard(file), 1 << 20),
}


def unpacked_name(file: Path) -> str:
    """The name in small letters, without the ending of a compression: ``a.JSONL.gz`` is ``a.jsonl``."""
    name = file.name.lower()
    for ending in _PACKED:
        name = name.removesuffix(ending)
    return name


def open_bytes(file: Path) -> IO[bytes]:
    """Read a file, compressed or not, as its name says.

    Raises:
        DataError: what unpacks it is not installed. OSError: it cannot be opened.
    """
    packed = _PACKED.get(file.suffix.lower())
    stream: IO[bytes] = file.open("rb") if packed is None else packed(file)
    return stream


def is_table(file: Path) -> bool:
    """Whether it has rows, one document each."""
    return unpacked_name(file).endswith(TABLES)


def refuse_foreign(file: Path) -> None:
    """Raise DataError for a file whose name says that it holds no text."""
    ending = Path(unpacked_name(file)).suffix
    if ending in FOREIGN:
        raise DataError(f"{file} holds no text that can be read: {FOREIGN[ending]}")


def parts_by_name(files: Sequence[Path], below: Path | None) -> tuple[frozenset[Path], frozenset[Path]]:
    """Which files their names, or those of their folders, declare to be validation data, and which to be tests.

    Of tables any word of the name counts, as in ``validation-00000-of-00002.parquet``. Of text it must be all between
    dots (``wiki.valid.raw``), or there must be a file with ``train`` in its name too.

    Args:
        files: all that were found. below: the folder that they are in; names of folders above it say nothing.
    """
    trains = any("train" in words for file in files for words in _words(file, below))
    found = []
    for names in (HELD_BACK, LEFT_OUT):
        found.append(
            frozenset(
                file
                for file in files
                if any(names & words for words in _words(file, below, whole=not (is_table(file) or trains)))
            )
        )
    held_back, tests = found
    return held_back, tests


def _words(file: Path, below: Path | None, *, whole: bool = False) -> list[set[str]]:
    """The words of a file's name, and the names of the folders that it is in."""
    folders = [] if below is None else [{part.lower()} for part in file.relative_to(below).parts[:-1]]
    return [set(file.name.lower().split(".") if whole else re.split(r"[^a-z]+", file.name.lower())), *folders]


def refuse_tables(path: Path, texts: Sequence[Path]) -> None:
    """Raise DataError where text is wanted whose bytes are the tokens, and ``path`` has rows with text in them.

    Args:
        path: a file or a folder. texts: the files in it that would be read.
    """
    inside = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    rows = [file for file in inside if unpacked_name(file).endswith((".jsonl", ".ndjson", ".parquet", ".arrow"))]
    rows += [file for file in texts if unpacked_name(file) != file.name.lower()]
    if not rows and texts and all(is_table(file) for file in texts):
        rows = list(texts)
    if rows:
        own = "it" if rows[0] == path else str(rows[0])
        raise DataError(
            f"--data {path}: {own} is no plain text whose bytes could be tokens; make tokens of its text first: "
            f"paci-rt prepare --data {path} --out DIR, then --data DIR"
        )


__all__ = ["is_table", "open_bytes", "parts_by_name", "refuse_foreign", "refuse_tables", "unpacked_name"]
