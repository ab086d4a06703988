"""Tokens to train on: memory-mapped, split once, and read by pure functions of the window's number.

Four sources. By default the text of Python's own standard library, which is on every machine. A text file or a
folder of them: the bytes are the tokens. Token files of nanoGPT or llm.c: a ``.bin``, or a folder whose ``.bin`` files
say ``train`` and ``val``. A folder of ``paci-rt prepare``.

No process tells another which sequences a window holds: stage 0 computes the inputs and the last stage the targets
from (window, seed) alone. So a run that was resumed, cut into other stages or spread over replicas sees the same ones.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from paci_rt.data.formats import refuse_tables
from paci_rt.data.shards import Joined, folder_of, is_prepared, open_prepared, refuse_orphan
from paci_rt.data.token_files import SCAN_TOKENS, open_tokens, vocab_text
from paci_rt.errors import DataError

VALIDATION_SHARE = 10  # one tenth is held back
_CACHE_FORMAT = 1
_SCAN_TOKENS = SCAN_TOKENS
_TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "__phello__"}

Tokens = npt.NDArray[Any] | Joined  # uint8, uint16 or uint32, 1-D, usually memory maps


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and held-back tokens; the two never overlap.

    Attributes:
        name: where the tokens come from, for messages and reports.
        train, val: 1-D uint8, uint16 or uint32.
        vocab_size: every token must be below it.
    """

    name: str
    train: Tokens
    val: Tokens
    vocab_size: int

    def digest(self) -> str:
        """A hash of the tokens, and their number; of more than 64 MiB a part, 1024 blocks of 16 KiB are read."""
        digest = hashlib.sha256()
        for part in (self.train, self.val):
            digest.update(f"{part.dtype.str} {len(part)}\n".encode())
            block = max(1, (16 << 10) // part.itemsize)
            every = block if part.nbytes <= 64 << 20 else (len(part) - block) // 1023
            for start in range(0, len(part), every):
                digest.update(part[start : start + block].tobytes())
            digest.update(part[-block:].tobytes())
        return f"{digest.hexdigest()[:16]} ({len(self.train) + len(self.val):,} tokens)"

    def require(self, seq_len: int) -> None:
        """Raise DataError unless both parts hold a sequence of ``seq_len`` tokens and the one that follows it."""
        for part, tokens in (("training", self.train), ("validation", self.val)):
            if len(tokens) < seq_len + 1:
                raise DataError(
                    f"{self.name} is too short: its {part} part has {len(tokens)} tokens "
                    f"and one sequence needs {seq_len + 1}; use more text or a shorter --seq-len"
                )

    def batch(
        self, window_index: int, batch_size: int, seq_len: int, seed: int, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one window, each int64 ``[batch_size, seq_len]``; a pure function of its arguments.

        Sequences start anywhere in the training part, drawn with replacement, as nanoGPT draws them. ``rows`` are
        those to read, for a replica that has a part of the window.
        """
        # Philox is counter-based and numpy keeps its raw stream stable across versions.
        draws = np.random.Philox(key=np.array([seed, window_index], dtype=np.uint64)).random_raw(batch_size)[rows]
        return self._gather(self.train, draws % np.uint64(len(self.train) - seq_len), seq_len)

    def validation(self, sequences: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """The fixed held-back set: evenly spaced sequences of the validation part; shapes as for :meth:`batch`."""
        starts = np.arange(sequences, dtype=np.uint64) * np.uint64(len(self.val) - seq_len) // np.uint64(sequences)
        return self._gather(self.val, starts, seq_len)

    def _gather(self, tokens: Tokens, starts: npt.NDArray[np.uint64], seq_len: int) -> tuple[Tensor, Tensor]:
        rows = np.stack([tokens[s : s + seq_len + 1] for s in starts.tolist()]).astype(np.int64)  # [batch, seq + 1]
        if rows.max() >= self.vocab_size:
            raise DataError(vocab_text(self.name, int(rows.max()), self.vocab_size))
        both = torch.from_numpy(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def load_corpus(data: str | os.PathLike[str] | None, *, vocab_size: int, seq_len: int) -> Corpus:
    """Open the corpus that ``--data`` names; None is Python's standard library.

    Args:
        data: None, a text file, a folder of text files, a ``.bin`` of nanoGPT or llm.c, a folder of such files with
            ``train`` and ``val`` in their names, or a folder of ``paci-rt prepare``. Where only one part is given, its
            last tenth is held back.
        vocab_size, seq_len: of the model that will read it; checked here, before anything is trained.

    Raises:
        DataError: missing, empty or too short, of another vocabulary, a ``.bin`` of another format, or a shard that is
            not what its manifest says.
    """
    name = "the Python standard library" if data is None else str(data)
    try:
        train, val = _load_parts(None if data is None else Path(data), vocab_size)
    except OSError as error:
        raise DataError(
            f"cannot read {name}: {error}; text is joined in {cache_folder()} (set XDG_CACHE_HOME to move it)"
        ) from error
    corpus = Corpus(name=name, train=train, val=val, vocab_size=vocab_size)
    if vocab_size < 256 and train.dtype == np.uint8:
        raise DataError(f"text needs a vocabulary of at least 256 (one token a byte), and this model has {vocab_size}")
    corpus.require(seq_len)
    return corpus


def _load_parts(path: Path | None, vocab_size: int) -> tuple[Tokens, Tokens]:
    if path is None:
        return _cached_text(*_standard_library())
    if is_prepared(path):
        return open_prepared(path, vocab_size, cache_folder())
    if path.is_file():
        if path.suffix == ".bin":
            if folder := folder_of(path):
                raise DataError(f"--data {path} is one shard of {folder}: give that folder")
            refuse_orphan(path)
            return _split(open_tokens(path, vocab_size, scan_tokens=_SCAN_TOKENS))
        _require_bytes(path)
        refuse_tables(path, [path])
        if not _looks_like_text(path):
            raise DataError(
                f"--data {path} is not text: it holds zero bytes; give UTF-8 text, or uint16 tokens named *.bin"
            )
        return _split(np.memmap(path, dtype=np.uint8, mode="r"))
    if not path.is_dir():
        raise DataError(f"--data {path} does not exist: give a text file, a folder, or a .bin file of tokens")
    train_files = sorted(path.glob("*train*.bin"))
    parts = {"train": train_files, "val": [file for file in sorted(path.glob("*val*.bin")) if file not in train_files]}
    missing = [f"{part}.bin" for part, found in parts.items() if not found]
    if not missing:
        train, val = (_joined(found, vocab_size) for found in parts.values())
        return train, val
    if len(missing) == 1:
        raise DataError(
            f"--data {path} has no {missing[0]}; add it, or pass the .bin file itself to hold back its last tenth"
        )
    files = [file for file in _walk(path) if _looks_like_text(file)]
    refuse_tables(path, files)
    if not files:
        raise DataError(f"--data {path} holds no text file, and neither train.bin nor val.bin")
    return _cached_text(files, f"{path.resolve()}")


def _joined(files: list[Path], vocab_size: int) -> Tokens:
    for file in files:
        refuse_orphan(file)
    found = [open_tokens(file, vocab_size, scan_tokens=_SCAN_TOKENS) for file in files]
    others = [file for file, tokens in zip(files, found, strict=True) if tokens.dtype != found[0].dtype]
    if others:
        raise DataError(f"{others[0]} and {files[0]} have tokens of different types: give files of one kind")
    return found[0] if len(found) == 1 else Joined(found)


def _split(tokens: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    held_back = len(tokens) // VALIDATION_SHARE
    return tokens[: len(tokens) - held_back], tokens[len(tokens) - held_back :]


def _require_bytes(path: Path) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"--data {path} is empty")


# ----------------------------------------------------------------------------------------------------- text files


def _walk(folder: Path, skip: frozenset[str] | set[str] = frozenset()) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(folder).as_posix())


def _looks_like_text(file: Path) -> bool:
    with file.open("rb") as stream:
        return b"\0" not in stream.read(8192)


def _standard_library() -> tuple[list[Path], str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in _walk(folder, _TEST_FOLDERS) if file.suffix == ".py"]
    if not files:
        raise DataError(
            f"this Python keeps no source text in {folder}; give a text file or a folder of them with --data PATH"
        )
    return files, str(folder)


def cache_folder() -> Path:
    """Where joined text is kept: ``$XDG_CACHE_HOME/paci_rt``, else ``~/.cache/paci_rt``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paci_rt"


def _cached_text(files: list[Path], origin: str) -> tuple[Tokens, Tokens]:
    """Join files into a uint8 train.bin and val.bin, once, and map them.

    Every tenth file is held back whole (the last tenth of the bytes if there are fewer than ten), so both parts have
    the same mixture. Any process may build the cache and several may at once: each writes a folder of its own, the
    first rename wins.
    """
    stamps = (f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)
    key = hashlib.sha256("\n".join([str(_CACHE_FORMAT), origin, *stamps]).encode()).hexdigest()[:16]
    target = cache_folder() / f"text-{key}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            _write_parts(files, own)
            own.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        finally:
            shutil.rmtree(own, ignore_errors=True)
    sizes = [(target / part).stat().st_size for part in ("train.bin", "val.bin")]
    if not all(sizes):
        raise DataError(f"the text in {origin} is empty or too short: {sum(sizes)} bytes")
    train, val = (np.memmap(target / part, dtype=np.uint8, mode="r") for part in ("train.bin", "val.bin"))
    return train, val


def _write_parts(files: list[Path], folder: Path) -> None:
    if len(files) < VALIDATION_SHARE:
        train, val = _split(np.frombuffer(b"".join(_texts(files)), dtype=np.uint8))
        (folder / "train.bin").write_bytes(train.tobytes())
        (folder / "val.bin").write_bytes(val.tobytes())
        return
    held_back = files[VALIDATION_SHARE - 1 :: VALIDATION_SHARE]
    kept = [file for i, file in enumerate(files) if i % VALIDATION_SHARE != VALIDATION_SHARE - 1]
    for name, part in (("train.bin", kept), ("val.bin", held_back)):
        with (folder / name).open("wb") as out:
            out.writelines(_texts(part))


def _texts(files: Iterable[Path]) -> Iterator[bytes]:
    for file in files:
        yield file.read_bytes()
