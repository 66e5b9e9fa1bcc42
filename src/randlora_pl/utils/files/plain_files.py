"""Bounded reading of regular files from user folders.

A folder may contain a named pipe, which blocks forever, or a link to a device such as ``/dev/zero``, which never
ends.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 2**32
"""Maximum size of a text or table in bytes, because it is read into memory."""


def open_plain(path: Path | str, most: int | None = None) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: Path of the file, or of a link to one.
        most: Maximum size in bytes; None for no limit.

    Raises:
        OSError: The file cannot be opened, is a pipe, a device or a folder, or is too large.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    number = os.open(path, flags)  # O_NONBLOCK: opening a pipe returns at once
    try:
        state = os.fstat(number)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file, but a folder, a pipe or a device", str(path))
        if most is not None and state.st_size > most:
            text = f"it has {state.st_size:,} bytes, and at most {most:,} are read"
            raise OSError(errno.EFBIG, text, str(path))
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_plain(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: Path of the file, or of a link to one.
        most: Maximum size in bytes.

    Raises:
        OSError: See `open_plain`.
    """
    with open_plain(path, most) as stream:
        return stream.read(most)


def is_file(path: Path) -> bool:
    """Return True if the path is a file, without raising for any path that a user types.

    Args:
        path: Any path; `pathlib` raises if its name is too long or its folder is not readable.
    """
    try:
        return path.is_file()
    except OSError:
        return False
