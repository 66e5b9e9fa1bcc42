"""What ``predict`` found out, as a CSV file."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from randlora_pl.utils.text.csv_text import csv_text

if TYPE_CHECKING:
    from torch import Tensor


class Predictions:
    """What adapters say of images or texts.

    Args:
        names: Of the adapters, or of the one sum.
        unit: What is predicted for: ``images``, ``texts`` or ``prompts``.
        columns: Names of what was given.
        given: Its cells, for each of them.
        said: Names of what an adapter says of each.
        note: The end of the summary.
    """

    def __init__(
        self,
        names: Sequence[str],
        unit: str,
        columns: Sequence[str],
        given: Sequence[Sequence[str]],
        said: Sequence[str],
        note: str,
    ) -> None:
        self.names, self.unit, self.columns, self.given, self.said = list(names), unit, columns, given, said
        self.note = note
        self._lines: list[tuple[int, int, Sequence[str]]] = []  # place of what was given, of the adapter; cells

    @classmethod
    def of_classes(
        cls, names: Sequence[str], unit: str, columns: Sequence[str], given: Sequence[Sequence[str]], classes: int
    ) -> "Predictions":
        """Those of classifiers, which say the best classes of each, so many at most."""
        more = [name for place in range(2, classes + 1) for name in (f"class_{place}", f"probability_{place}")]
        said = ["class", "probability", *more]
        return cls(names, unit, columns, given, said, f"the best {classes} classes of each")

    def add(self, name: str, place: int, cells: Sequence[str]) -> None:
        """Takes what an adapter says.

        Args:
            name: Of the adapter.
            place: Which of what was given it is.
            cells: What it says, at most as many as there are columns.
        """
        self._lines.append((place, self.names.index(name), cells))

    def add_classes(self, name: str, places: Sequence[int], classnames: Sequence[str], shares: "Tensor") -> None:
        """Takes the best classes.

        Args:
            name: Of the adapter.
            places: Which of what was given they are.
            classnames: The adapter's classes.
            shares: Probability of each class, (places, classes).

        Raises:
            UserError: They are not numbers.
        """
        from randlora_pl.tasks.evaluation import check_numbers

        check_numbers(shares, name)
        best = shares.topk(min(len(self.said) // 2, len(classnames)))
        for place, labels, values in zip(places, best.indices.tolist(), best.values.tolist(), strict=True):
            pairs = [(classnames[label], f"{value:.6f}") for label, value in zip(labels, values, strict=True)]
            self.add(name, place, [text for pair in pairs for text in pair])

    def csv(self) -> str:
        """The file: a line for each; with several adapters one for each of them, named behind what was given."""
        several = len(self.names) > 1
        rows = [[*self.columns, *(["adapter"] if several else []), *self.said]]
        for place, adapter, cells in sorted(self._lines):
            blank = [""] * (len(self.said) - len(cells))  # an adapter of fewer classes
            rows.append([*self.given[place], *([self.names[adapter]] if several else []), *cells, *blank])
        return csv_text(rows)

    def summary(self, weights: dict[str, float] | None) -> str:
        """How many, and by what.

        Args:
            weights: Of the sum of adapters, where it is one.
        """
        many = f"{len(self._lines) // len(self.names):,} {self.unit}"
        if weights is not None:
            many += f", {' + '.join(f'{weight:g} {name}' for name, weight in weights.items())}"
        elif len(self.names) > 1:
            many += f", {len(self.names)} adapters ({', '.join(self.names)})"
        return f"{many}, {self.note}"
