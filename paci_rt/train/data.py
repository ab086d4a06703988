"""Tokens to train on: memory-mapped, split once, and read by pure functions of the window's number.

Three sources. By default the text of Python's own standard library, which is on every machine. A text file or a
folder of them: the bytes are the tokens. nanoGPT's token files: a ``.bin`` of uint16, or a folder with ``train.bin``
and ``val.bin``.

No process tells another which sequences a window holds: stage 0 computes the inputs and the last stage the targets
from (window, seed) alone.
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

VALIDATION_SHARE = 10  # one tenth is held back
_CACHE_FORMAT = 1
_SCAN_TOKENS = 1 << 24  # how much of a .bin is looked at before training; every batch is checked as well
_TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "__phello__"}

Tokens = npt.NDArray[Any]  # uint8 or uint16, 1-D, usually a memory map


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and held-back tokens; the two never overlap.

    Attributes:
        name: where the tokens come from, for messages and reports.
        train, val: 1-D uint8 or uint16.
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
        """Raise ValueError unless both parts hold a sequence of ``seq_len`` tokens and the one that follows it."""
        for part, tokens in (("training", self.train), ("validation", self.val)):
            if len(tokens) < seq_len + 1:
                raise ValueError(
                    f"{self.name} is too short: its {part} part has {len(tokens)} tokens "
                    f"and one sequence needs {seq_len + 1}; use more text or a shorter --seq-len"
                )

    def batch(self, window_index: int, batch_size: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one window, each int64 ``[batch_size, seq_len]``; a pure function of its arguments.

        Sequences start anywhere in the training part, drawn with replacement, as nanoGPT draws them.
        """
        # Philox is counter-based and numpy keeps its raw stream stable across versions.
        draws = np.random.Philox(key=np.array([seed, window_index], dtype=np.uint64)).random_raw(batch_size)
        return self._gather(self.train, draws % np.uint64(len(self.train) - seq_len), seq_len)

    def validation(self, sequences: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """The fixed held-back set: evenly spaced sequences of the validation part; shapes as for :meth:`batch`."""
        starts = np.arange(sequences, dtype=np.uint64) * np.uint64(len(self.val) - seq_len) // np.uint64(sequences)
        return self._gather(self.val, starts, seq_len)

    def _gather(self, tokens: Tokens, starts: npt.NDArray[np.uint64], seq_len: int) -> tuple[Tensor, Tensor]:
        rows = np.stack([tokens[s : s + seq_len + 1] for s in starts.tolist()]).astype(np.int64)  # [batch, seq + 1]
        if rows.max() >= self.vocab_size:
            raise ValueError(_vocab_message(self.name, int(rows.max()), self.vocab_size))
        both = torch.from_numpy(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def load_corpus(data: str | os.PathLike[str] | None, *, vocab_size: int, seq_len: int) -> Corpus:
    """Open the corpus that ``--data`` names; None is Python's standard library.

    Args:
        data: None, a text file, a folder of text files, a ``.bin`` of uint16 tokens, or a folder with train.bin and
            val.bin. Where only one part is given, its last tenth is held back.
        vocab_size, seq_len: of the model that will read it; checked here, before anything is trained.

    Raises:
        ValueError: missing, empty or too short, or a ``.bin`` that is not uint16 or not of this vocabulary.
    """
    name = "the Python standard library" if data is None else str(data)
    try:
        train, val = _load_parts(None if data is None else Path(data), vocab_size)
    except OSError as error:
        raise ValueError(
            f"cannot read {name}: {error}; text is joined in {cache_folder()} (set XDG_CACHE_HOME to move it)"
        ) from error
    corpus = Corpus(name=name, train=train, val=val, vocab_size=vocab_size)
    if vocab_size < 256 and train.dtype == np.uint8:
        raise ValueError(f"text needs a vocabulary of at least 256 (one token a byte), and this model has {vocab_size}")
    corpus.require(seq_len)
    return corpus


def _load_parts(path: Path | None, vocab_size: int) -> tuple[Tokens, Tokens]:
    if path is None:
        return _cached_text(*_standard_library())
    if path.is_file():
        if path.suffix == ".bin":
            return _split(_open_bin(path, vocab_size))
        _require_bytes(path)
        if not _looks_like_text(path):
            raise ValueError(
                f"--data {path} is not text: it holds zero bytes; give UTF-8 text, or uint16 tokens named *.bin"
            )
        return _split(np.memmap(path, dtype=np.uint8, mode="r"))
    if not path.is_dir():
        raise ValueError(f"--data {path} does not exist")
    parts = [path / "train.bin", path / "val.bin"]
    missing = [part.name for part in parts if not part.is_file()]
    if not missing:
        return _open_bin(parts[0], vocab_size), _open_bin(parts[1], vocab_size)
    if len(missing) == 1:
        raise ValueError(
            f"--data {path} has no {missing[0]}; add it, or pass the .bin file itself to hold back its last tenth"
        )
    files = [file for file in _walk(path) if _looks_like_text(file)]
    if not files:
        raise ValueError(f"--data {path} holds no text file, and neither train.bin nor val.bin")
    return _cached_text(files, f"{path.resolve()}")


def _split(tokens: Tokens) -> tuple[Tokens, Tokens]:
    held_back = len(tokens) // VALIDATION_SHARE
    return tokens[: len(tokens) - held_back], tokens[len(tokens) - held_back :]


def _require_bytes(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError(f"--data {path} is empty")


# ---------------------------------------------------------------------------------------------------- token files


def _open_bin(path: Path, vocab_size: int) -> Tokens:
    """Map a nanoGPT token file and refuse one that is evidently something else."""
    _require_bytes(path)
    size = path.stat().st_size
    remedy = "nanoGPT's format is raw little-endian uint16: numpy.array(tokens, dtype=numpy.uint16).tofile(path)"
    if size % 2:
        raise ValueError(f"{path} has an odd size of {size} bytes and cannot be uint16; {remedy}")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    found = _foreign_dtype(tokens)
    if found:
        raise ValueError(f"{path} looks like {found}, not uint16; {remedy}")
    largest = max(int(block.max()) for block in _sample(tokens))
    if largest >= vocab_size:
        raise ValueError(_vocab_message(str(path), largest, vocab_size))
    return tokens


def _sample(tokens: Tokens) -> Iterator[Tokens]:
    """All of a small file, sixteen equally distant blocks of a large one."""
    block = _SCAN_TOKENS // 16
    step = max(block, -(-len(tokens) // 16))
    for start in range(0, len(tokens), step):
        yield tokens[start : start + block]


def _foreign_dtype(tokens: Tokens) -> str | None:
    """Name the dtype whose pattern the first tokens show, if it is not uint16.

    Read as uint16, small int32 have every second value zero and small int64 three of four; fp32 and fp64 that hold
    token numbers are recognised by being whole, which thousands of uint16 pairs never are by chance.
    """
    head = np.array(tokens[:4096])
    if len(head) % 4 == 0:
        if head[0::4].any() and not head.reshape(-1, 4)[:, 1:].any():
            return "int64"
        if _whole(head.view("<f8")):
            return "float64"
    if len(head) % 2 == 0:
        if head[0::2].any() and not head[1::2].any():
            return "int32"
        if _whole(head.view("<f4")):
            return "float32"
    return None


def _whole(values: npt.NDArray[Any]) -> bool:
    with np.errstate(all="ignore"):
        tokens = (values >= 0) & (values < 1 << 17) & (values == np.floor(values))
        return bool(tokens.all() and (values >= 1).any())


def _vocab_message(name: str, token: int, vocab_size: int) -> str:
    return (
        f"{name} holds token {token}, but the model's vocabulary has {vocab_size}; choose a model with a larger one "
        "(--model gpt2 has 50257), or check that the file is uint16"
    )


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
        raise ValueError(
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
        raise ValueError(f"the text in {origin} is empty or too short: {sum(sizes)} bytes")
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
