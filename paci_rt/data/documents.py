"""Documents from files and folders: plain text, JSON lines, CSV, parquet, and data sets of Hugging Face's ``datasets``.

A document is a text that was written as one. Tokenizers see it whole, except for plain text files, which may be larger
than memory: these are read in pieces that end with a line of text.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from paci_rt.data.formats import HELD_BACK, LEFT_OUT, is_table, open_bytes, parts_by_name, refuse_foreign, unpacked_name
from paci_rt.errors import DataError
from paci_rt.files import reason
from paci_rt.wording import shown

PIECE_CHARACTERS = 1 << 20
LARGEST_FIELD = (1 << 31) - 1
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
        text_key: the column with the text. held_back: those of the files that are for validation.
        tests: names that were not taken, because they say that they are a test.
        others: names that were not taken, because there are tables beside them.
    """

    files: tuple[Path, ...] = ()
    dataset: Any = None
    text_key: str = "text"
    held_back: frozenset[Path] = frozenset()
    tests: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def documents(self) -> Iterator[Document]:
        """All documents, always in the same order.

        Raises:
            DataError: a file that is not what its name says, or a row without text.
        """
        if self.dataset is not None:
            yield from _of_dataset(self.dataset, self.text_key)
        for file in self.files:
            held_back = file in self.held_back if self.held_back else None
            if is_table(file):
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
    tests: list[str] = []
    others: list[str] = []
    named: list[Path] = []
    held_back: frozenset[Path] = frozenset()
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
            named.append(path)
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
        taken = [file for file in inside if is_table(file)] or inside
        others += [str(file.relative_to(path)) for file in inside if file not in set(taken)]
        for_validation, for_tests = parts_by_name(taken, path)
        if len(taken) > len(for_tests):
            tests += [str(file.relative_to(path)) for file in taken if file in for_tests]
            taken = [file for file in taken if file not in for_tests]
        files += taken
        held_back |= for_validation
    if not files:
        raise DataError(f"--data {' '.join(names)} holds no file: give text, JSON lines or parquet")
    places: dict[Path, Path] = {}
    for file in files:
        refuse_foreign(file)
        if (first := places.setdefault(file.resolve(), file)) is not file:
            raise DataError(f"--data has {file} twice, the first time as {first}: leave one of them out")
    held_back |= parts_by_name(named, None)[0]
    held_back = frozenset() if held_back >= set(files) else held_back & set(files)
    return Source(files=tuple(files), text_key=text_key, held_back=held_back, tests=tuple(tests), others=tuple(others))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# ------------------------------------------------------------------------------------------------------- plain text


def _pieces(file: Path, held_back: bool | None) -> Iterator[Document]:
    """A text file in pieces of about :data:`PIECE_CHARACTERS`."""
    kept = ""
    try:
        with open_bytes(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
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
    except _DAMAGED as error:
        raise DataError(f"cannot read {file} ({reason(error)})") from None
    if kept:
        yield Document(text=kept, held_back=held_back)


# ----------------------------------------------------------------------------------------------------------- tables


_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file can end in, compressed ones included."""


def _rows(file: Path, key: str) -> Iterator[str]:
    ending = Path(unpacked_name(file)).suffix
    if ending == ".parquet":
        return _of_parquet(file, key)
    return _of_csv(file, key, "\t" if ending == ".tsv" else ",") if ending in (".csv", ".tsv") else _of_json(file, key)


def _of_json(file: Path, key: str) -> Iterator[str]:
    """JSON lines, or one list of objects."""
    number = 0
    try:
        with open_bytes(file) as raw:
            stream = io.TextIOWrapper(raw, encoding="utf-8-sig")
            for number, line in enumerate(stream, 1):
                if number == 1 and line.lstrip().startswith("["):
                    yield from (_text(row, key, f"{file} item {at}") for at, row in enumerate(_list(line, stream)))
                    return
                if line.strip():
                    yield _text(json.loads(line), key, f"{file} line {number}")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} line {number} is no JSON ({error}): give one object a line") from None
    except _DAMAGED as error:
        raise DataError(f"cannot read {file} ({reason(error)})") from None


def _of_csv(file: Path, key: str, delimiter: str) -> Iterator[str]:
    """Rows under a line of names, as spreadsheets write them."""
    limit = csv.field_size_limit(LARGEST_FIELD)
    try:
        with open_bytes(file) as raw:
            rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), delimiter=delimiter)
            if key not in (rows.fieldnames or ()):
                there = shown(", ".join(rows.fieldnames or ()) or "nothing", 200)
                raise DataError(f"{file} has no column {key!r} in its first line, but {there}: name it with --text-key")
            for row in rows:
                yield _text(row, key, f"{file} line {rows.line_num}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no CSV in UTF-8 that can be read ({error}): convert it") from None
    except _DAMAGED as error:
        raise DataError(f"cannot read {file} ({reason(error)})") from None
    finally:
        csv.field_size_limit(limit)


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
        raise DataError(
            f"{where}: {key!r} is {shown(text, 40)}, which is no text: take such rows out, or name the text with "
            "--text-key"
        )
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
