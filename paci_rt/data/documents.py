"""Documents from files and folders: plain text, JSON lines, parquet, and data sets of Hugging Face's ``datasets``.

A document is a text that was written as one. Tokenizers see it whole, except for plain text files, which may be larger
than memory: these are read in pieces that end with a line of text.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from paci_rt.errors import DataError, shown
from paci_rt.files import reason

PIECE_CHARACTERS = 1 << 20
HELD_BACK = {"validation", "valid", "val", "dev"}
LEFT_OUT = {"test"}
_TABLES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")  # where a break changes nothing for tokenizers that split at white space


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text, or a piece of one.

    Attributes:
        text: what is to be tokenized at once.
        ends: no further piece follows.
        held_back: it is in a file, or a split, of validation data; None where nothing says so.
    """

    text: str
    ends: bool = True
    held_back: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from, found before any is read.

    Attributes:
        files: to read, in order. dataset: instead of them, what ``datasets`` has loaded, by split.
        text_key: the column with the text. left_out: names that were not taken, because they say that they are a test.
    """

    files: tuple[Path, ...] = ()
    dataset: Any = None
    text_key: str = "text"
    left_out: tuple[str, ...] = ()

    def documents(self) -> Iterator[Document]:
        """All documents, always in the same order.

        Raises:
            DataError: a file that is not what its name says, or a row without text.
        """
        if self.dataset is not None:
            yield from _of_dataset(self.dataset, self.text_key)
        several = any(_is_table(file) and HELD_BACK & _words(file) for file in self.files)
        for file in self.files:
            held_back = bool(HELD_BACK & _words(file)) if several else None
            if _is_table(file):
                for text in _rows(file, self.text_key):
                    yield Document(text=text, held_back=held_back)
            else:
                yield from _pieces(file, held_back)


def find_source(names: Sequence[str], text_key: str = "text") -> Source:
    """What ``--data`` names: files and folders, a folder of ``datasets``' ``save_to_disk``, or ``hf:NAME`` of a hub.

    Raises:
        DataError: there is nothing, or its library is not installed.
    """
    files: list[Path] = []
    left_out: list[str] = []
    for name in names:
        path = Path(name)
        saved = path.is_dir() and any((path / one).is_file() for one in ("dataset_dict.json", "dataset_info.json"))
        if name.startswith("hf:") or saved:
            if len(names) > 1:
                raise DataError(f"--data {name} is a data set of its own: prepare it alone")
            return Source(dataset=_load(name, saved), text_key=text_key)
        if not path.exists():
            raise DataError(f"--data {name} does not exist: give files or folders of text, JSON lines or parquet")
        if path.is_file():
            files.append(path)
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
        tables = [file for file in inside if _is_table(file)]
        tests = [file for file in tables if LEFT_OUT & _words(file)] if len(tables) > 1 else []
        left_out += [str(file.relative_to(path)) for file in tests]
        files += [file for file in (tables or inside) if file not in tests]
    if not files:
        raise DataError(f"--data {' '.join(names)} holds no file: give text, JSON lines or parquet")
    return Source(files=tuple(files), text_key=text_key, left_out=tuple(left_out))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_table(file: Path) -> bool:
    return file.name.lower().endswith(_TABLES)


def _words(file: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", file.name.lower()))


# ------------------------------------------------------------------------------------------------------- plain text


def _pieces(file: Path, held_back: bool | None) -> Iterator[Document]:
    """A text file in pieces of about :data:`PIECE_CHARACTERS`."""
    kept = ""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            while more := stream.read(PIECE_CHARACTERS):
                if "\0" in more:
                    raise DataError(f"{file} is not text: it holds zero bytes; give UTF-8 text, JSON lines or parquet")
                kept += more
                end = max((match.end() for match in _LINE_END.finditer(kept)), default=0)
                if end and len(kept) >= PIECE_CHARACTERS:
                    yield Document(text=kept[:end], ends=False, held_back=held_back)
                    kept = kept[end:]
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason}): convert it, for example with iconv") from None
    except OSError as error:
        raise DataError(f"cannot read {file} ({reason(error)})") from None
    if kept:
        yield Document(text=kept, held_back=held_back)


# ----------------------------------------------------------------------------------------------------------- tables


def _rows(file: Path, key: str) -> Iterator[str]:
    return _of_parquet(file, key) if file.suffix.lower() == ".parquet" else _of_json(file, key)


def _of_json(file: Path, key: str) -> Iterator[str]:
    """JSON lines, or one list of objects."""
    zipped = file.name.lower().endswith(".gz")
    number = 0
    try:
        with gzip.open(file, "rb") if zipped else file.open("rb") as raw:
            stream = io.TextIOWrapper(raw, encoding="utf-8")
            for number, line in enumerate(stream, 1):
                if number == 1 and line.lstrip().startswith("["):
                    yield from (_text(row, key, f"{file} item {at}") for at, row in enumerate(_list(line, stream)))
                    return
                if line.strip():
                    yield _text(json.loads(line), key, f"{file} line {number}")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} line {number} is no JSON ({error}): give one object a line") from None
    except (OSError, EOFError) as error:  # a damaged .gz
        raise DataError(f"cannot read {file} ({reason(error)})") from None


def _list(first: str, stream: io.TextIOWrapper) -> list[Any]:
    found: list[Any] = json.loads(first + stream.read())
    return found


def _text(row: Any, key: str, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict) or key not in row:
        there = ", ".join(map(str, row)) if isinstance(row, dict) else shown(row)
        raise DataError(f"{where} has no {key!r}, but {there}: name the text with --text-key")
    text = row[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} is {shown(text, 40)}, which is no text: name the text with --text-key")
    return text


def _of_parquet(file: Path, key: str) -> Iterator[str]:
    parquet = _library("pyarrow.parquet", "parquet", "pyarrow")
    try:
        with closing(parquet.ParquetFile(file)) as table:
            names = table.schema_arrow.names
            if key not in names:
                raise DataError(f"{file} has no column {key!r}, but {', '.join(names)}: name it with --text-key")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[key]):
                for text in batch.column(0).to_pylist():
                    yield _text({key: text}, key, f"{file} row {row}")
                    row += 1
    except DataError:
        raise
    except Exception as error:  # of pyarrow's many kinds
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{file} is no parquet that can be read ({text}): copy it again") from None


def _load(name: str, saved: bool) -> Any:
    datasets = _library("datasets", "data sets of Hugging Face", "datasets")
    try:
        if saved:
            return datasets.load_from_disk(name)
        repository, _, config = name.removeprefix("hf:").partition(":")
        return datasets.load_dataset(repository, config or None, streaming=True)
    except Exception as error:  # of many kinds
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"--data {name}: datasets cannot load it ({text})") from None


def _of_dataset(dataset: Any, key: str) -> Iterator[Document]:
    """A data set, or several splits of one."""
    splits = dict(dataset) if isinstance(dataset, dict) else {"train": dataset}
    several = any(HELD_BACK & {name} for name in splits)
    for name, split in splits.items():
        if name in LEFT_OUT and len(splits) > 1:
            continue
        for at, row in enumerate(split):
            text = _text(row, key, f"split {name!r} row {at}")
            yield Document(text=text, held_back=name in HELD_BACK if several else None)


def _library(module: str, what: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise DataError(f"{what} needs {package}, which is not installed: pip install {package}") from None
