"""Checkpoints that went wrong: one change, drawn from a seed, with the hashes made to fit or left as they were.

A hash finds what a disk or a network did. A program that wrote nonsense gives it the right hash, so both kinds of
damage are tried.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paci_rt.runtime.checkpoint_index import digest_of

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**70,
    10**400,
    1.5,
    math.nan,
    math.inf,
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "a\nb",
    [],
    [[]],
    [None],
    {},
    {"x": 1},
)
MORE_ODD: tuple[Any, ...] = (torch.zeros(0), torch.ones(2, dtype=torch.int8), torch.eye(3).to_sparse())


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in nested containers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*way, key)
        yield from places(item, (*way, key))


def changed(value: Any, rng: random.Random, odd: tuple[Any, ...]) -> str:
    """Change one thing in nested containers; says what."""
    way = rng.choice(list(places(value)))
    at: Any = value
    for key in way[:-1]:
        at = at[key]
    key, old = way[-1], at[way[-1]]
    kind = rng.choice(["replace", "replace", "replace", "remove", "twice", "bend"])
    if kind == "remove":
        del at[key]
    elif kind == "twice" and isinstance(at, list):
        at.append(old)
    elif kind == "bend" and isinstance(old, Tensor):
        at[key] = rng.choice([old.double(), old.reshape(-1)[:1], old.unsqueeze(0), old.to(torch.int64)])
    elif kind == "bend" and type(old) in (int, float):
        at[key] = rng.choice([-old - 1, old + 1, str(old), old * 10**30])
    elif kind == "bend" and isinstance(old, str):
        at[key] = rng.choice([old[:-1], old + "/..", "../" + old, old.upper() + "\x00"])
    else:
        at[key] = rng.choice(odd)
    return f"{kind} {way}"


def spoil(folder: Path, rng: random.Random) -> str:
    """Damage the checkpoint in ``folder``; says how."""
    index_path = folder / "index.json"
    index = json.loads(index_path.read_text())
    part = folder / rng.choice(index["files"])["file"]
    kind = rng.choice(
        ["index", "index", "hashed index", "hashed index", "content", "content", "content", "bytes", "cut"]
    )
    if kind == "index":
        what = changed(index, rng, ODD)
        index_path.write_text(json.dumps(index))
    elif kind == "hashed index":
        what = changed(index, rng, ODD)
        index["sha256"] = digest_of(index)
        index_path.write_text(json.dumps(index))
    elif kind == "content":
        content = torch.load(part, weights_only=True)
        what = changed(content, rng, ODD + MORE_ODD)
        torch.save(content, part)
        rehash(index_path, part)
    else:
        target = rng.choice([part, index_path])
        raw = bytearray(target.read_bytes())
        at = rng.randrange(len(raw))
        if kind == "cut":
            raw = raw[:at]
        else:
            raw[at] ^= 1 << rng.randrange(8)
        target.write_bytes(raw)
        what = f"{target.name} at {at}"
        if target == part and rng.random() < 0.5:
            rehash(index_path, part)
            what += ", hashed"
    return f"{kind}: {what}"


def rehash(index_path: Path, part: Path) -> None:
    """Make the index say what is now in ``part``."""
    index = json.loads(index_path.read_text())
    raw = part.read_bytes()
    for file in index["files"]:
        if file["file"] == part.name:
            file.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    index["sha256"] = digest_of(index)
    index_path.write_text(json.dumps(index))
