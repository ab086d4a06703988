"""How many borders between files a micro-batch, a gradient and a message cross: the shorter, the easier to follow.

    python tools/routes.py

Three stages in one process are trained while every call in the package is seen. A *crossing* is a call from a function
in one file of the package to a function in another; calls inside torch between the two do not count as a stop.
``micro-batch``: F on one stage, its message, and F on the next. ``message``: SEND_F and RECV_F alone. ``gradient``: B
and the U that takes its window. ``early forward``: an F that looks ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import paci_rt

PACKAGE = Path(paci_rt.__file__).resolve().parent
KERNELS = PACKAGE.parent / "kernels"
LIMITS = {"micro-batch": 40, "gradient": 60, "message": 8}
WARM_UP, TRACED, ACCUMULATION = 3, 3, 4


class Tracer:
    """Sees calls while it is installed; ``crossings`` maps an action to the borders that it crossed.

    Attributes:
        files: likewise the files that it was in.
    """

    def __init__(self) -> None:
        self.crossings: dict[str, int] = {}
        self.files: dict[str, set[str]] = {}
        self._stack: list[str] = []
        self._action = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not file.startswith((str(PACKAGE), str(KERNELS))):
            return
        if event == "call":
            if frame.f_code.co_name == "_execute" and not self._stack:
                self._action = str(frame.f_locals["action"])
                self.crossings[self._action], self.files[self._action] = 0, set()
            elif not self._stack:
                return
            elif self._stack[-1] != file:
                self.crossings[self._action] += 1
            self.files[self._action].add(Path(file).name)
            self._stack.append(file)
        elif self._stack:
            self._stack.pop()


def trace(*, lookahead: bool) -> Tracer:
    """Train three stages under PACI and see the windows behind the warm-up."""
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3)]
    pipeline = paci_rt.LocalPipeline(
        modules,
        schedule="paci",
        n_microbatches=ACCUMULATION,
        loss_fn=nn.functional.mse_loss,
        optimizer=lambda params: paci_rt.AdamW([param for _, param in params], lr=1e-3),
        lookahead=lookahead,
    )
    tracer = Tracer()
    for step in range(WARM_UP + TRACED):
        if step == WARM_UP:
            sys.setprofile(tracer)
        pipeline.step(torch.randn(8, 8), target=torch.randn(8, 8))
    sys.setprofile(None)
    pipeline.close()
    return tracer


def routes() -> dict[str, tuple[int, int]]:
    """Crossings and files of every route, the longest of those traced."""
    found: dict[str, tuple[int, int]] = {}
    for lookahead in (False, True):
        tracer = trace(lookahead=lookahead)
        middle = (WARM_UP + 1) * ACCUMULATION + 1

        def of(*actions: str, tracer: Tracer = tracer) -> tuple[int, int]:
            files = set().union(*(tracer.files[action] for action in actions))
            return sum(tracer.crossings[action] for action in actions), len(files)

        for m in (middle, middle + 1):
            message = (f"0SEND_F{m}", f"1RECV_F{m}")
            _keep(found, "message", of(*message))
            _keep(found, "micro-batch" if not lookahead else "micro-batch, early", of(f"0F{m}", *message, f"1F{m}"))
        for stage in (0, 1):
            update = f"{stage}U{WARM_UP + 1}"
            _keep(found, "gradient", of(f"{stage}B{middle}", update))
    return found


def _keep(found: dict[str, tuple[int, int]], name: str, route: tuple[int, int]) -> None:
    found[name] = max(found.get(name, (0, 0)), route)


def table(found: dict[str, tuple[int, int]]) -> Iterable[str]:
    """A row a route."""
    yield f"{'route':<20}{'crossings':>10}{'files':>7}{'limit':>7}"
    for name, (crossings, files) in found.items():
        yield f"{name:<20}{crossings:>10}{files:>7}{LIMITS.get(name, ''):>7}"


def main() -> None:
    found = routes()
    print("\n".join(table(found)))
    raise SystemExit(int(any(found[name][0] > limit for name, limit in LIMITS.items())))


if __name__ == "__main__":
    main()
