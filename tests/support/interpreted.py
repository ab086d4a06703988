"""A process in which Triton interprets kernels on the CPU.

Triton decides when it is imported, by ``TRITON_INTERPRET``, so the process of the tests cannot do it without
interpreting everything; ``interpreter(fn, *args)`` calls a function of a test module over there.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from support.deadlines import deadline
from support.processes import processes


def _work(inbox: Connection) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from paci_rt.kernels.launch import INTERPRETED

    assert INTERPRETED
    torch.set_num_threads(1)
    while (job := inbox.recv()) is not None:
        fn, args = job
        try:
            inbox.send((True, fn(*args)))
        except Exception:
            inbox.send((False, traceback.format_exc()))


class Interpreter:
    def __init__(self) -> None:
        context = processes()
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def __call__(self, fn: Callable[..., Any], *args: Any) -> Any:
        try:
            self._pipe.send((fn, args))
            fine, value = self._pipe.recv()
        except (BrokenPipeError, EOFError):
            self._process.join(timeout=deadline(10))
            raise AssertionError(f"the interpreting process ended with exit code {self._process.exitcode}") from None
        if not fine:
            raise AssertionError(f"in the interpreter:\n{value}")
        return value

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join(timeout=deadline(10))
        self._process.kill()
