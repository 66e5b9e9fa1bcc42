"""Estimates of the time and memory of a cell from similar finished cells, else of its memory from its parameters."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from randlora_pl.sweep.expand import Counts, counts
from randlora_pl.sweep.folder import FIRST_SECONDS, SweepFolder
from randlora_pl.sweep.plan import Trial
from randlora_pl.sweep.steps import evaluated_samples, planned_steps

MEASURED, COUNTED = "measured", "counted"

_ALIKE = (
    ("model", "dataset", "budget", "method"),
    ("model", "dataset", "method"),
    ("model", "method"),
    ("model",),
)  # the nearest first
"""Labels in which similar cells are equal."""


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a cell.

    Attributes:
        seconds: Time; None before a similar cell has finished.
        bytes: Memory; without activations if it is counted.
        source: ``measured`` or ``counted``.
    """

    seconds: float | None
    bytes: int | None
    source: str


@dataclass
class Estimator:
    """Estimates cells of one sweep from whatever is finished in its folder."""

    folder: SweepFolder
    cells: Sequence[Trial]
    _groups: dict[tuple[Any, ...], list[tuple[Trial, dict[str, Any]]]] = field(default_factory=dict)
    _counts: dict[tuple[str, str], Counts | None] = field(default_factory=dict)

    def refresh(self) -> None:
        """Take the measurements of all finished trials."""
        self._groups = defaultdict(list)
        for cell in self.cells:
            found = self.folder.results(cell)
            if found.get("cell_seconds"):
                for group in _groups_of(cell):
                    self._groups[group].append((cell, found))

    def measured(self, cell: Trial) -> Estimate | None:
        """From finished cells: seconds a step times steps, and what there is beside the training."""
        found = next(filter(None, map(self._groups.get, _groups_of(cell))), None)
        if found is None:
            return None
        peaks = [int(f["peak_memory_bytes"]) for _, f in found if f.get("peak_memory_bytes")]
        rest = fmean(f["cell_seconds"] - _fit_seconds(f) for _, f in found)
        rates = [_fit_seconds(f) / n for other, f in found if f.get("fit_seconds") and (n := _steps(other, f))]
        images = [n for other, _ in found if (n := evaluated_samples(other.tree))]
        here = evaluated_samples(cell.tree)
        if here and images:  # most of the rest is the test
            rest *= here / fmean(images)
        planned = 0 if cell.untrained else _steps(cell)
        if planned is None or (planned and not rates):
            seconds = fmean(f["cell_seconds"] for _, f in found)
        else:
            seconds = rest + (planned * fmean(rates) if planned else 0)
        return Estimate(seconds, max(peaks, default=None), MEASURED)

    def counted(self, cell: Trial) -> Estimate:
        """Estimate memory from parameters; the time is unknown."""
        if not cell.untrained:
            planned_steps(cell.tree)  # refuses options of the wrong type
        key = (cell.labels.model, cell.labels.method)
        if key not in self._counts:
            self._counts[key] = counts(cell.tree)
        found = self._counts[key]
        return Estimate(None, None if found is None else memory_of(cell, found), COUNTED)

    def __call__(self, cell: Trial) -> Estimate:
        """Estimate from finished cells if there are any, else from parameters."""
        return self.measured(cell) or self.counted(cell)


def memory_of(cell: Trial, found: Counts) -> int:
    """Bytes of weights, gradients and the optimizer's state."""
    trained, state = (0, 0) if cell.untrained else (found.trainable, found.state)
    dtype, precision = cell.flat.get("model.frozen_dtype"), cell.flat.get("trainer.precision")
    frozen = 2 if dtype == "bfloat16" or (dtype == "auto" and precision == "bf16-mixed") else 4
    return frozen * (found.total - trained) + 8 * trained + 4 * state


def _fit_seconds(figures: dict[str, Any]) -> float:
    """Return the training time of a finished cell, of both stages."""
    return float(figures.get("fit_seconds", 0.0) + figures.get(FIRST_SECONDS, 0.0))


def _steps(cell: Trial, figures: dict[str, Any] | None = None) -> int | None:
    """Return the optimizer steps of all stages, as planned, or as its figures say; None if they are not known."""
    before = [planned_steps(tree) for stage, tree in cell.stages.items() if stage]
    last = planned_steps(cell.tree) if figures is None else figures.get("steps")
    total = 0
    for steps in (*before, last):
        if steps is None:
            return None
        total += round(steps)
    return total


def _groups_of(cell: Trial) -> list[tuple[Any, ...]]:
    """Return the groups of alike cells that a cell belongs to."""
    return [(names, *(getattr(cell.labels, name) for name in names), cell.untrained) for names in _ALIKE]
