"""Tables of a test in the run folder: metrics by class, and generated texts."""

import json
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import CatMetric
from torchmetrics.classification import MulticlassStatScores

from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.files.run_files import run_folder
from randlora_pl.utils.text.console import print_above_progress
from randlora_pl.utils.text.packed_bits import MOST, packed
from randlora_pl.utils.text.tables import csv_text

FILE = "test_per_class.csv"


class PerClass(Callback):
    """Write ``test_per_class.csv`` and log class means for tests with class logits.

    The counts are summed over all devices.

    Attributes:
        facts: Balanced accuracy, macro F1, and the number of samples of the smallest and largest class in the last
            test, by key of ``results.json``. Of a trained model also ``test/right``: which samples were classified
            correctly, in the order of the test split (`packed`), if there are not more than `MOST`.
    """

    def __init__(self) -> None:
        self.facts: dict[str, float | str] = {}
        self._scores: MulticlassStatScores | None = None
        self._right = CatMetric()  # 2 * index + 1 of a correct sample, 2 * index of another one

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counts."""
        self._scores, self.facts = None, {}
        self._right.reset()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Count the predictions of samples with a weight above zero."""
        if not isinstance(outputs, dict) or "logits" not in outputs:
            return
        logits, counts = outputs["logits"], outputs["weight"] > 0
        if self._scores is None:
            scores = MulticlassStatScores(logits.shape[1], average=None, validate_args=False)
            self._scores = scores.to(logits.device)
            self._right.to(logits.device)
        if counts.any():
            guesses, labels = logits[counts].argmax(1), outputs["label"][counts]
            self._scores.update(guesses, labels)
            if "index" in outputs:
                self._right.update(2 * outputs["index"][counts].to(labels.device) + (guesses == labels))

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the class means; after a test of the trained model also write the table."""
        if self._scores is None:
            return
        table = class_table(self._scores.compute().cpu())
        found = {f"{pl_module.test_name}/{name}": value for name, value in means(table).items()}
        for logger in trainer.loggers:
            logger.log_metrics(found, trainer.global_step)
        sizes = {"smallest": table[:, 0].min(), "largest": table[:, 0].max()}
        self.facts = {**found, **{f"{pl_module.test_name}/{end}_class": int(size) for end, size in sizes.items()}}
        codes = torch.unique(torch.as_tensor(self._right.compute()).long())  # sorted; a sampler may repeat samples
        if pl_module.test_name == "test" and 0 < len(codes) <= MOST:
            self.facts["test/right"] = packed((codes % 2).bool().tolist())
        if pl_module.test_name == "test" and trainer.is_global_zero:
            rows = zip(pl_module.classnames, table.tolist(), strict=True)
            cells = [[name, int(row[0]), *map(_cell, row[1:])] for name, row in rows]
            text = csv_text([["class", "samples", "precision", "recall", "f1"], *cells])
            write_text(run_folder(trainer) / FILE, text)


def class_table(scores: Tensor) -> Tensor:
    """Return samples, precision, recall and F1 per class, (classes, 4) float64.

    Undefined values are NaN: the recall of a class without samples, the precision of a class that was never
    predicted, the F1 of a class with neither.

    Args:
        scores: True positives, false positives, true negatives, false negatives and samples, (classes, 5).
    """
    right, wrong, _, missed, samples = scores.to(torch.float64).unbind(1)
    return torch.stack(
        [samples, right / (right + wrong), right / samples, 2 * right / (2 * right + wrong + missed)], dim=1
    )


def means(table: Tensor) -> dict[str, float]:
    """Return balanced accuracy (mean recall) and macro F1 over the classes of a `class_table` that have them."""
    return {"balanced_accuracy": float(table[:, 2].nanmean()), "macro_f1": float(table[:, 3].nanmean())}


def _cell(value: float) -> str:
    return "" if value != value else f"{value:.6f}"


ANSWERS = "answers.jsonl"


class WrittenAnswers(Callback):
    """Write ``answers.jsonl`` to the run folder after a test whose task keeps generated text (``written``).

    One line per question, in the order of the tests, for any number of processes. Each line has the test, the prompt,
    the generated text, and either the parsed and the correct answer or the references it was scored against.
    """

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the file and print its path."""
        written = getattr(pl_module, "written", [])
        if written and trainer.is_global_zero:
            file = run_folder(trainer) / ANSWERS
            write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in written))
            print_above_progress(f"answers: {file} ({len(written):,})")
