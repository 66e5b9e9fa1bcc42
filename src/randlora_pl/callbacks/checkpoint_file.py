"""The checkpoint file: written whole beside its final name, and checked for damage before it is read."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.run_files import write_bytes


class CheckpointFile(TorchCheckpointIO):
    """Writes a checkpoint beside its final name.

    Lightning's own takes the system's folder for temporary files, which may be small or on another disk, and where
    what a killed run leaves is never found again.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **more: Any) -> None:
        """Writes the file; an older one is replaced at once.

        Args:
            checkpoint: What to write.
            path: A local path.
            args: Nothing that a local file needs.
            more: As ``args``.

        Raises:
            OSError: It cannot be written; the older file stays.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: str | Path, *args: Any, **more: Any) -> dict[str, Any]:
        """Reads the file.

        Args:
            path: A local path.
            args: As Lightning gives them.
            more: As ``args``.

        Raises:
            UserError: It is damaged, or was written by something else.
        """
        check_checkpoint(Path(path))
        try:
            return super().load_checkpoint(path, *args, **more)
        except Exception as error:  # a damaged header: many kinds, of PyTorch's reader and of pickle
            raise UserError(damaged(Path(path), str(error).splitlines()[0] if str(error) else "")) from error


def check_checkpoint(file: Path) -> None:
    """Compares every part of a checkpoint with its checksum, which PyTorch writes and does not look at.

    Reading a checkpoint of 1 GB takes half a second longer.

    Args:
        file: The checkpoint.

    Raises:
        UserError: It is cut off or damaged, or no checkpoint at all.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged header can look like encryption, another compression, a huge size ...
        raise UserError(damaged(file, str(error))) from error
    if bad is not None:
        raise UserError(damaged(file, f"bad checksum of {bad}"))


def damaged(file: Path, why: str) -> str:
    """What to do about a checkpoint that cannot be read."""
    return (
        f"The checkpoint {file} is cut off or damaged{f' ({why})' if why else ''}. Put a copy of it there, or delete "
        "it: without it fit --resume starts the training of its run anew."
    )
