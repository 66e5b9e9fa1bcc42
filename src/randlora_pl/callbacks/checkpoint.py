"""Checkpoints of what trains: the last one for resuming, the best one by validation, and the adapter folders."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl import __version__
from randlora_pl.callbacks.checkpoint_file import CheckpointFile
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files.run_files import run_folder
from randlora_pl.utils.run_results import planned

LAST, ADAPTER, BEST = "checkpoints/last.ckpt", "adapter", "adapter-best"
_TRAINED_ON = (
    *("dataset", "train", "shots", "fraction", "train_split", "steps", "draws", "window", "seed"),
    *("pairs", "max_length"),  # of labelled texts
)
"""Facts of the data that an adapter keeps: the same whether a run was resumed or not."""


def is_finite(module: LightningModule) -> bool:
    """Whether every trainable tensor is free of infinities and NaNs."""
    return all(bool(torch.isfinite(p).all()) for p in module.parameters() if p.requires_grad)


class AdapterCheckpoint(Callback):
    """Writes ``checkpoints/last.ckpt``, ``adapter`` and, where validation runs, ``adapter-best``.

    A checkpoint holds what trains, the optimizer and the place in the run; the frozen model is not in it.

    Args:
        every_n_steps: Optimizer steps between two checkpoints. A resumed run repeats at most so many.
        monitor: Figure of the validation that decides which adapter is the best.
        mode: ``max`` or ``min``: what the best figure is.
        patience: End the training after this many validations without a better figure; ``null`` for no early end.
        test: Which adapter `fit` tests at its end, the ``last`` or the ``best`` (default last, with patience best).
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        monitor: str = "val/acc",
        mode: str = "max",
        patience: int | None = None,
        test: str | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise UserError(f"checkpoint.every_n_steps is {every_n_steps}: give a positive number of steps.")
        if mode not in ("max", "min"):
            raise UserError(f"checkpoint.mode is {mode!r}: choose max or min.")
        if patience is not None and patience < 1:
            raise UserError(f"checkpoint.patience is {patience}: give a positive number of validations, or null.")
        if test not in ("last", "best", None):
            raise UserError(f"checkpoint.test is {test!r}: choose last or best.")
        self.every_n_steps, self.monitor, self.mode, self.patience = every_n_steps, monitor, mode, patience
        self.test = test or ("last" if patience is None else "best")
        self.best: float | None = None
        self.best_step = 0
        self.validated: dict[str, float] = {}
        self._seen_step = -1
        self._whole_window = False  # whether the last batch ended in an optimizer step
        self._validates = False  # whether the validation of this step has begun and not ended

    def state_dict(self) -> dict[str, Any]:
        """The best figure so far, and those of the last validation."""
        return {"best": self.best, "best_step": self.best_step, "validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the figures of the resumed run."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.validated = dict(state_dict["validated"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has Lightning write and read checkpoints as `CheckpointFile` does, unless the user has chosen a plugin."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFile()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the best figure of a checkpoint whose adapter is not here: that of another run (``--ckpt_path``)."""
        if not (run_folder(trainer) / BEST).is_dir():
            self.best, self.best_step = None, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A checkpoint of the starting point would say nothing new."""
        self._seen_step = trainer.global_step
        self._whole_window = trainer.global_step > 0  # a resumed run may begin with a validation

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves right after an optimizer step, never between two micro-batches of one; at SIGTERM at once."""
        step = trainer.global_step
        self._whole_window, self._seen_step = step != self._seen_step, step
        if not self._whole_window or validation_is_due(trainer, batch_idx):  # which saves, too
            return
        if step % self.every_n_steps == 0 or trainer.received_sigterm:
            self._save_last(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation may take long: what was trained is kept before it."""
        if self._whole_window and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._validates = True
            self._save_last(trainer, pl_module)
            self._validates = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Says in Lightning's terms that a validation has begun; a resumed run would take it for done otherwise."""
        if self._validates:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            done = progress["total"]["completed"]
            progress["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
            progress["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the adapter if its figure is the best so far, and a checkpoint that knows of this validation."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.validated = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if self.monitor not in self.validated:
            hint = near(self.monitor, self.validated)
            raise UserError(
                f"checkpoint.monitor is {self.monitor!r}, which no validation gives.{hint} "
                f"Figures: {', '.join(self.validated)}"
            )
        figure = self.validated[self.monitor]
        sign = 1 if self.mode == "max" else -1
        if math.isfinite(figure) and (self.best is None or sign * figure > sign * self.best):
            self.best, self.best_step = figure, trainer.global_step
            self._save_adapter(trainer, pl_module, BEST, {self.monitor: figure, "step": self.best_step})
        if self._whole_window:
            self._save_last(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the end of the run; where it stopped early, the older checkpoint stays.

        By now Lightning takes its one epoch for completed, so a resumed run would not go on from here.
        """
        task: Any = pl_module
        if trainer.global_step >= task.total_steps():
            self._save_last(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last weights as an adapter folder, also where a resumed run had nothing left to train."""
        self._save_adapter(trainer, pl_module, ADAPTER, {"step": trainer.global_step})

    def _save_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_finite(pl_module):  # the older checkpoint is worth more
            return
        trainer.save_checkpoint(run_folder(trainer) / LAST)

    @staticmethod
    def _save_adapter(trainer: Trainer, pl_module: LightningModule, name: str, summary: dict[str, Any]) -> None:
        if trainer.is_global_zero and is_finite(pl_module):
            save_adapter_of(trainer, pl_module, run_folder(trainer) / name, summary)


def validation_is_due(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation follows the training batch ``batch_idx``."""
    every = trainer.val_check_batch
    if not sum(trainer.num_val_batches) or every is None:  # None: seconds count
        return False
    if math.isinf(every):
        return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return (batch_idx + 1) % every == 0


def save_adapter_of(trainer: Trainer, pl_module: LightningModule, folder: Path, summary: dict[str, Any]) -> None:
    """Writes the adapter folder of a task, with what it was trained on and how images were prepared for it.

    Args:
        trainer: With the data module of the training.
        pl_module: A task of `randlora_pl.tasks`.
        folder: Where to write.
        summary: Figures of the training, kept in the folder's metadata.
    """
    save: Any = pl_module.save
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    facts = planned(data) if hasattr(data, "summary") else {}
    about = {name: facts[name] for name in _TRAINED_ON if facts.get(name) is not None} | {"randlora_pl": __version__}
    frame = getattr(data, "frame", None)
    save(folder, summary | about | ({"frame": asdict(frame)} if frame is not None else {}))
