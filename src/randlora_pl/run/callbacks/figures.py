"""Plots and tables of a test: confusion matrix, predictions, most confident mistakes, and the gates of HydraLoRA."""

import io
import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
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

from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.tasks.module import own_module
from randlora_pl.utils import rng
from randlora_pl.utils.errors import log
from randlora_pl.utils.files import write_bytes, write_text
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.run_files import run_folder
from randlora_pl.utils.text import csv_text, for_figure

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

    def add(self, images: Tensor, index: Tensor, labels: Tensor, predictions: Tensor, counts: Tensor) -> None:
        """Add the predictions of a batch.

        Args:
            images: Model inputs, (b, 3, H, W).
            index: Indices in the test set, (b,).
            labels: True classes, (b,).
            predictions: Probabilities, (b, classes).
            counts: (b,) bool, False for padding of the batch.
        """
        probabilities, guesses = predictions.nan_to_num(0.0).max(1)
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
        if own_module(pl_module).objective.several:  # no class is mistaken for another
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
        predictions = own_module(pl_module).objective.predictions(outputs["logits"])
        self._surest.add(batch["image"], outputs["index"], outputs["label"], predictions, counts)
        index, probs = outputs["index"][positions].cpu(), predictions[positions].amax(1)
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
        counts = None if self._counts is None else trainer.strategy.reduce(self._counts, reduce_op="sum").cpu()
        surest = self._surest.gathered()
        if not trainer.is_global_zero:
            return
        names = own_module(pl_module).objective.classnames if counts is not None or self._shown else []
        plots: dict[str, Callable[[], Figure]] = {}
        if counts is not None:
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


