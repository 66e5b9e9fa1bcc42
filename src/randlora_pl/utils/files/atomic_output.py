"""A place to write into until everything is there and checked."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from randlora_pl.utils.errors import UserError


@contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside a path; what is not moved out of it is gone afterwards.

    Folders above the path are made, and removed again where nothing has come to stay in them.

    Args:
        path: The final name, of a file or a folder.

    Raises:
        UserError: The folder cannot be made, or inside the disk is full or may not be written.
    """
    path = path.absolute()
    made = [place for place in path.parents if not place.exists()]
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); name another --output.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for place in made:
            if place.exists() and not any(place.iterdir()):
                place.rmdir()


def move(source: Path, path: Path) -> None:
    """Gives a finished file or folder its final name; an older one of that name is replaced.

    Args:
        source: In the `part_folder` of the path.
        path: The final name.
    """
    if not path.is_dir() or path.is_symlink():
        source.replace(path)
        return
    old = source.with_name(f"{source.name}.old")  # goes with the temporary folder
    path.rename(old)
    try:
        source.rename(path)
    except OSError:
        old.rename(path)
        raise


def refuse_inputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Refuses to replace an adapter by what is made of it.

    Raises:
        UserError: An output is an input, or within one.
    """
    for file in outputs:
        for source in inputs:
            if source.resolve() in (file.resolve(), *file.resolve().parents):
                raise UserError(f"--output {file} would replace the adapter {source}; give another --output.")
