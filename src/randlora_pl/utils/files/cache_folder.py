"""Where computed files are kept, and how they are written."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import platformdirs


def cache_folder() -> Path:
    """Where computed files are kept: ``$RANDLORA_PL_CACHE`` or the system's folder for user caches."""
    override = os.environ.get("RANDLORA_PL_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("randlora-pl"))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name and renames it: other processes never see half of it.

    Args:
        path: The file; its folder is made.
        write: Writes the content.

    Raises:
        OSError: It cannot be written.
    """
    with whole_file(path) as stream:
        write(stream)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing under a temporary name, and renames it when the block has ended well.

    That it can be written at all shows before the block begins.

    Args:
        path: The file; its folder is made. An older file stays until it is replaced.

    Raises:
        OSError: It cannot be written; the error names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = ""
    try:
        prefix = f".{path.name[:100]}.part-"  # by which what a killed run leaves is found again
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix)
        with os.fdopen(handle, "wb") as stream:
            yield stream
        Path(temporary).chmod(0o666 & ~umask())  # temporary files can be read by their owner only
        Path(temporary).replace(path)
    except OSError as error:
        if not temporary or error.filename in (None, temporary):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        if temporary:
            with suppress(OSError):  # it has its name, or cannot be removed either
                Path(temporary).unlink(missing_ok=True)


def umask() -> int:
    """The permissions that new files do not get."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
