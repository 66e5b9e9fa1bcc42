"""Metrics and predictions of an objective, as files, messages and tables show them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score
from torchmetrics.utilities import dim_zero_cat


@dataclass(frozen=True)
class Measure:
    """A metric of an objective, as files, messages and tables show it.

    Examples:
        >>> Measure("mae", "mean error", mode="min", decimals=3).text(0.25)
        '0.250'

    Attributes:
        name: Its name in ``results.json``, after ``val/`` or ``test/``.
        word: Its name in sentences.
        mode: Direction of better values.
        decimals: Printed decimals; None for a fraction, which is printed in percent.
        validated: True if a validation logs it, so that it can select the best adapter.
    """

    name: str
    word: str = ""
    mode: Literal["max", "min"] = "max"
    decimals: int | None = None
    validated: bool = True

    @property
    def called(self) -> str:
        """Its word, or else its name."""
        return self.word or self.name

    def text(self, value: float) -> str:
        """Return a value as it is printed."""
        return f"{100 * value:.2f} %" if self.decimals is None else f"{value:.{self.decimals}f}"


ACCURACY = Measure("acc", "accuracy")
"""The metric of most tasks, a fraction."""
LOSS = Measure("loss", mode="min", decimals=4)
"""The metric of every task, in addition to its own."""


SEVERAL = (Measure("map", "mean average precision"), Measure("f1", "F1"), LOSS)
"""The metrics where an image may have several classes: means over the classes, of torchmetrics."""


def find_measure(measures: Sequence[Measure], name: str, several: bool = False) -> Measure:
    """Return the measure with a name, or for "" the first one that is validated.

    A callback may log others: they are fractions, except for losses. `SEVERAL` replaces the measures if a sample may
    have ``several`` classes.
    """
    measures = SEVERAL if several else [*measures, *(SEVERAL if name else ())]
    if not name:
        return next((measure for measure in measures if measure.validated), LOSS)
    other = replace(LOSS, name=name) if name.endswith("loss") else Measure(name)
    return next((measure for measure in measures if measure.name == name), other)


@dataclass(frozen=True)
class Answers:
    """Predictions as a person reads them.

    Attributes:
        columns: Names of the cells.
        rows: Cells of each sample.
        note: Meaning of the columns, for a summary.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


def number_answers(predictions: Tensor, answer: str) -> Answers:
    """Return predicted numbers (b, 1) for a person, in a column with the name ``answer``."""
    return Answers([answer], [[f"{value:.6f}"] for value in predictions[:, 0].tolist()], f"the {answer} of each")


class ClassPrecision(MultilabelAveragePrecision):
    """Mean average precision over the classes that have images; it takes probabilities and truth, both (b, classes)."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the mean, NaN if no class has images."""
        values: Tensor = super().compute()
        return values[dim_zero_cat(self.target).sum(0) > 0].mean()


def set_metrics(classes: int) -> dict[str, Metric]:
    """Return new metrics of `SEVERAL`, without the loss; a class with neither images nor predictions has an F1 of 0."""
    return {"map": ClassPrecision(classes, average=None), "f1": MultilabelF1Score(classes, average="macro")}


def class_answers(predictions: Tensor, classnames: Sequence[str], most: int, several: bool = False) -> Answers:
    """Return class probabilities (b, classes) for a person: the best classes, at most so many.

    If a sample may have ``several`` classes, a first column has all of a probability above 0.5, where F1 counts them,
    with ``;`` between the names.
    """
    best = predictions.topk(min(most, predictions.shape[1]))
    count = best.values.shape[1]
    further = [name for number in range(2, count + 1) for name in (f"class_{number}", f"probability_{number}")]
    rows = []
    for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        pairs = [(classnames[label], f"{value:.6f}") for label, value in zip(labels, values, strict=True)]
        rows.append([text for pair in pairs for text in pair])
    columns, note = ["class", "probability", *further], f"the best {count} classes of each"
    if several:
        chosen = [";".join(classnames[label] for label in row.nonzero()[:, 0].tolist()) for row in predictions > 0.5]
        rows = [[cell, *row] for cell, row in zip(chosen, rows, strict=True)]
        columns, note = ["labels", *columns], f"the labels above 0.5 and {note}"
    return Answers(columns, rows, note)
