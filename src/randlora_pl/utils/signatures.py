"""Signatures of constructors that pass ``**options`` on to their bases."""

import inspect
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

from randlora_pl.utils.errors import near

OTHER_NAMES = {"r": "rank", "lora_r": "rank", "lora_alpha": "alpha", "randlora_alpha": "alpha", "bs": "batch_size"}
OTHER_NAMES |= {"lora_dropout": "dropout", "target_modules": "targets"}
OTHER_NAMES |= {"lr": "learning_rate", "max_steps": "steps", "max_epochs": "epochs"}
"""Options as other programs name them, and ours."""


def whole_signature(kind: type) -> inspect.Signature:
    """Return the signature of a class, with the options that its constructor passes on to its bases.

    Options named in the class attribute ``fixed_options`` are left out: the constructor sets them itself.
    """
    found: dict[str, inspect.Parameter] = {}
    for each in kind.__mro__:
        if "__init__" not in vars(each):
            continue
        _, *own = _signature(vars(each)["__init__"]).parameters.values()
        for option in own:
            if option.name not in getattr(kind, "fixed_options", ()) and option.kind is not option.VAR_KEYWORD:
                found.setdefault(option.name, option)
        if not any(option.kind is option.VAR_KEYWORD for option in own):
            break
    fields = [name for each in kind.__mro__ for name in vars(each).get("__annotations__", ()) if name in found]
    own_first = {name: fields.index(name) for name in fields}
    return inspect.Signature(sorted(found.values(), key=lambda option: (option.kind, own_first.get(option.name, -1))))


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function, with annotations that are texts evaluated where that is possible."""
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, AttributeError, TypeError, SyntaxError):  # names for type checkers only
        return inspect.signature(function)


class NamedOptions(ABCMeta):
    """Metaclass whose classes show a `whole_signature` in `help`, and name near options if one is unknown."""

    def __init__(cls, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        cls.__signature__ = whole_signature(cls)

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
