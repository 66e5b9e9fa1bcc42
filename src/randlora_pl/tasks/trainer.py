"""The trainer that tasks and data are made for."""

from typing import Any

from lightning.pytorch import Trainer

from randlora_pl.utils.text import filter_library_warnings

SETTINGS: dict[str, Any] = {
    "max_epochs": 1,  # the data module plans the samples of a whole run as one epoch
    "accelerator": "auto",
    "precision": "32-true",
    "use_distributed_sampler": False,  # the data module shards
    "num_sanity_val_steps": 0,  # the test before the training does more
    "log_every_n_steps": 10,
    "enable_checkpointing": False,  # the callback AdapterCheckpoint does it
    "enable_model_summary": False,  # the callback StartSummary does it
}
"""Settings of Lightning's Trainer that every task needs."""


def make_trainer(**options: Any) -> Trainer:
    """Make a trainer for scripts and notebooks: one device, nothing printed and nothing written.

    It is the command line's without its callbacks; Lightning's remarks are hidden from now on.

    Examples:
        >>> trainer = make_trainer(accelerator="cpu", enable_progress_bar=True)

    Args:
        options: Options of Lightning's Trainer, which take precedence. ``enable_progress_bar=True`` shows a bar,
            ``logger=CSVLogger(DIR)`` keeps the curves, ``callbacks=[AdapterCheckpoint()]`` with
            ``default_root_dir=DIR`` the adapter.
    """
    filter_library_warnings()
    silent = {"logger": False, "enable_progress_bar": False, "devices": 1}
    return Trainer(**(SETTINGS | silent | options))
