"""Default learning rates of methods."""

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
