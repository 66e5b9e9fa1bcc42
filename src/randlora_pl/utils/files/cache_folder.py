"""Folder of cached files, and atomic writing."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import platformdirs


def cache_folder() -> Path:
    """Return the folder of cached files: ``$RANDLORA_PL_CACHE``, or the system's user cache folder."""
    override = os.environ.get("RANDLORA_PL_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("randlora-pl"))


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name and rename it, so that other processes never read an incomplete file.

    Args:
        path: Path of the file; its folder is created.
        write: Function that writes the content to the stream.

    Raises:
        OSError: The file cannot be written.
    """
    with atomic_file(path) as stream:
        write(stream)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing under a temporary name, and rename it if the block ends without an error.

    A folder that is not writable raises before the block begins.

    Args:
        path: Path of the file; its folder is created. An older file stays until it is replaced.

    Raises:
        OSError: The file cannot be written; the error names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = ""
    try:
        prefix = f".{path.name[:100]}.part-"  # leftovers of killed runs are found by this prefix
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix)
        with os.fdopen(handle, "wb") as stream:
            yield stream
        Path(temporary).chmod(0o666 & ~umask())  # mkstemp gives access to the owner only
        Path(temporary).replace(path)
    except OSError as error:
        if not temporary or error.filename in (None, temporary):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        if temporary:
            with suppress(OSError):  # already renamed, or not removable
                Path(temporary).unlink(missing_ok=True)


def umask() -> int:
    """Return the process's file mode creation mask."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
