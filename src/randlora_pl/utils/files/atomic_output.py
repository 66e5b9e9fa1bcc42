"""Atomic output of files and folders.

Content is written under a hidden name beside the final one, synced to disk, and then renamed. A full disk or a power
failure never leaves an incomplete file, and the older one stays until it is replaced.
"""

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from randlora_pl.utils.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, and rename it to its final name if the block ends without an error.

    Its folder is created. Several processes may write the same file. A folder that is not writable raises before the
    block begins.

    Raises:
        OSError: The file cannot be written, for example because the disk is full; the error names the final path.
    """
    part = path.with_name(f".{path.name[:100]}.part")
    with _errors_name(path, part):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = part.open("xb")
        except FileExistsError:  # another process writes it, or was killed
            part = part.with_name(f"{part.name}-{secrets.token_hex(8)}")
            stream = part.open("xb")
        try:
            with stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        except BaseException:
            with suppress(OSError):  # read-only file system
                part.unlink(missing_ok=True)  # frees space on a full disk
            raise


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file with `atomic_file`; the older file stays if an error occurs."""
    with atomic_file(path) as stream:
        stream.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file with `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder beside a path, and delete it with its remaining files at the end of the block.

    Missing parent folders are created, and removed again if they are still empty.

    Raises:
        OSError: A file cannot be written; the error names the final path.
    """
    part = path.absolute().with_name(f".{path.name}.part-{os.getpid()}")
    created = [parent for parent in part.parents if not parent.exists()]
    shutil.rmtree(part, ignore_errors=True)
    try:
        with _errors_name(path, part):
            part.mkdir(parents=True)
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # not empty
            for parent in created:
                parent.rmdir()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder, and rename it to its final name if the block ends without an error.

    Raises:
        OSError: A file cannot be written; the error names the final path, and the older folder stays.
    """
    with scratch_folder(path) as part:
        yield part
        move(part, path)


def move(source: Path, path: Path) -> None:
    """Sync a finished file or folder to disk and give it its final name; an older one is replaced.

    A folder is replaced by two renames. A process that is killed between them leaves both folders under hidden names
    (see `remove_leftovers`).
    """
    for file in [source, *source.rglob("*")]:
        if file.is_file():
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())
    if not path.is_dir() or path.is_symlink():
        source.replace(path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    try:
        source.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of a process that was killed while writing.

    A folder that was being replaced gets its name back if the new one is missing.
    """
    for old in folder.glob(".*.old-*"):
        final = folder / old.name[1:].partition(".old-")[0]
        if not final.exists():
            old.rename(final)
    for pattern in (".*.part*", "*/.*.part*", ".*.old-*"):
        for left in folder.glob(pattern):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path, hint: str = "Set another --output.") -> Iterator[None]:
    """Raise a `UserError` if a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}).", hint, str(path)) from error


def refuse_inputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raise an error if an output would overwrite an input adapter.

    Raises:
        UserError: An output is an input, or a parent folder of one.
    """
    for file in outputs:
        for source in inputs:
            if source.resolve() in (file.resolve(), *file.resolve().parents):
                raise UserError(f"--output {file} would replace the adapter {source}. Set another --output.")


def umask() -> int:
    """Return the process's file mode creation mask."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def _errors_name(path: Path, part: Path) -> Iterator[None]:
    """Replace the temporary path in errors of the system with the final one."""
    try:
        yield
    except OSError as error:
        if str(error.filename or part).startswith(str(part)):
            error.filename, error.filename2 = str(path), None
        raise
