"""A report of what all stages of a run do now, with their Python stacks, while they go on.

``SIGUSR1`` to the launcher or to any stage asks for it. The stacks are written by the signal's own handler, in C, so
that a stage that waits or computes in native code has one too; each process writes into an anonymous file of its own,
and whoever was asked reads them all.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from fcntl import F_SETFL, fcntl

from paci_rt import status
from paci_rt.launch.blame import Seen, sentence, waited_for

ANSWER_S = 1.0
"""How long a stage has to write its stack."""

_file = -1
_answered = 0


def listen() -> None:
    """Write the stacks of this process where others can read them at each SIGUSR1; needs the main thread."""
    global _file
    if not hasattr(faulthandler, "register") or not hasattr(os, "memfd_create"):
        return
    signal.signal(signal.SIGUSR1, lambda *_: None)  # so that the watcher hears it
    with suppress(OSError):
        _file = os.memfd_create("paci_rt_stacks", os.MFD_CLOEXEC)
        fcntl(_file, F_SETFL, os.O_APPEND)
        faulthandler.register(signal.SIGUSR1, file=_file, all_threads=True, chain=True)
        status.board().words[status.STACKS_FD] = _file + 1


def wanted(own: status.Board, signals: int) -> bool:
    """Whether one of ``signals`` that came is a person's: other processes, which write a report themselves, count
    theirs on the board."""
    global _answered
    others, _answered = own.words[status.ASKED] - _answered, own.words[status.ASKED]
    return signals > others


def report(boards: Mapping[int, status.Board]) -> str:
    """What every stage does, its sequence numbers, whom it waits for, and its stack; the stages go on meanwhile."""
    texts = ask(boards)
    lines = [f"paci-rt: what {len(boards)} stages do now"]
    for rank, board in sorted(boards.items()):
        seen = Seen.of(board)
        others = waited_for(rank, seen.standing, len(boards))
        waits = f"; waits for stage {', '.join(map(str, sorted(others)))}" if others else ""
        lines.append(f"{sentence(rank, seen)}; step {seen.standing.step}{waits}")
        lines += ["    " + line for line in texts[rank].splitlines()]
    return "\n".join(lines) + "\n"


def ask(boards: Mapping[int, status.Board]) -> dict[int, str]:
    """The stack of every process, by rank, or why there is none."""
    asked: dict[int, int] = {}
    for rank, board in boards.items():
        pid, file = board.words[status.PID], board.words[status.STACKS_FD] - 1
        with suppress(OSError):
            if pid > 0 and file >= 0 and status.process_state(pid) not in ("", "Z", *status.STOPPED):
                asked[rank] = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
                os.ftruncate(asked[rank], 0)
                board.words[status.ASKED] += 1
                os.kill(pid, signal.SIGUSR1)
    end, texts = time.monotonic() + ANSWER_S, dict.fromkeys(boards, "(no stack: the process is stopped or gone)")
    while time.monotonic() < end:
        sizes = [os.fstat(file).st_size for file in asked.values()]
        time.sleep(0.05)
        if all(sizes) and sizes == [os.fstat(file).st_size for file in asked.values()]:
            break
    for rank, file in asked.items():
        texts[rank] = os.pread(file, 1 << 20, 0).decode(errors="replace") or "(no stack within a second)"
        os.close(file)
    return texts
