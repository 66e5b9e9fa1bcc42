"""One run of a sweep, as a report reads it; also from the ``cells.csv`` of a report whose cells are not kept."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from randlora_pl.lab.report.curves import TRAINED, VALIDATED
from randlora_pl.lab.report.plan import Key
from randlora_pl.run.options.validate import rate_name
from randlora_pl.utils.errors import UserError

PREFIX = "test/acc/"
"""Prefix of the metrics of runs that have several tests."""
CELLS = "cells.csv"
RIGHT = "test/right"
"""Fact with the test samples that were classified correctly, packed."""
METRIC = "data/metric"
"""Fact with the metric of labelled texts: ``acc``, ``matthews`` or ``pearson``."""
_LABELS = ("model", "family", "dataset", "budget", "method", "state", "reason", "cell", "rate_chosen_by")
_TEXTS = (
    *(*_LABELS, "adapter", "task", "device", "version", "git_commit", "machine", "version/python", "version/torch"),
    *(METRIC, RIGHT, TRAINED, VALIDATED),
)
_RUN = (*_LABELS, "seed", "accuracy", "zeroshot_accuracy")
"""Columns that are not metrics of ``results.json``."""


@dataclass(frozen=True)
class FinishedRun:
    """One seed of one cell.

    Attributes:
        seed: None for a cell that has no seed because it was never run.
        state: One of the states of `collect`.
        reason: Reason for the missing accuracy, in one line; empty if the state is enough.
        cell: Name of its folder, empty where there is none.
        family: Model family, if the cell names one.
        accuracy: Test accuracy in percent.
        zeroshot: Accuracy of the pretrained model in percent, if the run measured it.
        facts: The other metrics of its ``results.json``.
        typed: Learning rates that its config has.
    """

    key: Key
    seed: int | None
    state: str
    reason: str = ""
    cell: str = ""
    family: str = ""
    accuracy: float | None = None
    zeroshot: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    typed: dict[str, Any] = field(default_factory=dict)

    def number(self, name: str) -> float | None:
        """Return a metric of ``results.json`` as a number, of one over training steps the last.

        None where it is missing, zero (not measured), not finite or none.
        """
        value = self.facts.get(name)
        value = value[-1] if isinstance(value, list) and value else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return None
        return float(value) or None

    @property
    def per_second(self) -> float | None:
        """Images or texts per second in training."""
        return self.number("images_per_second") or self.number("samples_per_second")

    @property
    def device(self) -> str:
        """Device of the run, ``cpu`` or ``cuda`` or a name."""
        return str(self.facts.get("device") or "")

    @property
    def status(self) -> str:
        """State of the run as text for a table."""
        return f"{self.state}: {self.reason}" if self.reason else self.state


def read_runs(file: Path) -> list[FinishedRun]:
    """Return the runs of a file that `cells_csv` wrote; numbers have its six digits.

    Raises:
        UserError: It cannot be read, or is another table.
    """
    import pandas  # a fifth of a second

    try:
        with file.open(encoding="utf-8", newline="") as stream:
            table = pandas.read_csv(
                stream, dtype=dict.fromkeys(_TEXTS, str), keep_default_na=False, na_values=[""]
            ).convert_dtypes()
        rows = table.to_dict("records")
        return [_run({name: value for name, value in row.items() if not pandas.isna(value)}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a table of cells ({type(error).__name__}: {error}).") from error


def _run(row: dict[str, Any]) -> FinishedRun:
    """Return the run of a row without its empty cells."""
    facts = {"method" if name == "adapter" else name: value for name, value in row.items() if name not in _RUN}
    facts |= {name: value / 100 for name, value in facts.items() if name.startswith(PREFIX)}
    typed = {"learning_rate": facts["learning_rate"]} if row.get("rate_chosen_by") == "typed" else {}
    name = rate_name(str(facts.get("method")), facts.get("task"))
    if name != "learning_rate" and "learning_rate" in facts:
        facts[name] = facts.pop("learning_rate")
        typed = {name: facts[name]} if typed else {}
    return FinishedRun(
        Key(*(row[name] for name in Key._fields)), row.get("seed"), row["state"], row.get("reason", ""),
        row.get("cell", ""), row.get("family", ""), row.get("accuracy"), row.get("zeroshot_accuracy"), facts, typed,
    )  # fmt: skip
