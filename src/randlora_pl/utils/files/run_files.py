"""The folder of a run: Lightning's ``default_root_dir``. Files in it appear whole or not at all."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_folder(trainer: "Trainer") -> Path:
    """Where everything about this run is kept."""
    return Path(trainer.default_root_dir)


def write_bytes(file: Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name beside it, then rename it.

    It is on the disk before it is renamed, so that not even a power cut leaves half of it under its final name.

    Args:
        file: The file; an older one is replaced at once. Its folder is made.
        content: Its bytes.

    Raises:
        OSError: It cannot be written, for example because the disk is full; the older file stays.
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
        with suppress(OSError):  # a file system that cannot be written
            part.unlink(missing_ok=True)  # a full disk needs the room
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            error.filename = str(file)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text file as `write_bytes` does.

    Args:
        file: The file.
        text: Its content.
    """
    write_bytes(file, text.encode("utf-8"))


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders of a run that was killed while it wrote.

    An adapter folder that was about to be replaced gets its name back where the new one has not come.

    Args:
        folder: The run folder; no other process may be writing in it.
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
