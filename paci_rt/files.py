"""Files that appear whole or not at all, that nobody else can put in the way, and that are what their name says.

New files are created exclusively (``O_EXCL``) under a name that cannot be guessed, with the permissions that the user's
umask leaves, or for the user alone. No symbolic link is followed at the end of a path, neither to write nor to read;
the folders on the way to a file may be links.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no room: the disk is full, the quota used up, the file too large."""


def unguessable(name: str) -> str:
    """``name`` with random letters in front of its extension.

    Example:
        >>> from paci_rt.files import unguessable
        >>> len(unguessable("events.json"))
        28
    """
    stem, dot, extension = name.rpartition(".")
    return f"{stem or name}-{secrets.token_hex(8)}{dot + extension if stem else ''}"


def create(path: Path, *, private: bool = False) -> BinaryIO:
    """A new file to write to.

    Args:
        path: where nothing is yet, not even a link.
        private: for the user alone (0600), whatever the umask allows.

    Raises:
        OSError: there is something at ``path``, or the system refuses.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600 if private else 0o666), "wb")


def open_plain(path: Path) -> BinaryIO:
    """A plain file to read from.

    Raises:
        OSError: it is missing, a symbolic link, or no plain file; the reason is in ``strerror``.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would make us wait
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "it is a symbolic link: put the file itself there", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return os.fdopen(file, "rb")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name, in place of another one, only once it is complete and on disk.

    Raises:
        OSError: the system refuses; what was at ``path`` is still there, and nothing else.
    """
    part = path.with_name(f".{unguessable(path.name)}.part")
    stream = create(part)
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put names that were made, changed or removed in ``folder`` on disk, where the file system can."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems cannot
            raise
    finally:
        os.close(handle)


def reason(error: BaseException) -> str:
    """Why the system refused, in one line, and what to do where there is no room left."""
    if isinstance(error, OSError) and error.errno in FULL:
        said = os.strerror(error.errno)
        return f"{said}: make room, or choose another folder"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
