"""Training loss and validation metric of a run over its steps, in few numbers that fit into ``cells.csv``."""

import csv
import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import fmean

TRAINED, VALIDATED = "curve/train_loss", "curve/val_score"
"""Columns of the runs: means of its training loss over equal parts of its steps; pairs ``step:metric``."""
_LOSS, _SCORES = "train/loss", ("val/score", "val/acc")
_PARTS = 16
"""Largest number of parts of a run's steps, and of its validations."""
_STEPS = 5
"""Fewest steps of a part: the loss of one batch is noise."""


def read_curves(cell: Path) -> dict[str, str]:
    """Return the curves of a run from its logs; what the logs do not have, or is damaged in them, is left out.

    A run that was stopped and resumed has the log of each part in a folder of its own: ``csv``, ``csv_2`` and so on.
    """
    columns: dict[str, dict[int, float]] = {name: {} for name in (_LOSS, *_SCORES)}
    try:
        for log in sorted(cell.glob("csv*/metrics.csv"), key=lambda path: (len(path.parent.name), path)):
            with log.open(encoding="utf-8", newline="") as stream:
                for line in csv.DictReader(stream):
                    step = _number(line.get("step"))
                    for name, found in columns.items():
                        value = _number(line.get(name))
                        if step is not None and step >= 0 and value is not None:
                            found[int(step)] = value
    except (OSError, ValueError, csv.Error):
        return {}
    scores = next((found for name in _SCORES if (found := columns[name])), {})
    facts = {
        TRAINED: " ".join(f"{mean:.4g}" for mean in _means(columns[_LOSS])),
        VALIDATED: " ".join(f"{step}:{value:.4g}" for step, value in _some(scores)),
    }
    return {name: text for name, text in facts.items() if text}


def losses(text: object) -> list[float]:
    """Return the means of the training loss over equal parts of a run, as `TRAINED` has them; empty if it has none."""
    found = [_number(part) for part in str(text).split()]
    return [value for value in found if value is not None]


def scores(text: object) -> dict[float, float]:
    """Return the validation metric in percent by step, of `VALIDATED`; empty if the run did not validate on the way."""
    pairs = [part.partition(":") for part in str(text).split()]
    found = {_number(step): _number(value) for step, _, value in pairs}
    return {step: 100 * value for step, value in found.items() if step is not None and value is not None}


def reached(curve: list[float], level: float) -> Fraction | None:
    """Return the share of a run's steps after which its loss is at most ``level``; None where it never is."""
    return next((Fraction(n, len(curve)) for n, value in enumerate(curve, 1) if value <= level), None)


def at(curve: list[float], share: Fraction) -> float | None:
    """Return the mean loss of the last part before a share of a run's steps; None before the end of the first part."""
    number = math.floor(share * len(curve))
    return curve[number - 1] if number else None


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _means(values: dict[int, float]) -> list[float]:
    """Return means over equal parts of the steps, as many as have at least `_STEPS` steps and a value each."""
    total = max(values, default=0)
    for count in range(min(_PARTS, len(values), max(1, total // _STEPS)), 0, -1):
        parts = [
            [value for step, value in values.items() if first < step * count <= last]
            for first, last in pairwise(range(0, total * (count + 1), max(total, 1)))
        ]
        if parts and all(parts):
            return [fmean(part) for part in parts]
    return []


def _some(values: dict[int, float]) -> list[tuple[int, float]]:
    """Return at most `_PARTS` validations, the last one among them; none if there is only one."""
    found = sorted(values.items())
    every = -(-len(found) // _PARTS)
    return found[::-1][:: max(every, 1)][::-1] if len(found) > 1 else []
