"""Which tokenizer made the tokens that a model was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from paci_rt.data.tokenizers import BYTES, HELP, Tokenizer, find_tokenizer


def tokenizer_of_run(vocab_size: int, data: str | None) -> Tokenizer:
    """The tokenizer of a run, found by its model and data.

    Args:
        vocab_size: of the model. data: as ``--data`` named it.

    Raises:
        ValueError: nothing tells what made the tokens.
    """
    named = None if data is None else _manifest_tokenizer(Path(data))
    if named is not None:
        return find_tokenizer(named)
    if vocab_size == 256 and not _has_token_files(data):
        return find_tokenizer(BYTES)
    raise ValueError(
        f"nothing says what made the tokens of this model, whose vocabulary has {vocab_size}: give --tokenizer, which "
        f"takes {HELP}; GPT-2's is tiktoken:gpt2"
    )


def _has_token_files(data: str | None) -> bool:
    """Whether the tokens were made by others, in files that do not say how."""
    return data is not None and (data.endswith(".bin") or any(Path(data).glob("*train*.bin")))


def _manifest_tokenizer(data: Path) -> str | None:
    """What the manifest of prepared data says of its tokenizer; None where there is no such manifest."""
    file = data if data.name == "manifest.json" else data / "manifest.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["tokenizer"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
