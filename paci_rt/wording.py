"""How an error names a value, and what was meant by one that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is most like ``word``, for the middle of a message; empty where none is like it.

    Dashes and underscores count for nothing: ``batch-size`` and ``--batchsize`` are near ``batch_size``.

    Example:
        >>> from paci_rt.wording import did_you_mean
        >>> did_you_mean("packi", ["1f1b", "paci"]), did_you_mean("colour", ["1f1b", "paci"])
        ("did you mean 'paci'? ", '')
    """
    plain: dict[str, str] = {}
    for choice in known:
        plain.setdefault(_bare(choice), choice)
    typed = _bare(word)
    begun = sorted((choice for choice in plain if typed and choice.startswith(typed)), key=len)
    near = begun or difflib.get_close_matches(typed, plain, n=1, cutoff=0.6)
    return f"did you mean {plain[near[0]]!r}? " if near else ""


def _bare(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")


def unknown(what: str, word: object, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist; ``what`` says what it should name, for example ``schedule``.

    Example:
        >>> from paci_rt.wording import unknown
        >>> unknown("transport", "glooo", ["shm", "gloo"])
        ValueError("unknown transport 'glooo': did you mean 'gloo'? choose from shm, gloo")
    """
    choices = list(known)
    return ValueError(
        f"unknown {what} {shown(word)}: {did_you_mean(str(word)[:40], choices)}choose from {', '.join(choices)}"
    )


def shown(value: Any, longest: int = 80) -> str:
    """``value`` in an error message, on one line: the middle of what is longer is left out.

    Example:
        >>> from paci_rt.wording import shown
        >>> shown("a\\nb"), shown(2**40), shown("x" * 1000, 20)
        ("'a\\\\nb'", '1,099,511,627,776', "'xxxxxxx ... xxxxxxx'")
    """
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * longest:
        return f"an integer of {value.bit_length():,} bits"
    try:
        text = f"{value:,}" if type(value) is int and abs(value) >= 10**6 else repr(value)
    except Exception:  # some objects cannot be printed
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    half = longest // 2 - 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"
