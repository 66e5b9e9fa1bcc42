"""Metrics and predictions of an objective, as files, messages and tables show them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor


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


def find_measure(measures: Sequence[Measure], name: str) -> Measure:
    """Return the measure with a name, or for "" the first one that is validated.

    A callback may log others: they are fractions, except for losses.
    """
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


def class_answers(predictions: Tensor, classnames: Sequence[str], most: int) -> Answers:
    """Return class probabilities (b, classes) for a person: the best classes, at most so many."""
    best = predictions.topk(min(most, predictions.shape[1]))
    count = best.values.shape[1]
    further = [name for number in range(2, count + 1) for name in (f"class_{number}", f"probability_{number}")]
    rows = []
    for labels, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        pairs = [(classnames[label], f"{value:.6f}") for label, value in zip(labels, values, strict=True)]
        rows.append([text for pair in pairs for text in pair])
    return Answers(["class", "probability", *further], rows, f"the best {count} classes of each")
