"""Files of a checkpoint that other processes have written where the first one cannot see them: they travel to it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from paci_rt.files import open_plain, reason, replacing, unguessable
from paci_rt.runtime.together import FINE, Failure

CHUNK_BYTES = 1 << 24
TAG = 7432


def collect(
    folder: Path, parts: Sequence[Sequence[dict[str, Any]]], group: dist.ProcessGroup | None
) -> tuple[list[dict[str, Any]], Failure]:
    """Bring all files to the process of rank 0, one after the other; every process calls this.

    Args:
        folder: with the files of this process, and on rank 0 where they come together.
        parts: entries of the files, by rank; the same on all.
        group: a gloo group.

    Returns:
        On rank 0 the entries of the files that are there now, and what went wrong.
    """
    rank = dist.get_rank(group)
    arrived: list[dict[str, Any]] = [] if rank else list(parts[0])
    failure = FINE
    for other, entries in enumerate(parts):
        for entry in entries if other else ():
            if rank == other:
                _send(folder / entry["file"], entry["bytes"], group)
            elif rank == 0:
                name = unguessable(entry["file"])
                problem = _receive(folder / name, entry, other, group)
                if problem:
                    failure = failure if failure != FINE else ("OSError", f"cannot write the checkpoint: {problem}")
                else:
                    arrived.append({**entry, "file": name})
    return arrived, failure


def _global(rank: int, group: dist.ProcessGroup | None) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def _send(path: Path, size: int, group: dist.ProcessGroup | None) -> None:
    """Send a file; what cannot be read is sent as zeros, which the hash tells."""
    with ExitStack() as stack:
        stream: BinaryIO | None = None
        with suppress(OSError):
            stream = stack.enter_context(open_plain(path))
        for at in range(0, size, CHUNK_BYTES):
            data = bytearray(min(CHUNK_BYTES, size - at))
            if stream is not None:
                with suppress(OSError):
                    stream.readinto(data)  # type: ignore[attr-defined]
            dist.send(torch.frombuffer(data, dtype=torch.uint8), _global(0, group), group, TAG)


def _receive(path: Path, entry: dict[str, Any], rank: int, group: dist.ProcessGroup | None) -> str:
    """Receive a file; returns what went wrong. All of it is taken in any case, since the other side sends it."""
    hashing, rest = hashlib.sha256(), entry["bytes"]
    what = f"stage file of rank {rank}: {path.parent}: "

    def chunk() -> memoryview:
        nonlocal rest
        data = torch.empty(min(CHUNK_BYTES, rest), dtype=torch.uint8)
        dist.recv(data, _global(rank, group), group, TAG)
        rest -= data.numel()
        return data.numpy().data

    try:
        with replacing(path) as stream:
            while rest:
                data = chunk()
                hashing.update(data)
                stream.write(data)
    except OSError as error:
        while rest:
            chunk()
        return f"{what}{reason(error)}; what was saved before is intact"
    if hashing.hexdigest() != entry["sha256"]:
        with suppress(OSError):
            path.unlink()
        return f"{what}it was damaged on its way; what was saved before is intact"
    return ""
