"""Signatures of classes whose options are fields."""

import inspect
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

from randlora_pl.utils.errors import near

OTHER_NAMES = {"r": "rank", "lora_r": "rank", "lora_alpha": "alpha", "randlora_alpha": "alpha", "bs": "batch_size"}
OTHER_NAMES |= {"lora_dropout": "dropout", "target_modules": "targets"}
OTHER_NAMES |= {"lr": "learning_rate", "max_steps": "steps", "max_epochs": "epochs"}
"""Options as other programs name them, and ours."""


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function, with annotations that are texts evaluated where that is possible."""
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, AttributeError, TypeError, SyntaxError):  # names for type checkers only
        return inspect.signature(function)


class NamedOptions(ABCMeta):
    """Metaclass whose classes show their own options first in `help`, and name near options if one is unknown."""

    def __init__(cls, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _, *found = _signature(cls.__init__).parameters.values()  # type: ignore[misc]
        fields = [name for each in cls.__mro__ for name in vars(each).get("__annotations__", ())]
        names = {name: place for place, name in reversed([*enumerate(fields)])}
        cls.__signature__ = inspect.Signature(
            sorted(found, key=lambda option: (option.kind, names.get(option.name, -1)))
        )

    def __call__(cls, *args: Any, **options: Any) -> Any:
        """Create an object.

        Raises:
            TypeError: An option is unknown, or a required one is missing.
        """
        try:
            return super().__call__(*args, **options)
        except TypeError as error:
            known = inspect.signature(cls).parameters
            for name in (name for name in options if name not in known):
                hint = near(OTHER_NAMES.get(name, name), known, 1) or f" Its options are {', '.join(known)}."
                raise TypeError(f"{cls.__name__} has no option {name!r}.{hint}") from error
            raise
