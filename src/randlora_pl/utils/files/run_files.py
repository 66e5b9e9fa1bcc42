"""Run folder (Lightning's ``default_root_dir``) and atomic writing of its files."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_folder(trainer: "Trainer") -> Path:
    """Return the folder with all files of this run."""
    return Path(trainer.default_root_dir)


def write_bytes(file: Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name beside it, then rename it.

    The content is synced to disk before the rename, so that a power failure never leaves an incomplete file.

    Args:
        file: Path of the file; its folder is created, an older file is replaced atomically.
        content: Bytes of the file.

    Raises:
        OSError: The file cannot be written, for example because the disk is full; the older file stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except BaseException as error:
        with suppress(OSError):  # read-only file system
            part.unlink(missing_ok=True)  # frees space on a full disk
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            error.filename = str(file)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8 with `write_bytes`.

    Args:
        file: Path of the file.
        text: Content of the file.
    """
    write_bytes(file, text.encode("utf-8"))


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of a run that was killed while writing.

    An adapter folder that was being replaced gets its name back if the new one is missing.

    Args:
        folder: Run folder; no other process may write to it.
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


CONFIG = "config.yaml"


LAST = "checkpoints/last.ckpt"


ADAPTER, BEST = "adapter", "adapter-best"


RESULTS = "results.json"
