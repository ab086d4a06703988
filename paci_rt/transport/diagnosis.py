"""What explains a transfer that failed: error texts, and a file with the last events of every channel."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from paci_rt import status
from paci_rt.action import Action
from paci_rt.errors import PeerLostError
from paci_rt.files import create, unguessable
from paci_rt.schedules.channel import Channel
from paci_rt.transport.patience import describe

_WRITTEN = ". Last events of this process's channels:"


def dump_events(
    transport: str,
    rank: int,
    error: BaseException,
    channels: Sequence[str],
    folder: str | os.PathLike[str] | None = None,
) -> str:
    """Write one JSON file with the last events of a process's channels.

    It holds ``transport``, ``rank``, ``pid``, ``error``, both clocks at the same moment (``monotonic_ns``, ``unix_s``),
    and ``channels``: one object for each end of a channel. Each has ``edge side slots timeout_s sent taken`` and
    ``events``. An event has ``time_ns`` on the monotonic clock of the host, ``event``, and as far as they apply
    ``sequence index slot bytes``.

    Args:
        channels: the channels' objects as JSON.
        folder: where the file goes; it is made if need be. None is the system's folder for temporary files; empty
            writes none.

    The file is new, under a name that cannot be guessed, and in the system's folder for temporary files it is for the
    user alone.

    Returns:
        What an error says at its end: the file's path, or why it could not be written, since no second error may hide
        the first; empty where ``folder`` is.
    """
    if folder == "":
        return ""
    head = {
        "transport": transport,
        "rank": rank,
        "pid": os.getpid(),
        "error": str(error),
        "monotonic_ns": time.monotonic_ns(),
        "unix_s": time.time(),
    }
    text = json.dumps(head)[:-1] + ', "channels": [\n' + ",\n".join(channels) + "\n]}\n"
    name = unguessable(f"paci_rt_events_rank{rank}_{os.getpid()}.json")
    place = Path(tempfile.gettempdir() if folder is None else folder)
    target = place / name
    try:
        place.mkdir(parents=True, exist_ok=True)
        with create(target, private=True) as stream:
            stream.write(text.encode())
    except OSError as refusal:
        return f"{_WRITTEN} {place} could not be written to ({refusal.strerror})"
    return f"{_WRITTEN} {target}"


def origin_of(error: BaseException, rank: int) -> str:
    """What ``error`` says of the stage that went first, in one line."""
    if isinstance(error, PeerLostError) and error.origin:
        return error.origin
    said = str(error).splitlines()[0] if str(error) else "without a word"
    return f"rank {rank} failed: {type(error).__name__}: {said}"


def action_of(channel: Channel, index: int, *, sending: bool) -> str:
    """The action that sends or receives message ``index``, for example ``0SEND_F7``."""
    doing = f"{channel.sender}SEND" if sending else f"{channel.receiver}RECV"
    return f"{doing}_{channel.kind}{index}"


def standing(slot: int, size: str, sent: int | None, taken: int | None) -> str:
    """How far a channel is; None is what this side cannot know. The native core writes the same words."""

    def word(sequence: int | None) -> str:
        return "unknown" if sequence is None else "none" if sequence < 0 else str(sequence)

    return f"slot {slot}, {size}; last completed sequence number: sender {word(sent)}, receiver {word(taken)}"


def timeout_text(channel: Channel, index: int, doing: str, where: str, timeout_s: float, *, sending: bool) -> str:
    """What a :class:`~paci_rt.errors.TransferTimeoutError` says, in the words of ``Endpoint::time_out`` in the core.

    Args:
        doing: what was waited for.
        where: as :func:`standing` gives it.
    """
    kind, sender, receiver = channel
    action, peer = action_of(channel, index, sending=sending), receiver if sending else sender
    what = {"F": "activations", "B": "gradients"}.get(kind, "a tied weight or its gradient")
    return (
        f"action {action} timed out after {timeout_s:g} s: {doing}; edge {channel.name} ({what} from "
        f"stage {sender} to stage {receiver}), {'micro-batch' if kind in 'FB' else 'window'} {index}, {where}. Look "
        f"for what holds stage {peer} up, or, if it may take that long, raise transfer_timeout_s "
        f"(--transfer-timeout), which is {timeout_s:g}"
    )


def both_sides(action: str, rank_of: Callable[[int], int]) -> str:
    """What this process and the one that an action waits for did last, as a sentence for an error's end.

    Args:
        action: the action's string, which is a message.
        rank_of: the rank, in the default group, of a stage's process.
    """
    own = status.board().read()
    last = f"last completed action here: {own.completed or 'none'}"
    doing = Action.parse(action)
    peer = status.Standing(action=action).awaited_stage()
    if peer is None or doing.stage == peer:
        return last
    return f"{last}; {describe(rank_of(peer))}"
