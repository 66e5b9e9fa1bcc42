"""Defaults of tasks: the learning rate of a method, and the classes that a task accepts."""

from collections.abc import Sequence
from typing import Any

from randlora_pl.adapters import Adapter
from randlora_pl.utils.errors import UserError

TOWERS, IMAGES, TEXTS = 0, 1, 2
"""Places in `Adapter.learning_rates`: both towers, an image tower, a language model."""


def default_learning_rate(adapter: Adapter, place: int) -> float:
    """Return the default learning rate of a method: the lowest of the methods inside it.

    Raises:
        UserError: A method from outside has none.
    """
    leaves = adapter.leaves()
    if alone := [leaf.method() for leaf in leaves if leaf.learning_rates is None]:
        raise UserError(f"{alone[0]} has no learning rate of its own. Set it: --model.learning_rate 1e-3, for example.")
    rates: list[float] = [leaf.learning_rates[place] for leaf in leaves]
    return min(rates)


def check_classes(task: Any, classnames: Sequence[str], scores: bool = False) -> None:
    """Refuse fewer than two classes, and others than a task was built for; with ``scores`` there may be none."""
    if task.backbone is not None and list(classnames) != task.classnames:
        there, here = (
            f"{len(names)} classes {list(names[:3])}" if names else "scores" for names in (task.classnames, classnames)
        )
        raise UserError(f"the task was built for {there}, the data has {here}. Create a new task.")
    if len(classnames) < (0 if scores and not classnames else 2):
        raise UserError(f"there is only the class {list(classnames)}; a classifier needs two or more.")