class Gates(Callback):
    """Plot the mean gate of each head of HydraLoRA by class, or by dataset where the tests are questions.

    A mean is over the tokens of each sample, then over samples. It leaves out the text tower of CLIP models, padding,
    and generated tokens. Other methods have no gates, and blocks that ``torch_compile`` compiled do not show theirs.
    The metric ``test/gate_entropy`` is the mean entropy of a token's gates relative to the largest possible one. It is
    1 if all heads have equal gates, 0 if each token uses a single head.
    """

    def __init__(self) -> None:
        self._layers: dict[str, DeltaWeight] = {}
        self._sums: dict[str, Tensor] = {}
        self._batch: dict[str, tuple[Tensor, Tensor]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the gates of all layers."""
        self._stop()
        module = own_module(pl_module)
        task = module.objective
        if module.test_name != "test" or task.torch_compile or task.adapter.fixed:
            return
        items = getattr(trainer.datamodule, "items", None)  # type: ignore[attr-defined]
        groups = list(dict.fromkeys(item.task for item in items)) if items else list(task.label_names)
        self._groups = groups or ["all samples"]
        updates = {
            path.replace(".delta", ""): module
            for path, module in task.model.named_modules()
            if isinstance(module, DeltaWeight) and module.heads
        }
        image = {path: delta for path, delta in updates.items() if path.startswith("visual.")}
        self._layers = image or updates  # without the text tower of a CLIP model
        for name, delta in self._layers.items():
            # (groups, heads + 2): gates, entropies, number of samples
            self._sums[name] = torch.zeros(len(self._groups), delta.heads + 2, device=pl_module.device)
            delta.listener = partial(self._listen, name)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        """Prepare for the gates of a batch."""
        self._batch, self._size, self._mask = {}, len(batch["weight"]), batch.get("attention_mask")

    def _listen(self, name: str, gates: Tensor) -> None:
        """Keep the mean gates (b, heads) and entropies (b,) of the first use of a layer in a batch."""
        if name not in self._batch and (means := sample_means(gates, self._size, self._mask)) is not None:
            self._batch[name] = means

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Add the means of a batch to the sums of its classes or datasets."""
        counts = batch["weight"] > 0
        if not self._batch or not isinstance(outputs, dict):
            return
        items = getattr(trainer.datamodule, "items", None)  # type: ignore[attr-defined]
        group = torch.zeros_like(counts, dtype=torch.int64)
        if items:
            numbers = [self._groups.index(items[number].task) for number in batch["index"].tolist()]
            group = torch.tensor(numbers, device=counts.device)
        elif len(self._groups) > 1:
            group = outputs["label"]
        for name, (gates, entropy) in self._batch.items():
            rows = torch.cat([gates, entropy[:, None], torch.ones_like(entropy)[:, None]], 1).float()
            self._sums[name].index_add_(0, group[counts], rows[counts])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the entropy, and write the plot and the table."""
        if not self._sums:
            return
        sums = trainer.strategy.reduce(torch.stack(list(self._sums.values())), reduce_op="sum").double().cpu()
        layers, groups = list(self._sums), self._groups
        self._stop()
        if not sums[..., -1].any():
            return
        means, samples = sums[..., :-1] / sums[..., -1:], sums[..., -1]
        entropy = float(sums[..., -2].sum() / samples.sum())
        pl_module.log("test/gate_entropy", entropy, rank_zero_only=False, sync_dist=False)
        if not trainer.is_global_zero:
            return
        header = ["layer", "group", "samples", *(f"head {k}" for k in range(1, means.shape[2])), "entropy"]
        rows = [
            [layer, group, int(samples[i, j]), *(f"{value:.6f}" for value in means[i, j].tolist())]
            for i, layer in enumerate(layers)
            for j, group in enumerate(groups)
            if samples[i, j]
        ]
        write_text(run_folder(trainer) / FOLDER / "gates.csv", csv_text([header, *rows]))
        used = samples[0] > 0
        names = [group for group, any_sample in zip(groups, used.tolist(), strict=True) if any_sample]
        if len(names) <= MOST_CLASSES:
            title = f"mean gate of each head; mean entropy of a token's gates: {entropy:.3f} of the largest"
            write_plots(trainer, {"gates": partial(gates_figure, means[:, used, :-1], layers, names, title)})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        self._stop()

    def _stop(self) -> None:
        for delta in self._layers.values():
            delta.listener = None
        self._layers, self._sums, self._batch = {}, {}, {}


def sample_means(gates: Tensor, size: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """Return the mean gates (b, heads) and mean entropies (b,) of the samples of a batch, or None for other inputs.

    Args:
        gates: (b, tokens ..., heads), (tokens, b, heads), or with the windows or beams of a sample in succession.
        size: Number b of samples.
        mask: Attention mask of the texts, (b, length); the layer may see all tokens but the last.
    """
    heads = gates.shape[-1]
    weight = None
    if mask is not None:
        length = gates.shape[1] if gates.dim() == 3 else 0
        if gates.shape[0] != size or length not in (mask.shape[1], mask.shape[1] - 1) or not length:
            return None
        weight = mask[:, :length, None].to(gates.dtype)
    elif gates.shape[0] % size == 0:
        gates = gates.reshape(size, -1, heads)
    elif gates.dim() == 3 and gates.shape[1] == size:
        gates = gates.transpose(0, 1)
    else:
        return None
    entropy = torch.special.entr(gates).sum(-1, keepdim=True) / max(math.log(heads), 1e-9)
    both = torch.cat([gates, entropy], -1)
    means = both.mean(1) if weight is None else (both * weight).sum(1) / weight.sum(1).clamp(min=1)
    return means[:, :-1], means[:, -1]


def gates_figure(means: Tensor, layers: Sequence[str], groups: Sequence[str], title: str = "") -> "Figure":
    """Plot mean gates: a row for each class or dataset, a column for each head, over all layers and of each layer.

    Args:
        means: Mean gates, (layers, groups, heads).
        layers: Names of the layers.
        groups: Names of the classes or datasets.
        title: Heading.
    """
    from matplotlib.figure import Figure

    heads, names = means.shape[2], ["all", *groups]
    blocks = torch.cat([means.mean(0, keepdim=True), means])  # of all layers first
    blocks = torch.cat([blocks.mean(1, keepdim=True), blocks], 1)  # of all groups first
    gap = torch.full((len(blocks), len(names), 1), math.nan, dtype=blocks.dtype)
    picture = torch.cat([blocks, gap], 2).transpose(0, 1).flatten(1)[:, :-1]
    size = min(22.0, 2.5 + 0.14 * picture.shape[1]), min(14.0, 2.2 + 0.2 * len(names))
    figure = Figure(figsize=(max(5.0, size[0]), max(3.5, size[1])))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot(facecolor="#999999")  # between the layers
    reach = max(0.01, float((means - 1 / heads).abs().max()))
    shown = axes.imshow(picture.numpy(), vmin=1 / heads - reach, vmax=1 / heads + reach, cmap="RdBu_r", aspect="auto")
    parts = [layer.split(".") for layer in layers]
    alike = takewhile(lambda names: len(set(names)) == 1, zip(*(part[:-1] for part in parts), strict=False))
    start = [names[0] for names in alike]
    labels = ["all layers", *(".".join(part[len(start) :]) for part in parts)]
    axes.set_xticks([k * (heads + 1) + (heads - 1) / 2 for k in range(len(labels))], labels, rotation=90, fontsize=7)
    if len(groups) <= LABELLED:
        axes.set_yticks(range(len(names)), [for_figure(short(name)) for name in names], fontsize=8)
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.axvline(heads, color="black", linewidth=0.8)
    axes.set_xlabel(f"heads 1 to {heads} of each layer" + (f" in {'.'.join(start)}" if start else ""), fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes, label=f"mean gate (white: 1 / {heads})")
    return figure
