"""Tokenizers by name: bytes, files and folders of Hugging Face's libraries, and tiktoken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from paci_rt.errors import DataError
from paci_rt.wording import shown

BYTES = "bytes"
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")
"""What ends a text in vocabularies that do not say what does, the likeliest first."""
HELP = "bytes, a tokenizer.json, a folder with one, tiktoken:NAME, or hf:NAME"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """From text to numbers.

    Attributes:
        name: as it was asked for.
        vocab_size: every number is below it.
        end_token: number put behind every document; None puts nothing there.
        sha256: of what decides the numbers; empty where the library does not show it.
        encode: numbers of several texts, in their order, without special ones.
        decode: the text of numbers.
    """

    name: str
    vocab_size: int
    end_token: int | None
    sha256: str
    encode: Callable[[Sequence[str]], list[Sequence[int]]]
    decode: Callable[[Sequence[int]], str]

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {key: getattr(self, key) for key in ("name", "vocab_size", "end_token", "sha256")}


def find_tokenizer(name: str, end_token: str | None = None) -> Tokenizer:
    """The tokenizer that ``--tokenizer`` names.

    Args:
        name: ``bytes``; a ``tokenizer.json``, or a folder with a tokenizer of ``transformers`` or ``tokenizers``;
            ``tiktoken:NAME``; ``hf:NAME`` from Hugging Face's hub, or its cache.
        end_token: text of the token that ends a document, ``none`` for no such token; None is the tokenizer's own.

    Raises:
        DataError: there is none, it is damaged, or its library is not installed.
    """
    if name == BYTES:
        return _of_bytes(end_token)
    kind, _, rest = name.partition(":")
    if kind == "tiktoken" and rest:
        return _of_tiktoken(name, rest, end_token)
    if kind == "hf" and rest:
        return _of_transformers(name, rest, end_token, local=False)
    path = Path(name)
    if path.is_file():
        return _of_file(name, path, end_token, {})
    if (path / "tokenizer.json").is_file():
        return _of_file(name, path / "tokenizer.json", end_token, _config(path))
    if path.is_dir():
        return _of_transformers(name, str(path), end_token, local=True)
    raise DataError(f"--tokenizer {shown(name)} is neither a file nor a folder: give {HELP}")


def _of_bytes(end_token: str | None) -> Tokenizer:
    if end_token not in (None, "none"):
        raise DataError(f"--end-token {shown(end_token)} with --tokenizer bytes: it has only 0, the default, and none")

    def encode(texts: Sequence[str]) -> list[Sequence[int]]:
        return [text.encode() for text in texts]

    return Tokenizer(
        name=BYTES,
        vocab_size=256,
        end_token=0 if end_token is None else None,
        sha256=_sha256(BYTES),
        encode=encode,
        decode=lambda numbers: bytes(numbers).decode(errors="replace"),
    )


def _of_file(name: str, file: Path, end_token: str | None, config: dict[str, Any]) -> Tokenizer:
    library = _library("tokenizers")
    try:
        found = library.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"--tokenizer {name}: {file} is no tokenizer of the tokenizers library ({error})") from None
    found.no_truncation()
    found.no_padding()
    known = found.get_vocab(with_added_tokens=True)

    def encode(texts: Sequence[str]) -> list[Sequence[int]]:
        return [one.ids for one in found.encode_batch(list(texts), add_special_tokens=False)]

    return Tokenizer(
        name=name,
        vocab_size=1 + max(known.values(), default=0),
        end_token=_end(name, end_token, known.get, config),
        sha256=_sha256(found.to_str()),
        encode=encode,
        decode=lambda numbers: str(found.decode(list(numbers), skip_special_tokens=False)),
    )


def _of_transformers(name: str, where: str, end_token: str | None, *, local: bool) -> Tokenizer:
    library = _library("transformers")
    try:
        found = library.AutoTokenizer.from_pretrained(where, local_files_only=local)
    except Exception as error:  # of many kinds
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"--tokenizer {name}: transformers cannot load it ({text}); give {HELP}") from None
    known = found.get_vocab()

    def encode(texts: Sequence[str]) -> list[Sequence[int]]:
        numbers: list[Sequence[int]] = found(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return numbers

    own = None if found.eos_token is None else {"eos_token": found.eos_token}
    return Tokenizer(
        name=name,
        vocab_size=1 + max(known.values(), default=0),
        end_token=_end(name, end_token, known.get, own or {}),
        sha256=_sha256(json.dumps(sorted(known.items()))),
        encode=encode,
        decode=lambda numbers: str(found.decode(list(numbers))),
    )


def _of_tiktoken(name: str, which: str, end_token: str | None) -> Tokenizer:
    library = _library("tiktoken")
    try:
        found = library.get_encoding(which)
    except Exception as error:  # of requests, where it has to be fetched
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"--tokenizer {name}: tiktoken cannot load it ({text[:200]}); known are "
            f"{', '.join(library.list_encoding_names())}"
        ) from None

    def number(token: str) -> int | None:
        return found.encode_single_token(token) if token in found.special_tokens_set else None

    def encode(texts: Sequence[str]) -> list[Sequence[int]]:
        return list(found.encode_ordinary_batch(list(texts)))

    return Tokenizer(
        name=name,
        vocab_size=found.n_vocab,
        end_token=_end(name, end_token, number, {}),
        sha256="",
        encode=encode,
        decode=lambda numbers: str(found.decode(list(numbers))),
    )


def _end(name: str, asked: str | None, number: Callable[[str], int | None], config: dict[str, Any]) -> int | None:
    """The number of the token that ends a document."""
    if asked == "none":
        return None
    if asked is not None:
        found = number(asked)
        if found is None:
            raise DataError(f"--end-token {shown(asked)}: tokenizer {name} has no such token; give one, or none")
        return found
    own = config.get("eos_token")
    own = own.get("content") if isinstance(own, dict) else own
    candidates = ((own,) if isinstance(own, str) else ()) + END_TOKENS
    return next((found for found in map(number, candidates) if found is not None), None)


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise DataError(f"--tokenizer needs {name}, which is not installed: pip install {name}") from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
