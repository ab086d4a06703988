"""What the operating system says that a process takes, watched while it works."""

from __future__ import annotations

import ctypes
import threading
import time

REST = 10
FIELDS = ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem")


def resident_parts() -> dict[str, int]:
    """Bytes of this process by ``/proc/self/smaps_rollup``: its proportional set size, in which a page that several
    processes map counts for each by its share, and the anonymous, file and shared memory in it.

    Raises:
        OSError: the system has no such file.
    """
    found = {}
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in FIELDS:
                found[name] = int(value.split()[0]) * 1024
    return found


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def kept_by_malloc_bytes() -> int:
    """Freed memory that the C library keeps, by its own account (``mallinfo2``, glibc 2.33); 0 where it has none."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    ask.restype = _Mallinfo2
    return int(ask().fordblks)


class Watch:
    """Samples :func:`resident_parts` in a thread of its own and keeps the largest.

    Args:
        period_s: between samples, at least. One walks through the process's pages, which takes milliseconds for each
            GiB; the thread rests for ``REST`` times as long.
    """

    def __init__(self, period_s: float = 0.05) -> None:
        self.peak: dict[str, int] = {}
        self.samples = 0
        self.kept_by_malloc = 0  # at the peak
        self._period_s, self._stop = period_s, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            begin_s = time.thread_time()
            found = resident_parts()
            if found["Pss"] > self.peak.get("Pss", -1):
                self.peak = found
                self.kept_by_malloc = kept_by_malloc_bytes()
            self.samples += 1
            if self._stop.wait(max(self._period_s, REST * (time.thread_time() - begin_s))):
                return
