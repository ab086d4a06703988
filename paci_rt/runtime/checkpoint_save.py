"""What must not be saved, how processes agree on who writes what, and the index."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paci_rt.errors import CheckpointError
from paci_rt.files import reason
from paci_rt.runtime import checkpoint_files as files_of
from paci_rt.runtime.checkpoint_index import FORMAT, INDEX, KINDS, VERSION
from paci_rt.runtime.engine import Pipeline
from paci_rt.runtime.folder_lock import sees
from paci_rt.runtime.together import FINE, Failure, gather


def check_finite(schedule: Pipeline) -> None:
    """Make sure that nobody goes on from weights that are lost: an update may overflow though its gradient did not.

    Raises:
        CheckpointError: with the first parameter or buffer that is not finite.
    """
    found = first_lost(schedule)
    if found is not None:
        stage, what = found
        raise CheckpointError(
            f"stage {stage}: {what}, so nothing was saved and what was saved before is intact: go on from that with a "
            "lower learning rate or with max_grad_norm= (--clip-grad-norm)"
        )


def first_lost(schedule: Pipeline) -> tuple[int, str] | None:
    """Stage and words for the first parameter or buffer that must not be saved; None where all may be.

    Frozen parameters and buffers may hold infinities on purpose, as masks do; NaN they may not.
    """
    for stage in schedule.stages:
        kept: list[tuple[str, Tensor, bool]] = [(*one, one[1].requires_grad) for one in stage.named_parameters()]
        kept += [(name, buffer, False) for name, buffer in stage.submod.named_buffers()]
        kept = [one for one in kept if one[1].numel() and (one[1].is_floating_point() or one[1].is_complex())]
        if not kept:
            continue
        device = kept[0][1].device
        bad = torch.stack([_lost(tensor.detach(), trained).to(device) for _, tensor, trained in kept]).tolist()
        for (name, _, trained), lost in zip(kept, bad, strict=True):
            if lost:
                return stage.stage_index, f"{name!r} {'is not finite' if trained else 'has NaN'}"
    return None


def _lost(tensor: Tensor, trained: bool) -> Tensor:
    """Whether there is a value that must not be saved, as a tensor on the same device."""
    norm = torch.linalg.vector_norm(tensor.float() if tensor.element_size() == 1 else tensor, float("inf"))
    return ~torch.isfinite(norm) if trained else torch.isnan(norm)


def finish(
    folder: Path, files: list[dict[str, Any]], windows: int, extra: Mapping[str, Any] | None, keep: int
) -> Failure:
    """Write the index, which makes the files a checkpoint; returns what went wrong."""
    try:
        files_of.finish(folder, index_of(files, windows, dict(extra or {})), keep)
    except OSError as error:
        text = f"cannot write the checkpoint: {INDEX}: {reason(error)}; what was saved before is intact"
        return "OSError", text
    return FINE


def index_of(
    files: list[dict[str, Any]], windows: int, extra: dict[str, Any], version: int = VERSION
) -> dict[str, Any]:
    return {"format": FORMAT, "version": version, "windows": windows, "extra": extra, "files": files}


def leave_to_one(
    names: dict[str, list[list[str]]], state: Mapping[str, Any], schedule: Pipeline, group: dist.ProcessGroup | None
) -> None:
    """Take out of ``names`` what a process before this one writes: buffers and extra state that several processes have.

    Raises:
        ValueError: they differ in the value, or two stages have a parameter of the same name.
    """
    ours = {kind: [name for stage in names[kind] for name in stage] for kind in KINDS}
    everyone = gather(ours, schedule, group)
    seen = {kind: Counter(name for theirs in everyone for name in theirs[kind]) for kind in KINDS}
    twice = [name for name, count in seen["params"].items() if count > 1]
    if twice:
        raise ValueError(
            f"two stages have a parameter named {twice[0]!r}: name them as in the uncut model, where each is one, "
            "or give tied_weights if it is the same weight"
        )
    shared = [(kind, name) for kind in KINDS[1:] for name, count in seen[kind].items() if count > 1]
    if not shared:
        return
    digests = gather({at: _digest(state[at[0]].get(at[1])) for at in shared if at[1] in ours[at[0]]}, schedule, group)
    here = dist.get_rank(group)
    for kind, name in shared:
        values = [theirs[kind, name] for theirs in digests if (kind, name) in theirs]
        if len(set(values)) > 1:
            raise ValueError(
                f"two stages have state named {name!r} with different values: name modules as in the uncut model, "
                "where each is one"
            )
        if any((kind, name) in theirs for theirs in digests[:here]):
            names[kind] = [[one for one in stage if one != name] for stage in names[kind]]


def _digest(value: Any) -> str:
    stream = io.BytesIO()
    torch.save(value, stream)
    return hashlib.sha256(stream.getvalue()).hexdigest()


def check_seen(folder: Path, marks: Sequence[tuple[tuple[str, str], str]]) -> None:
    for rank, (mark, host) in enumerate(marks):
        if not sees(folder, mark):
            raise CheckpointError(
                f"rank 0 on host {marks[0][1]} does not see what rank {rank} on host {host} writes to {folder}: give a "
                "folder on a file system that all hosts share"
            )
