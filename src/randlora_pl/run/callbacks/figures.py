"""Plots and tables of a test: confusion matrix, predictions, most confident mistakes, classes, generated texts."""

import io
import json
import logging
import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from PIL import Image
from rich.text import Text
from torch import Tensor
from torchmetrics import CatMetric
from torchmetrics.classification import MulticlassStatScores

from randlora_pl.tasks.module import own_module
from randlora_pl.utils import rng
from randlora_pl.utils.files import write_bytes, write_text
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.run_files import run_folder
from randlora_pl.utils.text import MOST_PACKED, csv_text, for_figure, pack_bits, print_above_progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Prediction:
    """Prediction of a test image.

    Attributes:
        probability: Probability of the predicted class.
        index: Index of the image in the test set.
        label: True class.
        guess: Predicted class.
        image: Model input, (3, H, W) float32 on the CPU.
    """

    probability: float
    index: int
    label: int
    guess: int
    image: Tensor


def wrong_first(mistakes: list[Prediction], samples: list[Prediction]) -> list[Prediction]:
    """Return as many predictions as there are samples: wrong ones first, the most confident in front.

    Up to half of the samples make room for mistakes, so that these are seen at any accuracy.
    """
    first = mistakes[: (len(samples) + 1) // 2]
    seen = {one.index for one in first}
    both = [*first, *(one for one in samples if one.index not in seen)][: len(samples)]
    wrong = sorted((one for one in both if one.guess != one.label), key=lambda one: (-one.probability, one.index))
    return wrong + sorted((one for one in both if one.guess == one.label), key=lambda one: one.index)


class Surest:
    """Most confident mistakes, independent of the order and sizes of batches.

    Attributes:
        mistakes: Most confident mistakes so far, in order.
        wrong: Number of mistakes so far.
        seen: Number of predictions so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.mistakes: list[Prediction] = []
        self.wrong = self.seen = 0

    def add(self, images: Tensor, index: Tensor, labels: Tensor, logits: Tensor, counts: Tensor) -> None:
        """Add the predictions of a batch.

        Args:
            images: Model inputs, (b, 3, H, W).
            index: Indices in the test set, (b,).
            labels: True classes, (b,).
            logits: Logits, (b, classes).
            counts: (b,) bool, False for padding of the batch.
        """
        probabilities, guesses = logits.float().softmax(1).nan_to_num(0.0).max(1)
        wrong = (counts & (guesses != labels)).nonzero()[:, 0]
        self.seen, self.wrong = self.seen + int(counts.sum()), self.wrong + len(wrong)
        order = probabilities[wrong].argsort(descending=True, stable=True)
        for position in wrong[order][: self.most].tolist():
            image = images[position].detach().to("cpu", torch.float32, copy=True)  # a view would keep the whole batch
            numbers = int(index[position]), int(labels[position]), int(guesses[position])
            self._keep([Prediction(float(probabilities[position]), *numbers, image)])

    def heading(self) -> str:
        """Return a heading with the numbers of mistakes found and kept."""
        among = f"among {self.seen:,} test images"
        if self.wrong <= 1:
            return f"{'the only mistake' if self.wrong else 'no mistake'} {among}"
        if self.wrong <= self.most:
            return f"all {self.wrong} mistakes {among}, most confident first"
        return f"the {self.most} most confident of {self.wrong:,} mistakes {among}"

    def gathered(self) -> "Surest":
        """Return the mistakes of all processes; every process must call it."""
        parts: list[Any] = [self]
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self)
        whole = Surest(self.most)
        for part in parts:
            whole.seen, whole.wrong = whole.seen + part.seen, whole.wrong + part.wrong
            whole._keep(part.mistakes)
        return whole

    def _keep(self, more: list[Prediction]) -> None:
        both = sorted([*self.mistakes, *more], key=lambda mistake: (-mistake.probability, mistake.index))
        self.mistakes = both[: self.most]


log = logging.getLogger("randlora_pl")

MOST_CLASSES = 200
"""Maximum number of classes for a plotted confusion matrix; larger ones are unreadable."""
LABELLED = 40
"""Maximum number of classes with names at the axes."""
NUMBERED = 20
"""Maximum number of classes with counts in the cells."""
MOST_COUNTED = 1_000
"""Maximum number of classes for which a confusion matrix is counted; it has this number squared of cells."""
FOLDER = "figures"


def confusion_figure(counts: Tensor, classnames: list[str]) -> "Figure":
    """Plot a confusion matrix: rows are true classes, columns predictions, each row normalized to one.

    Args:
        counts: (classes, classes) int64.
        classnames: Class names.
    """
    from matplotlib.figure import Figure

    size = max(4.0, min(14.0, 0.35 * len(classnames) + 2))
    figure = Figure(figsize=(size, size))
    axes = figure.add_axes((0.25, 0.25, 0.7, 0.7))
    fractions = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(fractions.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set_title("color: fraction of the true class, white 0 %, dark 100 %", fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classnames) <= LABELLED:
        names = [for_figure(short(name)) for name in classnames]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(classnames) <= NUMBERED:
        for row, column in counts.nonzero().tolist():
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=color, fontsize=8)
    return figure


def short(name: str) -> str:
    """Return a class name for a plot: on one line, truncated."""
    line = Text(" ".join(name.split()))
    line.truncate(24, overflow="ellipsis")  # of letters; Chinese ones are twice as wide
    return line.plain


def samples_figure(
    images: Sequence[Tensor], truth: list[str], predicted: list[str], probability: Sequence[float], heading: str = ""
) -> "Figure":
    """Plot a grid of images with the prediction above each; wrong ones in red with the true class.

    Args:
        images: Images, (3, H, W) each, in [0, 1].
        truth: True class names.
        predicted: Predicted class names.
        probability: Probability of each prediction.
        heading: Line above the grid.
    """
    from matplotlib.figure import Figure

    columns = max(2 if heading else 1, min(4, len(images)))
    rows = -(-len(images) // columns)
    top = 0.25 if heading else 0.0
    figure = Figure(figsize=(2.4 * 1.1 * columns, 2.4 * (1.35 * rows + top)))  # same aspect ratio as the axes
    axes = figure.add_axes((0, 0, 1, 1))  # one for all images: sixteen axes take a second to draw
    axes.axis("off")
    axes.set_xlim(0, 1.1 * columns)
    axes.set_ylim(1.35 * rows, -top)
    if heading:
        axes.text(0.05, -top / 2, heading, va="center", fontsize=10)
    for position, (image, true, guess, prob) in enumerate(zip(images, truth, predicted, probability, strict=True)):
        left, top = 1.1 * (position % columns) + 0.05, 1.35 * (position // columns) + 0.3
        height, width = image.shape[1:]
        axes.imshow(image.permute(1, 2, 0).numpy(), extent=(left, left + 1, top + height / width, top))
        right = true == guess
        title = f"{short(guess)} {prob:.0%}" + ("" if right else f"\n(is {short(true)})")
        color = "black" if right else "firebrick"
        axes.text(left + 0.5, top - 0.04, for_figure(title), color=color, ha="center", fontsize=9)
    axes.set_aspect("auto")
    return figure


def pixels(figure: "Figure") -> NDArray[np.uint8]:
    """Render a figure as an image, (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


class Figures(Callback):
    """Plot the confusion matrix, sample predictions and the most confident mistakes of the test after training.

    The confusion matrix is also written as CSV.

    Args:
        samples: Number of sample predictions and of mistakes shown; 0 disables both.
    """

    def __init__(self, samples: int = 16) -> None:
        self.samples = samples

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start without counts and images."""
        self._counts: Tensor | None = None
        self._turns: Counter[int] = Counter()  # test images of each class so far
        self._shown: list[tuple[tuple[int, int], Prediction]] = []
        self._surest = Surest(self.samples)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count the predictions of one batch, and keep sample images of all classes and the most confident mistakes."""
        if own_module(pl_module).test_name != "test" or not isinstance(outputs, dict) or "logits" not in outputs:
            return
        counts = outputs["weight"] > 0
        positions = counts.nonzero()[:, 0]
        logits, labels = outputs["logits"][positions].float(), outputs["label"][positions]
        classes = logits.shape[1]
        guesses = logits.argmax(1)
        if classes <= MOST_COUNTED:
            pairs = torch.bincount(labels * classes + guesses, minlength=classes * classes).reshape(classes, classes)
            self._counts = pairs if self._counts is None else self._counts + pairs
        if "image" not in batch or not self.samples:  # texts
            return
        self._surest.add(batch["image"], outputs["index"], outputs["label"], outputs["logits"], counts)
        index, probs = outputs["index"][positions].cpu(), logits.softmax(1).amax(1)
        words = rng.words(0, "shown", index)  # image folders are ordered by class
        for position, label in enumerate(labels.tolist()):
            self._turns[label] += 1
            key = self._turns[label], int(words[position])
            if len(self._shown) < self.samples or key < self._shown[-1][0]:
                image = batch["image"][positions[position]].detach()
                image = image.to("cpu", torch.float32, copy=True)  # a view would keep the whole batch
                kept = Prediction(float(probs[position]), int(index[position]), label, int(guesses[position]), image)
                insort(self._shown, (key, kept), key=lambda one: (one[0], one[1].index))
                del self._shown[self.samples :]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and save the plots."""
        if own_module(pl_module).test_name != "test":
            return
        counts: Any = None if self._counts is None else pl_module.all_gather(self._counts)
        surest = self._surest.gathered()
        if not trainer.is_global_zero:
            return
        names = own_module(pl_module).objective.classnames if counts is not None or self._shown else []
        plots: dict[str, Callable[[], Figure]] = {}
        if counts is not None:
            counts = (counts.sum(0) if counts.dim() > 2 else counts).cpu()
            rows = [[name, *row] for name, row in zip(names, counts.tolist(), strict=True)]
            write_text(run_folder(trainer) / FOLDER / "confusion.csv", csv_text([["true/predicted", *names], *rows]))
            if len(names) <= MOST_CLASSES:
                plots["confusion"] = partial(confusion_figure, counts, names)
        if self._shown:
            frame: ImageSpec = trainer.datamodule.frame  # type: ignore[attr-defined]
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (frame.mean, frame.std))

            def grid(kept: Sequence[Prediction], heading: str = "") -> Callable[[], "Figure"]:
                truth, guesses = [names[one.label] for one in kept], [names[one.guess] for one in kept]
                images = [(one.image * std + mean).clamp(0, 1) for one in kept]
                return partial(samples_figure, images, truth, guesses, [one.probability for one in kept], heading)

            plots["predictions"] = grid(wrong_first(surest.mistakes, [one for _, one in self._shown]))
            plots["mistakes"] = grid(surest.mistakes, surest.heading())
        write_plots(trainer, plots)


def write_plots(trainer: Trainer, plots: dict[str, Callable[[], "Figure"]]) -> None:
    """Write plots to the run folder and to TensorBoard, by name; a plot that fails is logged."""
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    folder = run_folder(trainer) / FOLDER
    for name, make in plots.items():
        try:
            image = pixels(make())
        except Exception as error:  # a failed plot must not end the run
            reason = str(error).strip().partition("\n")[0]
            log.warning("the plot %s could not be drawn: %s: %s", name, type(error).__name__, reason)
            continue
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        write_bytes(folder / f"{name}.png", png.getbuffer())
        for board in boards:
            board.experiment.add_image(f"test/{name}", image, trainer.global_step, dataformats="HWC")


class PerClass(Callback):
    """Write ``test_per_class.csv`` and log class means for tests with class logits.

    The counts are summed over all devices.

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
        self._scores: MulticlassStatScores | None = None
        self._right = CatMetric()  # 2 * index + 1 of a correct sample, 2 * index of another one

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

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the class means; after a test of the trained model also write the table."""
        if self._scores is None:
            return
        module = own_module(pl_module)
        table, name = class_table(self._scores.compute().cpu()), module.test_name
        metrics = {  # over the classes that have them; the accuracy is the mean recall
            f"{name}/balanced_accuracy": float(table[:, 2].nanmean()),
            f"{name}/macro_f1": float(table[:, 3].nanmean()),
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        samples = table[:, 0]
        sizes = {f"{name}/smallest_class": int(samples.min()), f"{name}/largest_class": int(samples.max())}
        self.facts = {**metrics, **sizes}
        codes = torch.unique(torch.as_tensor(self._right.compute()).long())  # sorted; a sampler may repeat samples
        if name == "test" and 0 < len(codes) <= MOST_PACKED:
            self.facts["test/right"] = pack_bits((codes % 2).bool().tolist())
        if name == "test" and trainer.is_global_zero:
            cells: list[list[Any]] = [["class", "samples", "precision", "recall", "f1"]]
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
    """

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file and print its path."""
        written = getattr(getattr(pl_module, "objective", None), "written", [])
        if written and trainer.is_global_zero:
            file = run_folder(trainer) / "answers.jsonl"
            write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in written))
            print_above_progress(f"answers: {file} ({len(written):,})")
