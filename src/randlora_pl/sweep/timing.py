"""Budget of a comparison: the time of a run of each method, and the trials and seeds that fit into the given time.

A run starts, takes steps and validates. A run of a few steps measures the time of each part. What fits depends on
these times alone, so a comparison that was stopped has the same plan when it is resumed.
"""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from randlora_pl.sweep import LOWEST
from randlora_pl.sweep.climb import FINALISTS
from randlora_pl.sweep.expand import data_of
from randlora_pl.sweep.plan import Cell
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.text import duration

FEWEST = 20
"""Fewest optimizer steps that are advised."""
STEPS = 6
"""Optimizer steps of a run that measures the time; the rate leaves out its first three batches."""
SPARE, LAST_SPARE = 0.85, 0.95
"""Parts of the time that a plan may fill: before the search, and after it, when the runs' own times are known."""
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


class Tier(NamedTuple):
    """Trials of each method with one seed, seeds of the search for the best of them, and seeds of the tests."""

    trials: int
    tries: int
    seeds: int

    def seconds(self, costs: "Iterable[Cost]") -> float:
        """Return the expected seconds of the plan for some methods."""
        again = min(FINALISTS[LOWEST], self.trials) * (self.tries - 1)
        return sum((self.trials + again) * cost.search + self.seeds * cost.final for cost in costs)


_TESTED = ((16, 3, 5), (12, 2, 5), (9, 2, 5), (7, 2, 5), (5, 1, 5))  # fewer than five seeds give no verdict
TIERS = tuple(Tier(*numbers) for numbers in (*_TESTED, (5, 1, 3), (3, 1, 3), (3, 1, 2), (3, 1, 1), (0, 1, 1)))
"""Plans from the largest to the smallest, of which the first that fits is taken."""


def seconds_of(text: str) -> float:
    """Return the seconds of a time such as ``90s``, ``30m``, ``2h`` or ``1h30m``.

    Raises:
        UserError: The text is not a time above zero.
    """
    number = r"(\d+(?:\.\d+)?)"
    parts = re.fullmatch("".join(f"(?:{number}{unit})?" for unit in _UNITS), text)
    numbers = zip(parts.groups(), _UNITS.values(), strict=True) if parts else ()
    seconds = sum(float(digits or 0) * size for digits, size in numbers)
    if not seconds:
        raise UserError(f"--budget {brief(text)[1:-1]}: expected a time such as 90s, 30m, 2h or 1h30m.")
    return seconds


def time_of(seconds: float) -> str:
    """Return a time that `seconds_of` reads, rounded up: to ten seconds below ten minutes, else to minutes."""
    unit = 10 if seconds < 600 else 60
    minutes, rest = divmod(max(1, math.ceil(seconds / unit)) * unit, 60)
    parts = {"h": minutes // 60, "m": minutes % 60, "s": rest}
    return "".join(f"{number}{name}" for name, number in parts.items() if number)


class Sizes(NamedTuple):
    """Optimizer steps of a run, samples of a step and of each split, and classes."""

    steps: int
    batch: int
    train: int
    val: int
    test: int
    classes: int

    @classmethod
    def of(cls, cell: Cell) -> "Sizes":
        """Read the labels of the data of a cell, and plan its training; no image is decoded.

        Raises:
            UserError: The data are missing or damaged.
        """
        data: Any = data_of(cell.tree)
        data.setup("fit")
        batch = data.batch_size * int(cell.tree.get("trainer", {}).get("accumulate_grad_batches") or 1)
        batch *= cell.devices
        steps = data.steps or math.ceil(data.plan.samples_drawn / batch)
        train, val, test = (len(data.samples(split)) for split in ("train", "val", "test"))
        return cls(steps, batch, train, val, test, data.num_classes)


class Cost(NamedTuple):
    """Seconds of a run of the search, of a tested run, and of a step in them."""

    search: float
    final: float
    step: float = 0.0

    @classmethod
    def of(cls, results: Mapping[str, Any], sizes: Sizes) -> "Cost":
        """Return the expected times of whole runs, by the results of a run of `STEPS` steps with one validation.

        A tested run validates four times. What a training needs besides its steps counts as validation.
        """
        training, rate = float(results["fit_seconds"]), results.get("images_per_second")
        step = sizes.batch / rate if rate else training / STEPS
        check = max(training - STEPS * step, 0.0)
        search = max(spent([results]) - training, 0.0) + sizes.steps * step + check
        return cls(search, search + 3 * check + check * sizes.test / sizes.val, step)


def spent(runs: Iterable[Mapping[str, Any]]) -> float:
    """Return the seconds that runs took, by their results; a resumed run has the time of its training alone."""
    return sum(float(results.get("cell_seconds") or results["fit_seconds"]) for results in runs)


def tiers(most: Tier) -> list[Tier]:
    """Return the plans of `TIERS` with no number larger than in ``most``."""
    return list(dict.fromkeys(Tier(*map(min, tier, most)) for tier in TIERS))


@dataclass(frozen=True)
class Budget:
    """Time of a comparison, and the cost of its methods.

    Attributes:
        seconds: Time for all of it.
        spent: Seconds that the measurement took.
        costs: Cost by the label of the method, in the order of the config.
        steps: Optimizer steps of a run.
    """

    seconds: float
    spent: float
    costs: Mapping[str, Cost]
    steps: int

    def expected(self, tier: Tier) -> float:
        """Return the expected seconds of the measurement and of a plan."""
        return self.spent + tier.seconds(self.costs.values())

    def fitting(self, most: Tier) -> Tier:
        """Return the largest plan that fits into `SPARE` of the time; one run of each method may fill all of it.

        Raises:
            UserError: Not even that fits; the message has what does.
        """
        left, plans = self.seconds - self.spent, tiers(most)
        fits = [tier for tier in plans if self.expected(tier) - self.spent <= SPARE * left]
        if fits or self.expected(plans[-1]) <= self.seconds:
            return [*fits, plans[-1]][0]
        times = ", ".join(f"{method} {duration(cost.final)}" for method, cost in self.costs.items())
        whole, names, last = sum(cost.final for cost in self.costs.values()), list[str](), left
        step = sum(cost.step for cost in self.costs.values())
        steps = int(self.steps - (whole - left) / step) if step else 0
        for name, cost in self.costs.items():
            if cost.final <= last:
                names.append(name)
                last -= cost.final
        ways = [f"--budget {time_of(self.expected(plans[-1]))}"]
        ways += [f"--data.steps {steps // 10 * 10}"] * (steps >= FEWEST)
        ways += [f"--methods {shlex.join(names)}"] * (len(names) > 1)
        what = (
            f"The budget is too small: one run of each of the {len(self.costs)} methods takes about {duration(whole)}"
        )
        raise UserError(f"{what} ({times}).", f"What fits: {', or '.join(ways)}")

    def seeds(self, left: float, runs: Mapping[str, Sequence[float]], most: int) -> int:
        """Return the number of seeds of the tests that fit into `LAST_SPARE` of the time after a search, at least one.

        Args:
            left: Seconds that the search has left.
            runs: Seconds that its runs took, by method, which replace the expected ones.
            most: Largest number.
        """
        one = sum(cost.final for cost in self.costs.values())
        one += sum(median(took) - self.costs[method].search for method, took in runs.items() if took)
        return max(1, min(most, int(LAST_SPARE * left / max(one, 1e-9))))
