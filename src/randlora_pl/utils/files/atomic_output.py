"""Atomic output: write into a temporary folder, then move the finished files."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from randlora_pl.utils.errors import UserError


@contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder beside a path, and delete it with its remaining files at the end of the block.

    Missing parent folders are created, and removed again if they are still empty.

    Args:
        path: Final path of the file or folder.

    Raises:
        UserError: The folder cannot be created or written, for example because the disk is full.
    """
    path = path.absolute()
    created = [parent for parent in path.parents if not parent.exists()]
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}). Set another --output.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for parent in created:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()


def move(source: Path, path: Path) -> None:
    """Move a finished file or folder to its final path and replace an older one.

    Args:
        source: File or folder inside the `part_folder` of the path.
        path: Final path.
    """
    if not path.is_dir() or path.is_symlink():
        source.replace(path)
        return
    old = source.with_name(f"{source.name}.old")  # deleted with the temporary folder
    path.rename(old)
    try:
        source.rename(path)
    except OSError:
        old.rename(path)
        raise


def refuse_inputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raise an error if an output would overwrite an input adapter.

    Raises:
        UserError: An output is an input, or a parent folder of one.
    """
    for file in outputs:
        for source in inputs:
            if source.resolve() in (file.resolve(), *file.resolve().parents):
                raise UserError(f"--output {file} would replace the adapter {source}. Set another --output.")
