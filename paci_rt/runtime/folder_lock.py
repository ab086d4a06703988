"""One run at a time in a folder, and one folder for all processes of a run."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from paci_rt.errors import CheckpointError
from paci_rt.files import create, open_plain, reason

LOCK = ".lock"
SEEN_S = 5.0
"""How long a file that another host wrote may take to be seen."""


class FolderLock:
    """A folder that no other process writes checkpoints into until :meth:`release`.

    The lock is the system's (``flock``) on a file in the folder, so it ends with the process that holds it, however
    that ends. The file says who that is, and goes with the lock. A second one of the same process is the same lock.

    Args:
        folder: which exists.

    Raises:
        CheckpointError: another process has the folder.
        OSError: no file can be made in it.
    """

    _held: ClassVar[dict[str, FolderLock]] = {}

    def __init__(self, folder: Path) -> None:
        self._key = os.path.realpath(folder)
        self._outer = self._held.get(self._key)
        self._file: int | None = None
        if self._outer is None:
            self._file = _lock(folder)
            self._path = folder.absolute() / LOCK
            self._held[self._key] = self

    def release(self) -> None:
        """Let others in; a second call does nothing."""
        file, self._file = self._file, None
        if file is None:
            return
        self._held.pop(self._key, None)
        with suppress(OSError):
            self._path.unlink()  # while it is still locked: who waits for it looks again
        os.close(file)

    @classmethod
    def forget(cls) -> None:
        """In a fork: the locks are the parent's, and must not outlive it."""
        for lock in cls._held.values():
            if lock._file is not None:
                os.close(lock._file)
                lock._file = None
        cls._held.clear()


os.register_at_fork(after_in_child=FolderLock.forget)


def _lock(folder: Path) -> int:
    """A locked file, open."""
    path = folder / LOCK
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(path, flags, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 1000, 0)
            os.close(file)
            raise CheckpointError(
                f"{folder} is in use by {_who(holder)}: wait until that run has ended, or give another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be locked ({reason(error)}): make sure that no other run saves into it",
                RuntimeWarning,
                stacklevel=4,
            )
        with suppress(FileNotFoundError):
            there, ours = path.lstat(), os.fstat(file)
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                break
        os.close(file)  # its holder removed it just then
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, text.encode(), 0)
    except OSError:  # the disk is full
        with suppress(OSError):
            path.unlink()
        os.close(file)
        raise
    return file


def _who(text: bytes) -> str:
    """What a lock's file says of its holder."""
    try:
        said = json.loads(text)
        return f"process {int(said['pid'])} on host {said['host']!s:.100} since {said['since']!s:.30}"
    except (ValueError, TypeError, KeyError, RecursionError):
        return "another process"


class Probe:
    """A small file in a folder, by which another process can tell that it sees the same folder.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.name, self._text = f".probe-{secrets.token_hex(8)}", secrets.token_hex(8)
        self._path = folder / self.name
        with create(self._path) as stream:
            stream.write(self._text.encode())
            stream.flush()
            os.fsync(stream.fileno())

    @property
    def mark(self) -> tuple[str, str]:
        """What the other process needs to know."""
        return self.name, self._text

    def remove(self) -> None:
        with suppress(OSError):
            self._path.unlink()


def sees(folder: Path, mark: tuple[str, str]) -> bool:
    """Whether the file of a :class:`Probe` is in ``folder``, or soon is."""
    name, text = mark
    until = time.monotonic() + SEEN_S
    while True:
        with suppress(OSError), open_plain(folder / name) as stream:
            return stream.read(100) == text.encode()
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
        with suppress(OSError):
            os.listdir(folder)  # makes a file system in a network look again
