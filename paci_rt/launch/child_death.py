"""A process that ends when its parent does, whatever it does then."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from multiprocessing import parent_process

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
POLL_S = 1.0


def die_with(parent: int) -> None:
    """End this process when ``parent`` ends, which has started it."""

    def watch() -> None:
        launcher = parent_process()
        if launcher is not None:
            launcher.join()
        else:
            while os.getppid() == parent:
                _ENDED.wait(POLL_S)
        os._exit(1)

    if sys.platform == "linux":  # also ends a process that holds the interpreter lock in a long call
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True, name="paci-rt watch").start()


_ENDED = threading.Event()
