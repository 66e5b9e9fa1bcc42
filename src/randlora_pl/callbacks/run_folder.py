"""The folder of a run: Lightning's ``default_root_dir``. Files in it appear whole or not at all."""

import os
from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """Where everything about this run is kept."""
    return Path(trainer.default_root_dir)


def write_text(file: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it.

    Args:
        file: The file; an older one is replaced at once. Its folder is made.
        text: Its content.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
