"""Structured logs: one JSON object a line, one file a process, for programs that follow a run.

Each line has ``unix_s rank stages event phase step action completed``; ``event`` is ``phase`` (another one began),
``step``, ``eval`` and ``saved`` (with the numbers of the report), ``error`` (with ``error`` and ``message``), ``end``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paci_rt import launch, status
from paci_rt.errors import ActionError


class RunLog:
    """The file of one process.

    Args:
        folder: made if it does not exist; lines are added to the file that is there.
        rank: of the process. stages: those that it has.
    """

    def __init__(self, folder: str, rank: int, stages: list[int]) -> None:
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(place / f"rank-{rank}.jsonl", flags, 0o600)
        self._head = {"rank": rank, "stages": stages}

    def write(self, event: str, **values: Any) -> None:
        """Add one line, in one piece."""
        now = status.board().read()
        where = {"phase": now.phase, "step": now.step, "action": now.action, "completed": now.completed}
        line = {"unix_s": time.time(), **self._head, "event": event, **where, **_finite(values)}
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        os.close(self._file)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` as JSON has them: it knows no infinity."""
    bad = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return values | dict.fromkeys(bad)


@contextmanager
def logged(folder: str | None, ctx: launch.Context, stages: list[int]) -> Iterator[launch.Context]:
    """A context like ``ctx`` whose reports are logged too, and with them the phases and the end of what runs inside.

    Args:
        folder: None logs nothing.
        stages: those of this process.
    """
    if folder is None:
        yield ctx
        return
    log = RunLog(folder, ctx.rank, stages)
    board = status.board()

    def report(values: dict[str, Any]) -> None:
        ctx.report(values)
        if values["kind"] in ("stage", "share"):  # for the log of the run
            return
        log.write(values["kind"], **{key: value for key, value in values.items() if key not in ("kind", "steps")})

    board.listener = lambda: log.write("phase", **_begun(ctx))
    try:
        yield launch.Context(
            ctx.rank,
            ctx.world_size,
            local=ctx.local,
            restarts=ctx.restarts,
            run_id=ctx.run_id,
            on_report=report,
        )
        log.write("end")
    except BaseException as error:
        at = {"failed_action": error.action} if isinstance(error, ActionError) else {}
        log.write("error", error=type(error).__name__, message=str(error), **at)
        raise
    finally:
        board.listener = None
        log.close()


def _begun(ctx: launch.Context) -> dict[str, Any]:
    return {"restarts": ctx.restarts} if ctx.restarts else {}
