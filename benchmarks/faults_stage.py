"""``paci-rt train`` with one fault in it: what ``benchmarks/faults.py`` starts, by itself or under torchrun.

The environment says which: ``FAULT`` is JSON with ``kind rank phase at mark``. Every process of the run imports this
file and waits for its rank and its place. ``mark`` is a file that gets the monotonic time of the strike.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FAULT: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))
KINDS = ("kill", "stop", "term", "raise", "memory", "exit", "cut")
PHASES = ("start", "warm-up", "training", "validation", "save", "writing", "end")


def strike() -> None:
    """Do it, once in the whole run."""
    try:
        file = os.open(FAULT["mark"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    from paci_rt import status

    with os.fdopen(file, "w") as stream:
        json.dump({"time_s": time.monotonic(), "standing": status.board().read().words(), "pid": os.getpid()}, stream)
    kind = FAULT["kind"]
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "term":
        os.kill(os.getppid(), signal.SIGTERM)
    elif kind == "cut":
        cut_links()
    elif kind == "exit":
        os._exit(3)
    elif kind == "memory":
        raise MemoryError("no memory is left for this stage")
    else:
        raise ArithmeticError("a stage made of cheese")


def cut_links() -> None:
    """Cut every connection of this process to another one, as a switch that fails does; the files stay open."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError, ValueError):
            link = socket.socket(fileno=os.dup(int(name)))
            if link.family in (socket.AF_INET, socket.AF_INET6):
                link.getpeername()
                link.shutdown(socket.SHUT_RDWR)
            link.close()


class Countdown:
    """Strikes at the call number ``at`` of something."""

    def __init__(self) -> None:
        self.left = int(FAULT["at"])

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            strike()


def install() -> None:
    """Put the fault where it belongs, in the process of its rank."""
    from paci_rt import status
    from paci_rt.runtime import checkpoint_files
    from paci_rt.runtime.executor import Executor
    from paci_rt.transport import collective, rendezvous

    countdown, phase = Countdown(), FAULT["phase"]
    enter, execute, gather = status.Board.enter, Executor._execute, rendezvous.Meeting.collect
    write = checkpoint_files._Hashing.write

    def here(own: status.Board) -> bool:
        return own.read().rank == FAULT["rank"]

    def entering(self: status.Board, name: str, **options: Any) -> None:
        enter(self, name, **options)
        if phase == "start" and self is status.board() and here(self) and name == "meeting the other stages":
            countdown()

    def executing(self: Executor, action: Any, batch: Any) -> None:
        standing = status.board().read()
        wanted = {"warm-up": "training", "training": "training"}.get(phase)
        among = phase == "validation" and (standing.phase == "validation" or not batch.training)
        if (wanted == standing.phase or among) and standing.rank == FAULT["rank"]:
            countdown()
        execute(self, action, batch)

    def collecting(self: Any, topic: str) -> Any:
        standing = status.board().read()
        wanted = {"save": "saving the checkpoint", "end": "the final gather"}.get(phase)
        if wanted == standing.phase and standing.rank == FAULT["rank"]:
            countdown()
        return gather(self, topic)

    def writing(self: Any, data: Any) -> int:
        if phase == "writing" and status.board().read().rank == FAULT["rank"]:
            try:
                countdown()
            except Exception as error:
                self.failure = error  # as the file's own
                raise
        return write(self, data)

    checkpoint_files._Hashing.write = writing  # type: ignore[method-assign]
    status.Board.enter = entering  # type: ignore[method-assign]
    Executor._execute = executing  # type: ignore[method-assign]
    rendezvous.Meeting.collect = collecting  # type: ignore[method-assign]
    assert collective.Meeting is rendezvous.Meeting


def install_importing() -> None:
    """Strike at a random moment of the start, which exceptions cannot."""
    delay_s = float(FAULT.get("delay_s", 0))
    rank = os.environ.get("RANK", "")
    if rank.isdigit() and int(rank) == FAULT["rank"]:
        timer = threading.Timer(delay_s, strike)
        timer.daemon = True
        timer.start()


if FAULT and FAULT.get("delay_s") is not None:
    install_importing()
elif FAULT:
    install()

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
    from paci_rt.cli.app import main

    sys.exit(main(sys.argv[1:]))
