"""Reading files that a user's folders hold: plain files only, and not without bound.

A folder may hold a named pipe, which is waited for without end, or a link to a device such as ``/dev/zero``, which
never ends.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 2**32
"""Largest text or table that is read: it is held in memory."""


def open_plain(path: Path | str, most: int | None = None) -> BinaryIO:
    """Open a plain file for reading.

    Args:
        path: The file, or a link to one.
        most: Bytes that it may have; None: any number.

    Raises:
        OSError: It cannot be opened, is a pipe, a device or a folder, or is too large.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    number = os.open(path, flags)  # a pipe is opened at once, and nothing is read from it
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
    """Return the bytes of a plain file.

    Args:
        path: The file, or a link to one.
        most: Bytes that it may have.

    Raises:
        OSError: As for `open_plain`.
    """
    with open_plain(path, most) as stream:
        return stream.read(most)
