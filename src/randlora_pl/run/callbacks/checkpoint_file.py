"""Checkpoint files: written atomically, and verified before they are read."""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors.torch import load, save

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import write_bytes


class CheckpointFile(TorchCheckpointIO):
    """Checkpoint IO that writes beside the final name.

    Lightning writes to the system's temporary folder, which may be small or on another disk, and files left there by
    a killed run are never cleaned up. Tensors that a method has derived from the weights never change, so they are
    written once, to a file beside the checkpoints whose name has their checksum.
    """

    _derived: tuple[object, str] = (None, "")  # identity and file name of the derived tensors written last

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **more: Any) -> None:
        """Write the file atomically over an older one, which is kept if this fails."""
        buffer = io.BytesIO()
        torch.save({**checkpoint, "derived": self._write_derived(checkpoint.get("derived"), Path(path).parent)}, buffer)
        write_bytes(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: str | Path, *args: Any, **more: Any) -> dict[str, Any]:
        """Read the file.

        Raises:
            UserError: The file is damaged or not a checkpoint.
        """
        check_checkpoint(Path(path))
        try:
            checkpoint = super().load_checkpoint(path, *args, **more)
        except Exception as error:  # damaged headers raise many types, from PyTorch and pickle
            raise UserError(damaged(Path(path), str(error).splitlines()[0] if str(error) else "")) from error
        if isinstance(checkpoint.get("derived"), str):
            checkpoint["derived"] = _read_derived(Path(path), checkpoint["derived"])
        return checkpoint

    def _write_derived(self, tensors: dict[str, torch.Tensor] | None, folder: Path) -> str | None:
        """Write derived tensors unless they are there, and return the name of their file, or None if there are none."""
        if not tensors:
            return None
        key = folder, *((name, tensor.data_ptr(), tensor._version) for name, tensor in tensors.items())
        if key != self._derived[0]:
            content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
            name = f"derived-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
            write_bytes(folder / name, content)
            self._derived = key, name
        return self._derived[1]


def _read_derived(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the derived tensors that belong to a checkpoint.

    Raises:
        UserError: Their file is missing or damaged.
    """
    file = checkpoint.parent / Path(name).name
    content = file.read_bytes() if file.is_file() else b""
    if file.name != f"derived-{hashlib.sha256(content).hexdigest()[:16]}.safetensors":
        raise UserError(
            f"{checkpoint} needs {file.name} beside it, which is missing or damaged. Copy both files again."
        )
    return load(content)


def check_checkpoint(file: Path) -> None:
    """Verify the checksum of every part of a checkpoint; PyTorch writes them but does not check them (0.5 s per GB).

    Raises:
        UserError: The file is truncated, damaged or not a checkpoint.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged header can look like encryption, another compression, a huge size ...
        raise UserError(damaged(file, str(error))) from error
    if bad is not None:
        raise UserError(damaged(file, f"bad checksum of {bad}"))


def damaged(file: Path, why: str) -> str:
    """Return an error message for an unreadable checkpoint."""
    return (
        f"The checkpoint {file} is cut off or damaged{f' ({why})' if why else ''}. Restore a copy of it, or delete "
        "it; fit --resume then restarts the training from step 0."
    )
