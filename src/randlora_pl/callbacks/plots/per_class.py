"""Precision, recall and F1 of each class in a test."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassStatScores

from randlora_pl.utils.files.run_files import run_folder, write_text
from randlora_pl.utils.text.csv_text import csv_text

FILE = "test_per_class.csv"


class PerClass(Callback):
    """Writes ``test_per_class.csv``, and logs the means over the classes, of tests that give class logits.

    The counts are summed over all devices.

    Attributes:
        facts: Balanced accuracy, macro F1, and the samples of the smallest and of the largest class in the last test,
            by key of ``results.json``.
    """

    def __init__(self) -> None:
        self.facts: dict[str, float] = {}
        self._scores: MulticlassStatScores | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts from nothing."""
        self._scores, self.facts = None, {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the predictions of the samples that count (weight above zero)."""
        if not isinstance(outputs, dict) or "logits" not in outputs:
            return
        logits, counts = outputs["logits"], outputs["weight"] > 0
        if self._scores is None:
            scores = MulticlassStatScores(logits.shape[1], average=None, validate_args=False)
            self._scores = scores.to(logits.device)
        if counts.any():
            self._scores.update(logits[counts].argmax(1), outputs["label"][counts])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the means over the classes; after a test of the trained model writes the table, too."""
        if self._scores is None:
            return
        task: Any = pl_module
        table = class_table(self._scores.compute().cpu())
        found = {f"{task.test_name}/{name}": value for name, value in means(table).items()}
        for logger in trainer.loggers:
            logger.log_metrics(found, trainer.global_step)
        sizes = {"smallest": table[:, 0].min(), "largest": table[:, 0].max()}
        self.facts = found | {f"{task.test_name}/{end}_class": int(size) for end, size in sizes.items()}
        if task.test_name == "test" and trainer.is_global_zero:
            rows = zip(task.classnames, table.tolist(), strict=True)
            cells = [[name, int(row[0]), *map(_cell, row[1:])] for name, row in rows]
            text = csv_text([["class", "samples", "precision", "recall", "f1"], *cells])
            write_text(run_folder(trainer) / FILE, text)


def class_table(scores: Tensor) -> Tensor:
    """Return samples, precision, recall and F1 of each class, (classes, 4) float64.

    What is not defined is NaN: the recall of a class without samples, the precision of one that was never predicted,
    the F1 of one that is neither.

    Args:
        scores: True positives, false positives, true negatives, false negatives and samples, (classes, 5).
    """
    right, wrong, _, missed, samples = scores.to(torch.float64).unbind(1)
    return torch.stack(
        [samples, right / (right + wrong), right / samples, 2 * right / (2 * right + wrong + missed)], dim=1
    )


def means(table: Tensor) -> dict[str, float]:
    """Return balanced accuracy (the mean recall) and macro F1, over the classes for which they are defined.

    Args:
        table: From `class_table`.
    """
    return {"balanced_accuracy": float(table[:, 2].nanmean()), "macro_f1": float(table[:, 3].nanmean())}


def _cell(value: float) -> str:
    return "" if value != value else f"{value:.6f}"
