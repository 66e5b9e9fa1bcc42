"""One run of a sweep, as a report reads it."""

import math
from dataclasses import dataclass, field
from typing import Any

from randlora_pl.experiments.report.plan import Key

PREFIX = "test/acc/"
"""Begins the figures of runs that have several tests."""


@dataclass(frozen=True)
class Run:
    """One seed of one cell.

    Attributes:
        seed: None for a cell that has no seed because it was never run.
        state: One of the states of `collect`.
        reason: Reason for the missing accuracy, in one line; empty if the state is enough.
        cell: Name of its folder, empty where there is none.
        family: Model family, if the cell names one.
        accuracy: Test accuracy in percent.
        zeroshot: Accuracy of the untrained model in percent, where the run measured it.
        facts: The other figures of its ``results.json``.
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
        """Return a figure of ``results.json`` as a number, of one over training steps the last.

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
