"""Pictures of the test: the confusion matrix and some predictions, in TensorBoard and as PNG files."""

import io
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from randlora_pl.callbacks.run_folder import run_folder, write_bytes
from randlora_pl.printable import for_figure

log = logging.getLogger("randlora_pl")

MOST_CLASSES = 200
"""Above this a confusion matrix is unreadable and large."""
LABELLED = 40
"""Up to this many classes have their names at the axes."""
NUMBERED = 20
"""Up to this many classes have the counts in the cells."""
MOST_LETTERS = 24
FOLDER = "figures"


def confusion_figure(counts: Tensor, classnames: list[str]) -> Figure:
    """Rows are true classes, columns predictions, each row as shares of one.

    Args:
        counts: (classes, classes) int64.
        classnames: Name of each class.
    """
    size = max(4.0, min(14.0, 0.35 * len(classnames) + 2))
    figure = Figure(figsize=(size, size))
    axes = figure.add_axes((0.25, 0.25, 0.72, 0.72))
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classnames) <= LABELLED:
        short = (name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…" for name in classnames)
        names = list(map(for_figure, short))
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(classnames) <= NUMBERED:
        for row, column in counts.nonzero().tolist():
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=color, fontsize=8)
    return figure


def samples_figure(images: Tensor, truth: list[str], predicted: list[str], probability: list[float]) -> Figure:
    """A grid of images with the prediction above each; wrong ones in red with the true class.

    Args:
        images: (n, 3, H, W) on [0, 1].
        truth: True class of each.
        predicted: Predicted class of each.
        probability: Probability of the predicted class.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    height, width = images.shape[2:]
    figure = Figure(figsize=(2.4 * 1.1 * columns, 2.4 * 1.35 * rows))  # as the axes: squares are square
    axes = figure.add_axes((0, 0, 1, 1))  # one for all: sixteen take a second to draw
    axes.axis("off")
    axes.set_xlim(0, 1.1 * columns)
    axes.set_ylim(1.35 * rows, 0)
    for place, (image, true, guess, share) in enumerate(zip(images, truth, predicted, probability, strict=True)):
        left, top = 1.1 * (place % columns) + 0.05, 1.35 * (place // columns) + 0.3
        axes.imshow(image.permute(1, 2, 0).numpy(), extent=(left, left + 1, top + height / width, top))
        right = true == guess
        title = for_figure(f"{guess} {share:.0%}" if right else f"{guess} {share:.0%}\n(is {true})")
        axes.text(left + 0.5, top - 0.04, title, color="black" if right else "firebrick", ha="center", fontsize=9)
    axes.set_aspect("auto")
    return figure


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """A figure as an image, (height, width, 3)."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


class Figures(Callback):
    """Draws the confusion matrix and sample predictions of the test after the training.

    Args:
        samples: Test images shown with their predictions, 0 for none.
    """

    def __init__(self, samples: int = 16) -> None:
        self.samples = samples
        self._counts: Tensor | None = None
        self._shown: list[tuple[Tensor, int, int, float]] = []

    def _wanted(self, task: Any) -> bool:
        return bool(task.test_name == "test")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts from nothing."""
        self._counts, self._shown = None, []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the predictions of one batch, and keeps every so many images for the picture."""
        if not self._wanted(pl_module) or not isinstance(outputs, dict) or "logits" not in outputs:
            return
        counts = outputs["weight"] > 0
        logits, labels = outputs["logits"][counts].float(), outputs["label"][counts]
        classes = logits.shape[1]
        guesses = logits.argmax(1)
        if classes <= MOST_CLASSES:
            pairs = torch.bincount(labels * classes + guesses, minlength=classes * classes).reshape(classes, classes)
            self._counts = pairs if self._counts is None else self._counts + pairs
        if "image" not in batch:  # texts
            return
        batches = trainer.num_test_batches[dataloader_idx]
        per_batch = self.samples if batches == float("inf") else -(-self.samples // max(1, int(batches)))
        chosen = range(0, len(labels), max(1, len(labels) // per_batch)) if per_batch else range(0)
        for place in list(chosen)[: min(per_batch, self.samples - len(self._shown))]:
            share = float(logits[place].softmax(0).max())
            image = batch["image"][counts][place].detach().cpu().float()
            self._shown.append((image, int(labels[place]), int(guesses[place]), share))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws and saves."""
        task: Any = pl_module
        if not self._wanted(task):
            return
        figures: dict[str, Callable[[], Figure]] = {}
        if self._counts is not None:
            counts: Any = pl_module.all_gather(self._counts)
            counts = counts.sum(0) if counts.dim() > 2 else counts
            figures["confusion"] = partial(confusion_figure, counts.cpu(), task.classnames)
        if self._shown:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.frame.mean, data.frame.std))
            images = torch.stack([(image * std + mean).clamp(0, 1) for image, *_ in self._shown])
            truth, guesses = ([task.classnames[row[k]] for row in self._shown] for k in (1, 2))
            shares = [row[3] for row in self._shown]
            figures["predictions"] = partial(samples_figure, images, truth, guesses, shares)
        if trainer.is_global_zero:
            self._write(trainer, figures)

    @staticmethod
    def _write(trainer: Trainer, figures: dict[str, Callable[[], Figure]]) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        folder = run_folder(trainer) / FOLDER
        for name, make in figures.items():
            try:
                image = pixels(make())
            except Exception as error:  # matplotlib's are of many kinds, and none is worth the end of a run
                reason = str(error).strip().partition("\n")[0]
                log.warning("the figure %s could not be drawn: %s: %s", name, type(error).__name__, reason)
                continue
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            write_bytes(folder / f"{name}.png", png.getbuffer())
            for board in boards:
                board.experiment.add_image(f"test/{name}", image, trainer.global_step, dataformats="HWC")
