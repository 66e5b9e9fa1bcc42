"""Run folder (Lightning's ``default_root_dir``) and names of its files."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_folder(trainer: "Trainer") -> Path:
    """Return the folder with all files of this run."""
    return Path(trainer.default_root_dir)


CONFIG = "config.yaml"
LAST = "checkpoints/last.ckpt"
ADAPTER, BEST = "adapter", "adapter-best"
RESULTS = "results.json"
