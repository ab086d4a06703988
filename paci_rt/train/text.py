"""From text to tokens and back, for :mod:`paci_rt.train.sampling`: bytes, and the tokenizers of other libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from paci_rt.errors import shown

BYTES = "bytes"
HELP = "bytes, a tokenizer.json, a folder with one, tiktoken:NAME, or hf:NAME"


@dataclass(frozen=True, kw_only=True)
class Codec:
    """``encode`` gives the tokens of a text, ``decode`` the text of tokens; ``name`` as it was asked for."""

    name: str
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]


def codec_of(name: str) -> Codec:
    """The tokenizer that ``--tokenizer`` names, in the words of ``paci-rt prepare``.

    Raises:
        ValueError: there is none, it is damaged, or its library is not installed.
    """
    kind, _, rest = name.partition(":")
    path = Path(name)
    if name == BYTES:
        return Codec(
            name=name,
            encode=lambda text: list(text.encode()),
            decode=lambda tokens: bytes(tokens).decode(errors="replace"),
        )
    if kind == "tiktoken" and rest:
        found = _made(name, lambda: _library("tiktoken").get_encoding(rest))
        return Codec(name=name, encode=found.encode_ordinary, decode=lambda tokens: str(found.decode(list(tokens))))
    if kind == "hf" and rest:
        return _of_transformers(name, rest, local=False)
    file = path if path.is_file() else path / "tokenizer.json"
    if file.is_file():
        found = _made(name, lambda: _library("tokenizers").Tokenizer.from_file(str(file)))
        return Codec(
            name=name,
            encode=lambda text: list(found.encode(text, add_special_tokens=False).ids),
            decode=lambda tokens: str(found.decode(list(tokens), skip_special_tokens=False)),
        )
    if path.is_dir():
        return _of_transformers(name, name, local=True)
    raise ValueError(f"--tokenizer {shown(name)} is neither a file nor a folder: give {HELP}")


def _of_transformers(name: str, where: str, *, local: bool) -> Codec:
    found = _made(name, lambda: _library("transformers").AutoTokenizer.from_pretrained(where, local_files_only=local))
    return Codec(
        name=name,
        encode=lambda text: list(found.encode(text, add_special_tokens=False)),
        decode=lambda tokens: str(found.decode(list(tokens))),
    )


def _made(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ValueError as error:
        if "pip install" in str(error):
            raise
        reason: Exception = error
    except Exception as error:  # libraries raise errors of many kinds, Exception itself among them
        reason = error
    text = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    raise ValueError(f"--tokenizer {name} cannot be loaded ({text[:200]}): give {HELP}") from None


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(f"--tokenizer needs {name}, which is not installed: pip install {name}") from None


def codec_of_run(vocab_size: int, data: str | None) -> Codec:
    """The tokenizer of a run, found by its model and data.

    Args:
        vocab_size: of the model. data: as ``--data`` named it.

    Raises:
        ValueError: nothing tells what made the tokens.
    """
    named = None if data is None else _manifest_tokenizer(Path(data))
    if named is not None:
        return codec_of(named)
    if vocab_size == 256:
        return codec_of(BYTES)
    raise ValueError(
        f"nothing says what made the tokens of this model, whose vocabulary has {vocab_size}: give --tokenizer, which "
        f"takes {HELP}; GPT-2's is tiktoken:gpt2"
    )


def _manifest_tokenizer(data: Path) -> str | None:
    """What the manifest of prepared data says of its tokenizer; None where there is no such manifest."""
    file = data if data.name == "manifest.json" else data / "manifest.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["tokenizer"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
