"""CSV file of the predictions of ``predict``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from randlora_pl.utils.text.tables import csv_text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PredictionTable:
    """Predictions of one or more adapters for images or texts.

    Attributes:
        names: Names of the adapters, or of their one weighted sum.
        unit: Kind of the inputs: ``images``, ``texts`` or ``prompts``.
        columns: Column names of the inputs.
        given: Cells of each input.
        predicted: Column names of an adapter's prediction.
        note: End of the summary.
        lines: Index of the input, index of the adapter, and at most as many cells as ``predicted``.
    """

    names: list[str]
    unit: str
    columns: Sequence[str]
    given: Sequence[Sequence[str]]
    predicted: Sequence[str]
    note: str
    lines: list[tuple[int, int, Sequence[str]]] = field(default_factory=list)

    @classmethod
    def of_classes(
        cls, names: list[str], unit: str, columns: Sequence[str], given: Sequence[Sequence[str]], classes: int
    ) -> "PredictionTable":
        """Return an empty table for classifiers, with at most so many best classes per input."""
        more = [name for number in range(2, classes + 1) for name in (f"class_{number}", f"probability_{number}")]
        predicted = ["class", "probability", *more]
        return cls(names, unit, columns, given, predicted, f"the best {classes} classes of each")

    def add(self, name: str, number: int, cells: Sequence[str]) -> None:
        """Add the prediction of an adapter for the input with an index."""
        self.lines.append((number, self.names.index(name), cells))

    def add_classes(
        self, name: str, numbers: Sequence[int], classnames: Sequence[str], probabilities: "Tensor"
    ) -> None:
        """Add the best classes of an adapter for several inputs.

        Args:
            name: Name of the adapter.
            numbers: Indices of the inputs.
            classnames: The adapter's classes.
            probabilities: Probability of each class, (inputs, classes).

        Raises:
            UserError: The probabilities are not numbers.
        """
        from randlora_pl.tasks.evaluation import check_numbers

        check_numbers(probabilities, name)
        best = probabilities.topk(min(len(self.predicted) // 2, len(classnames)))
        for number, labels, values in zip(numbers, best.indices.tolist(), best.values.tolist(), strict=True):
            pairs = [(classnames[label], f"{value:.6f}") for label, value in zip(labels, values, strict=True)]
            self.add(name, number, [text for pair in pairs for text in pair])

    def csv(self) -> str:
        """Return the file: one line per input and adapter; with several adapters their name follows the input."""
        several = len(self.names) > 1
        rows = [[*self.columns, *(["adapter"] if several else []), *self.predicted]]
        for number, adapter, cells in sorted(self.lines):
            blank = [""] * (len(self.predicted) - len(cells))  # an adapter with fewer classes
            rows.append([*self.given[number], *([self.names[adapter]] if several else []), *cells, *blank])
        return csv_text(rows)

    def summary(self, weights: dict[str, float] | None) -> str:
        """Return a line with the number of inputs and the adapters, with their weights if they were added."""
        many = f"{len(self.lines) // len(self.names):,} {self.unit}"
        if weights is not None:
            many += f", {' + '.join(f'{weight:g} {name}' for name, weight in weights.items())}"
        elif len(self.names) > 1:
            many += f", {len(self.names)} adapters ({', '.join(self.names)})"
        return f"{many}, {self.note}"
