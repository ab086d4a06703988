"""Files of tokens as others write them, mapped and never copied: nanoGPT's and llm.c's.

nanoGPT's ``.bin`` is raw little-endian uint16. llm.c's has a header of 256 int32 in front: a magic number, a version
and the number of tokens; GPT-2's tokens are uint16 and Llama 3's uint32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paci_rt.errors import DataError

Tokens = npt.NDArray[Any]
"""uint8, uint16 or uint32, 1-D, usually a memory map."""

HEADER_INTS, HEADER_BYTES = 256, 1024
LLM_C = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
"""Magic number and version of llm.c's files, and what their tokens are."""
SCAN_TOKENS = 1 << 24
"""How much of a file is looked at before training; every batch is checked as well."""
NANOGPT = "nanoGPT's format is raw little-endian uint16: numpy.array(tokens, dtype=numpy.uint16).tofile(path)"


def open_tokens(path: Path, vocab_size: int, *, scan_tokens: int = SCAN_TOKENS) -> Tokens:
    """Map a ``.bin`` of nanoGPT or llm.c, and refuse one that is evidently something else, or of another vocabulary.

    Args:
        path: of a file that exists.
        vocab_size: every token must be below it.
        scan_tokens: how many tokens are looked at.

    Returns:
        uint16 or uint32 [tokens], read-only.

    Raises:
        DataError: empty, of another format or dtype, shorter or longer than its header says, or with too large tokens.
    """
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"--data {path} is empty")
    tokens = _of_llm_c(path, size)
    if tokens is None:
        tokens = _of_nanogpt(path, size)
    largest = max(int(block.max()) for block in sample(tokens, scan_tokens))
    if largest >= vocab_size:
        raise DataError(vocab_text(str(path), largest, vocab_size))
    return tokens


def _of_llm_c(path: Path, size: int) -> Tokens | None:
    """The tokens behind llm.c's header; None where the file does not begin with one."""
    if size < HEADER_BYTES:
        return None
    with path.open("rb") as stream:
        header = np.frombuffer(stream.read(HEADER_BYTES), dtype="<i4")
    magic, version, count = (int(one) for one in header[:3])
    if magic not in {one for one, _ in LLM_C} or header[3:].any():
        return None
    dtype = LLM_C.get((magic, version))
    if dtype is None:
        known = ", ".join(f"{one} with version {other}" for one, other in LLM_C)
        raise DataError(f"{path} has llm.c's magic number {magic} with version {version}: known are {known}")
    expected = HEADER_BYTES + count * np.dtype(dtype).itemsize
    if size != expected or count < 1:
        state = "is truncated" if size < expected else "does not fit its header"
        raise DataError(
            f"{path} {state}: llm.c's header counts {count:,} tokens, which makes {expected:,} bytes, and it has "
            f"{size:,}; copy or make it again"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES)


def _of_nanogpt(path: Path, size: int) -> Tokens:
    if size % 2:
        raise DataError(f"{path} has an odd size of {size} bytes and cannot be uint16; {NANOGPT}")
    tokens: Tokens = np.memmap(path, dtype="<u2", mode="r")
    found = _foreign_dtype(tokens)
    if found:
        raise DataError(f"{path} looks like {found}, not uint16; {NANOGPT}")
    return tokens


def sample(tokens: Any, scan_tokens: int) -> Iterator[Tokens]:
    """All of a small file, sixteen equally distant blocks of a large one."""
    block = max(1, scan_tokens // 16)
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


def vocab_text(name: str, token: int, vocab_size: int, source: str = "") -> str:
    """What is said of a token that the model does not have; ``source`` says where the tokens come from."""
    remedy = source or "check that the file is uint16"
    return (
        f"{name} holds token {token}, but the model's vocabulary has {vocab_size}; choose a model with a larger one "
        f"(--model gpt2 has 50257), or {remedy}"
    )
