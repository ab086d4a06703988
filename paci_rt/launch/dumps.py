"""What the processes of a failed run did last, in one file for ``paci-rt doctor --run``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from paci_rt.launch.blame import Seen, guilty

FORMAT = "paci_rt failure"
NAME = "failure.json"


def write_dump(folder: Path, seen: Mapping[int, Seen], message: str, *, name: str = NAME) -> str:
    """Write one JSON file: ``format message guilty monotonic_s unix_s stages``; each stage has its board and condition.

    Returns:
        What the error says more: where it is, or why it could not be written.
    """
    first = guilty(seen)
    content = {
        "format": FORMAT,
        "message": message,
        "guilty": first,
        "monotonic_s": time.monotonic(),
        "unix_s": time.time(),
        "stages": {
            rank: {**asdict(one.standing), "condition": one.condition, "words": one.standing.words()}
            for rank, one in sorted(seen.items())
        },
    }
    target = folder / name
    part = folder / f".{name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
        os.replace(part, target)
    except OSError as refusal:
        return f"; what they did last could not be written to {target} ({refusal.strerror})"
    return f"; in plain words: paci-rt doctor --run {folder}"
