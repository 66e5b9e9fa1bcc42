"""Tests besides the task's own: without the adapter, on other data, of each class; and the answers that it wrote."""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import CatMetric
from torchmetrics.classification import MulticlassStatScores, MultilabelAveragePrecision, MultilabelStatScores

from randlora_pl.adapters import disabled
from randlora_pl.data import ImageData
from randlora_pl.data.catalog import find
from randlora_pl.data.unlabelled import batches, framed, random_samples
from randlora_pl.data.validate import NEW
from randlora_pl.tasks.module import AdaptationModule, own_module
from randlora_pl.tasks.objective import Objective
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import write_text
from randlora_pl.utils.options import Declared, NotNegative
from randlora_pl.utils.run_files import run_folder
from randlora_pl.utils.text import MOST_PACKED, csv_text, pack_bits, print_above_progress

if TYPE_CHECKING:
    from randlora_pl.tasks.images import ClipTask


class ZeroShot(Callback):
    """Disable the adapter during a test; methods that train the base weights have nothing to disable."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Disable the adapter before weights are merged."""
        task = own_module(pl_module).objective
        if not task.adapter.trains_base:
            self._stack.enter_context(disabled(task.model))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enable the adapter after weights are restored."""
        self._stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the model."""
        self._stack.close()


def other_data(own: ImageData, name: str, templates: Sequence[str]) -> ImageData:
    """Return another dataset, or the classes that a task's own leaves out (`NEW`), with the preprocessing of its own.

    It is in the folder of the task's own, or, for images of the user's own, in the default data folder. The new
    classes have the task's templates.
    """
    options: dict[str, Any] = {"num_workers": own.num_workers, "root": str(own.root)}
    if name == NEW:
        options |= {"dataset": own.row.name, "split": own.split, "classes": "new"}
        options |= {"templates": list(templates), "classnames": own.classnames_file}
    else:
        options |= {"dataset": name, "split": own.split if find(name).coop is not None else "default"}
        options |= {"root": None} if own.row.own else {}
    return framed(options, own.frame, own.eval_batch_size)


def check_names_others(task: Objective, use: str) -> None:
    """Refuse a use that compares images with any names, if a task has no text tower or prompts of its own classes."""
    if not task.compares_names:
        raise UserError(
            f"{use}: {type(task).__name__} cannot predict other classes. Remove it, or use VisionLanguageTask or "
            "PromptTask."
        )
    prompts = getattr(task, "prompts", None)
    if prompts is not None and prompts.class_specific:
        raise UserError(f"{use}: {prompts!r} cannot predict other classes. Remove it.")


class _ByName(Declared, Callback):
    """Base of tests on classes that a task did not train on, and for which it needs their names alone."""

    images: Annotated[int, NotNegative] = 0
    """Test images of each dataset, a random choice that is the same in all runs; 0 for all."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse tasks without a text tower that encodes class names."""
        check_names_others(own_module(pl_module).objective, type(self).__name__)

    def measure(self, module: AdaptationModule, name: str, key: str) -> None:
        """Log the accuracy on the test images of `other_data`."""
        task = cast("ClipTask", module.objective)
        own = task.run.data
        assert own is not None
        data = other_data(own, name, task.templates)
        data.setup("test")
        samples = random_samples(data.samples("test"), self.images or None, 0)
        images = batches(data, samples, own.eval_batch_size, task.device)
        with task.run.autocast():  # as the test's own batches
            percent, _ = task.percent_among(data.classnames, images, templates=data.templates)
        module.log(f"{module.test_name}/{key}", percent / 100, sync_dist=False, rank_zero_only=False)


class Elsewhere(_ByName):
    """Log zero-shot accuracies on other datasets in each test, as ``test/elsewhere/NAME``.

    Its prompts are the task's caption or typed prompts, or else the dataset's. The test of the pretrained model logs
    ``zeroshot/elsewhere/NAME``; the difference is what the training has changed.
    Needs a ``VisionLanguageTask`` or ``PromptTask``. Name it in ``--trainer.callbacks``. With ``--data.split coop``,
    the other datasets have CoOp's split as well if there is one. For finished runs there is ``randlora-pl analyze
    forgetting``.
    """

    datasets: list[str] = field(kw_only=False)
    """Names of datasets with classes, in the data folder of the run; for images of your own, in the default data
    folder. The training dataset is left out."""
    images: Annotated[int, NotNegative] = 1000
    """Test images of each, a random choice that is the same in all runs; 0 for all."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure on the evaluated weights, before the task restores the frozen ones."""
        own: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        for name in self.datasets:
            if name != own.row.name:
                self.measure(own_module(pl_module), name, f"elsewhere/{name}")


