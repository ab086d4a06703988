"""Files that a command is asked to write: whether it could is known before it starts to work."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any


def check_file(flag: str, path: str | None) -> None:
    """Raise ValueError unless a file can be written at ``path``; leaves nothing behind."""
    if path is None:
        return
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file")
    try:
        if target.exists():
            target.open("ab").close()
        else:
            _try_to_write(target.absolute().parent)
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written ({error.strerror}): choose another place") from None


def check_folder(flag: str, path: str | None) -> None:
    """Raise ValueError unless files can be written in the folder ``path``, which need not exist; leaves nothing."""
    if path is None:
        return
    try:
        _try_to_write(Path(path).absolute())
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written ({error.strerror}): choose another folder") from None


def _try_to_write(folder: Path) -> None:
    while not folder.exists():
        folder = folder.parent
    tempfile.TemporaryFile(dir=folder).close()


def ready(path: str) -> Path:
    """``path``, with the folder that it lies in."""
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def write_json(path: str | None, value: dict[str, Any]) -> None:
    """Write ``value`` to ``path``, if there is one."""
    if path is not None:
        ready(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
