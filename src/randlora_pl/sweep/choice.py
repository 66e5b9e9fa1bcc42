"""The rule of a search of learning rates: what it searches, its best candidates, and the part of a grid to try."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from randlora_pl.adapters import methods
from randlora_pl.run.options.compose import flatten
from randlora_pl.run.options.validate import rate_name
from randlora_pl.sweep.description import SweepConfig
from randlora_pl.sweep.trial_config import trial_config
from randlora_pl.utils.errors import errors_in

Key = TypeVar("Key", bound=Any)


def best_of(scores: Mapping[Key, float], count: int) -> list[Key]:
    """Return the candidates of the highest scores, the best first; of equal ones the lowest."""
    return sorted(scores, key=lambda key: (-scores[key], key))[:count]


def climb(grid: Sequence[float], start: float, score: Callable[[float], float | None]) -> list[float]:
    """Return the part of a grid to try so far: around a start, and on while the best lies at an end of the part.

    Args:
        grid: Positive values in rising order.
        start: Value to begin at: the value of the grid that is nearest by ratio and its two neighbours.
        score: The higher the better, None where it is not known yet; of equal ones the lowest value counts.

    Returns:
        A run of the grid; it only ever grows as scores become known, until its best has a neighbour on both sides or
        is an end of the grid.
    """
    middle = min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / start)))
    low, high = max(middle - 1, 0), min(middle + 1, len(grid) - 1)
    while True:
        part = list(grid[low : high + 1])
        scores = [found for value in part if (found := score(value)) is not None]
        if len(scores) < len(part):
            return part
        best = low + scores.index(max(scores))
        if best == low > 0:
            low -= 1
        elif best == high < len(grid) - 1:
            high += 1
        else:
            return part


def searched(description: SweepConfig, method: str, alphas: list[float]) -> tuple[str, ...]:
    """Return the axes of a method's search: a linear probe has the head's rate only, and not all methods an alpha.

    The heads of tasks on texts have the rate of the adapter by default.
    """
    model = description.models[(description.methods[method].get("models") or list(description.models))[0]]
    with errors_in(f"methods.{method}"):
        tree = trial_config(model, description.methods[method], description.options, None, untrained=False)
    name = str(flatten(tree)["model.adapter"]).rpartition(".")[2]
    rate = rate_name(name, tree["model"]["class_path"].rpartition(".")[2])
    kind = getattr(methods, name, None)
    return (rate, "alpha") if alphas and kind and "alpha" in inspect.signature(kind).parameters else (rate,)
