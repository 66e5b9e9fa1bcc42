"""Metrics and predictions of an objective, as files, messages and tables show them."""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score


@dataclass(frozen=True)
class Measure:
    """A metric of an objective, as files, messages and tables show it.

    Examples:
        >>> Measure("mae", "mean error", mode="min", decimals=3).text(0.25)
        '0.250'

    Attributes:
        name: Its name in ``results.json``, behind ``val/`` or ``test/``.
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
"""The metric of every task, beside its own ones."""


SEVERAL = (Measure("map", "mean average precision"), Measure("f1", "F1"), LOSS)
"""The metrics where an image may have several classes: means over the classes, of torchmetrics."""


def find_measure(measures: Sequence[Measure], name: str, several: bool = False) -> Measure:
    """Return the measure with a name, or for "" the first one that is validated.

    A callback may log others: they are fractions, except for losses. If a sample may have ``several`` classes, `SEVERAL`
    replaces the measures.
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


def set_metrics(classes: int) -> dict[str, Metric]:
    """Return new metrics of `SEVERAL`, without the loss, which take probabilities and truth, both (b, classes).

    Both are means over the classes. A class without images has no average precision and is left out of that mean; its
    F1 is 0.
    """
    options: dict[str, Any] = {"average": "macro", "validate_args": False}
    return {"map": _Precision(classes, **options), "f1": MultilabelF1Score(classes, **options)}


class _Precision(MultilabelAveragePrecision):
    """Average precision without a warning for each class without images, which the start of a run names."""

    def compute(self) -> Tensor:
        """Return the mean over the classes with images."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(No positive samples|Average precision score)")
            value: Tensor = super().compute()
        return value


def class_answers(predictions: Tensor, classnames: Sequence[str], most: int, several: bool = False) -> Answers:
    """Return class probabilities (b, classes) for a person: the best classes, at most so many.

    If a sample may have ``several`` classes, a first column has all whose probability is 0.5 or more, as tables of labels
    have them: with ``;`` between the names, or as a list of JSON if a name contains a sign that has a meaning there.
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
        chosen = [[classnames[label] for label in row.nonzero()[:, 0].tolist()] for row in predictions >= 0.5]
        plain = [not re.search(r"[;|]|^[\[{]", " ".join(names)) for names in chosen]
        cells = [";".join(names) if simple else json.dumps(names) for names, simple in zip(chosen, plain, strict=True)]
        rows = [[cell, *row] for cell, row in zip(cells, rows, strict=True)]
        columns, note = ["labels", *columns], f"the labels of at least 0.5 and {note}"
    return Answers(columns, rows, note)
