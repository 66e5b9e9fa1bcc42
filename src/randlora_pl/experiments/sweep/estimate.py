"""What a cell will take: from finished cells that are like it, else from counted parameters and operations."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from randlora_pl.data.catalog.registry import CATALOG
from randlora_pl.experiments.sweep.expand import Counts, counts, steps, window
from randlora_pl.experiments.sweep.folder import SweepFolder
from randlora_pl.experiments.sweep.plan import Cell
from randlora_pl.experiments.sweep.texts import is_text, test_samples, text_tokens

MEASURED, COUNTED = "measured", "counted"

_ALIKE = (
    ("model", "dataset", "budget", "method"),
    ("model", "dataset", "method"),
    ("model", "method"),
    ("model",),
)  # the nearest first
_EFFICIENCY = 0.3
"""Share of the speed of a large matrix product that training is taken to reach."""
_PASSES = 3
"""Cost of a training step in forward passes: one forward, two backward."""
_BYTES = {"bfloat16": 2}
"""Of a frozen parameter; 4 otherwise."""


@dataclass(frozen=True)
class Estimate:
    """What a cell will take.

    Attributes:
        seconds: Time; None where nothing is known.
        bytes: Memory; a counted one has no activations.
        source: ``measured`` or ``counted``.
    """

    seconds: float | None
    bytes: int | None
    source: str


@dataclass
class Estimator:
    """Estimates cells of one sweep.

    Attributes:
        folder: The sweep, with whatever is finished in it.
        cells: All its cells.
        rate: Floating point operations a second of a large matrix product here; asked for at most once.
    """

    folder: SweepFolder
    cells: Sequence[Cell]
    rate: Callable[[], float] | None = None
    _groups: dict[tuple[Any, ...], list[tuple[Cell, dict[str, Any]]]] = field(default_factory=dict)
    _counts: dict[tuple[str, str], Counts | None] = field(default_factory=dict)
    _speed: float = 0.0

    def refresh(self) -> None:
        """Takes the figures of all finished cells."""
        groups = defaultdict(list)
        for cell in self.cells:
            found = self.folder.results(cell)
            if found.get("cell_seconds"):
                for names in _ALIKE:
                    groups[names, *(getattr(cell.labels, name) for name in names), cell.untrained].append((cell, found))
        self._groups = dict(groups)

    def measured(self, cell: Cell) -> Estimate | None:
        """From finished cells: seconds a step times steps, and what there is beside the training."""
        for names in _ALIKE:
            found = self._groups.get((names, *(getattr(cell.labels, name) for name in names), cell.untrained))
            if not found:
                continue
            peaks = [int(f["peak_memory_bytes"]) for _, f in found if f.get("peak_memory_bytes")]
            rest = fmean(f["cell_seconds"] - f.get("fit_seconds", 0.0) for _, f in found)
            rates = [f["fit_seconds"] / f["steps"] for _, f in found if f.get("steps") and f.get("fit_seconds")]
            images = [n for other, _ in found if (n := tested(other))]
            here = tested(cell)
            if here and images:  # most of the rest is the test
                rest *= here / fmean(images)
            planned = 0 if cell.untrained else planned_steps(cell)
            if planned is None or (planned and not rates):
                seconds = fmean(f["cell_seconds"] for _, f in found)
            else:
                seconds = rest + (planned * fmean(rates) if planned else 0)
            return Estimate(seconds, max(peaks, default=None), MEASURED)
        return None

    def counted(self, cell: Cell) -> Estimate:
        """From parameters and operations."""
        key = (cell.labels.model, cell.labels.method)
        if key not in self._counts:
            self._counts[key] = counts(cell.tree)
        found = self._counts[key]
        if found is None:
            return Estimate(None, None, COUNTED)
        memory = memory_of(cell, found)
        planned = planned_steps(cell)
        if (planned is None and not cell.untrained) or self.rate is None:
            return Estimate(None, memory, COUNTED)
        self._speed = self._speed or self.rate()
        work = _work(cell, found, 0 if cell.untrained else planned or 0)
        return Estimate(work / (_EFFICIENCY * self._speed), memory, COUNTED)

    def __call__(self, cell: Cell) -> Estimate:
        """The better of the two."""
        return self.measured(cell) or self.counted(cell)


def memory_of(cell: Cell, found: Counts) -> int:
    """Bytes of weights, gradients and AdamW's two moments."""
    trained = 0 if cell.untrained else found.trainable
    frozen = _BYTES.get(str(cell.flat.get("model.frozen_dtype")), 4)
    return frozen * (found.total - trained) + 16 * trained


def _work(cell: Cell, found: Counts, steps: int) -> int:
    """Floating point operations of the training and of the test."""
    passes, batch, samples = _PASSES, window(cell.tree), tested(cell) or 0
    if found.token:
        passes += bool(cell.flat.get("model.gradient_checkpointing"))  # the forward pass once more
        learned, answered = text_tokens(cell.tree)
        return found.token * (samples * answered + steps * passes * batch * learned)
    row = CATALOG.get(cell.flat["data.dataset"])
    classes = (row.classes if row else None) or 0
    test = samples * found.image + classes * found.text
    return test + steps * passes * (batch * found.image + min(classes or batch, batch) * found.text)


def planned_steps(cell: Cell) -> int | None:
    """Optimizer steps of a cell, None where nobody has counted its samples."""
    row = CATALOG.get(cell.flat["data.dataset"])
    return steps(cell.tree, row.classes if row else None, row.counts.get("train") if row else None)


def tested(cell: Cell) -> int | None:
    """Test images or texts of a cell, None where nobody has counted them."""
    if is_text(cell.tree):
        return test_samples(cell.tree)
    row = CATALOG.get(cell.flat["data.dataset"])
    return row.counts.get("test") if row else None