class NewClasses(_ByName):
    """Log the accuracy on the classes that ``--data.classes base`` leaves out, as ``test/new/acc``.

    The new classes are compared with each other, as the base classes in the test itself. The test of the pretrained
    model logs ``zeroshot/new/acc``. Needs a ``VisionLanguageTask`` or ``PromptTask``. Name it in
    ``--trainer.callbacks``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data without new classes."""
        super().setup(trainer, pl_module, stage)
        if trainer.datamodule.classes == "all":  # type: ignore[attr-defined]
            raise UserError("NewClasses: the training has all classes. Set --data.classes base, or remove it.")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure on the evaluated weights, before the task restores the frozen ones."""
        own: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        if own.classes == "base":
            self.measure(own_module(pl_module), NEW, "new/acc")


class PerClass(Callback):
    """Write ``test_per_class.csv`` and log class means for tests with class logits.

    The counts are summed over all devices. Where a sample may have several classes, a class is predicted above a
    probability of 0.5, the table has its average precision, too, and the task itself logs the means.

    Attributes:
        facts: Balanced accuracy, macro F1, and the number of samples of the smallest and largest class in the last
            test, by key of ``results.json``. Of a trained model also ``test/right``: which samples were classified
            correctly, in the order of the test split (`pack_bits`), if there are not more than `MOST_PACKED`.
    """

    def __init__(self) -> None:
        self.facts: dict[str, float | str] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start without counts."""
        self.facts = {}
        self._scores: MulticlassStatScores | MultilabelStatScores | None = None
        self._precision: MultilabelAveragePrecision | None = None  # of several classes of a sample
        self._right = CatMetric()  # 2 * index + 1 of a correct sample, 2 * index of another one

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Count the predictions of samples with a weight above zero."""
        if not isinstance(outputs, dict) or "logits" not in outputs:
            return
        logits, counts = outputs["logits"], outputs["weight"] > 0
        task = own_module(pl_module).objective
        if self._scores is None:
            kind = MultilabelStatScores if task.several else MulticlassStatScores
            self._scores = kind(logits.shape[1], average=None, validate_args=False).to(logits.device)
            self._right.to(logits.device)
            if task.several:
                self._precision = MultilabelAveragePrecision(logits.shape[1], average=None).to(logits.device)
        if counts.any() and self._precision is not None:
            several = task.predictions(logits[counts]), outputs["label"][counts].long()
            self._scores.update(*several)
            self._precision.update(*several)
        elif counts.any():
            guesses, labels = logits[counts].argmax(1), outputs["label"][counts]
            self._scores.update(guesses, labels)
            if "index" in outputs:
                self._right.update(2 * outputs["index"][counts].to(labels.device) + (guesses == labels))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the class means; after a test of the trained model also write the table."""
        if self._scores is None:
            return
        module = own_module(pl_module)
        table, name = class_table(self._scores.compute().cpu()), module.test_name
        header = ["class", "samples", "precision", "recall", "f1"]
        metrics = {  # over the classes that have them; the accuracy is the mean recall
            f"{name}/balanced_accuracy": float(table[:, 2].nanmean()),
            f"{name}/macro_f1": float(table[:, 3].nanmean()),
        }
        if self._precision is not None:
            precision = torch.as_tensor(self._precision.compute()).cpu().where(table[:, 0] > 0, math.nan)
            metrics, header = {}, [*header, "average_precision"]
            table = torch.cat([table, precision[:, None]], 1)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        samples = table[:, 0]
        sizes = {f"{name}/smallest_class": int(samples.min()), f"{name}/largest_class": int(samples.max())}
        self.facts = {**metrics, **sizes}
        right = torch.empty(0) if self._precision is not None else torch.as_tensor(self._right.compute())
        codes = torch.unique(right.long())  # sorted; a sampler may repeat samples
        if name == "test" and 0 < len(codes) <= MOST_PACKED:
            self.facts["test/right"] = pack_bits((codes % 2).bool().tolist())
        if name == "test" and trainer.is_global_zero:
            cells: list[list[Any]] = [header]
            for label, row in zip(module.objective.classnames, table.tolist(), strict=True):
                cells.append([label, int(row[0]), *("" if math.isnan(value) else f"{value:.6f}" for value in row[1:])])
            write_text(run_folder(trainer) / "test_per_class.csv", csv_text(cells))


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


class WrittenAnswers(Callback):
    """Write ``answers.jsonl`` to the run folder after a test whose task keeps generated text (``written``).

    One line per question, in the order of the tests, for any number of processes. Each line has the test, the prompt,
    the generated text, and either the parsed and the correct answer or the references it was scored against.

    Attributes:
        facts: ``test/right``, as of `PerClass`: which questions were answered correctly, if all are of one test.
    """

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file and print its path."""
        written = getattr(getattr(pl_module, "objective", None), "written", [])
        right = [record["right"] for record in written if "right" in record]
        one = len({record["test"] for record in written}) == 1 and 0 < len(right) <= MOST_PACKED
        self.facts = {"test/right": pack_bits(right)} if one and own_module(pl_module).test_name == "test" else {}
        if written and trainer.is_global_zero:
            file = run_folder(trainer) / "answers.jsonl"
            write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in written))
            print_above_progress(f"answers: {file} ({len(written):,})")
