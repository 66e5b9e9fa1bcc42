"""Objects that the options of their constructor describe; an option may be such an object, or a list of them."""

import inspect
from collections.abc import Callable
from typing import Any, Self, get_args

from randlora_pl.utils.signatures import NamedOptions


class Described(metaclass=NamedOptions):
    """Base of `Adapter`: each option of the constructor is an attribute, and the options give the same object again."""

    def __repr__(self) -> str:
        return f"{self.method()}({', '.join(f'{name}={value!r}' for name, value in self._values().items())})"

    @classmethod
    def method(cls) -> str:
        """Return the method's name in files, tables and on the command line."""
        return cls.__name__

    @classmethod
    def nested_options(cls) -> list[str]:
        """Return the names of the options that take an adapter or a list of adapters, by their annotations."""
        return [name for name, option in inspect.signature(cls).parameters.items() if _takes_nested(option.annotation)]

    def options(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON values, sufficient to create the same adapter."""
        return {name: _mapped(value, lambda each: each.describe()) for name, value in self._values().items()}

    def describe(self) -> dict[str, Any]:
        """Return ``{"method": ..., "options": {...}}``, as in ``adapter_config.json``."""
        return {"method": self.method(), "options": self.options()}

    def identity(self) -> dict[str, Any]:
        """Return `describe` without options that do not change the update; equal identities mean equal adapters."""
        values = self._values()
        nested = {name: _mapped(values[name], lambda each: each.identity()) for name in self.nested_options()}
        return {"method": self.method(), "options": self.options() | nested}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some options changed."""
        return type(self)(**(self._values() | changes))

    def leaves(self) -> list[Any]:
        """Return the adapters inside this one, at any depth, that contain no others; itself if it contains none."""
        found: list[Any] = []
        for name in self.nested_options():
            _mapped(getattr(self, name), lambda each: found.extend(each.leaves()))
        return found or [self]

    def exchanged(self, old: "Described", new: "Described") -> Any:
        """Return a copy with ``new`` in the place of ``old``, which is one of the `leaves`."""
        if self is old:
            return new
        names = self.nested_options()
        changes = {name: _mapped(getattr(self, name), lambda each: each.exchanged(old, new)) for name in names}
        return self.replace(**changes) if changes else self

    def _values(self) -> dict[str, Any]:
        """Return the options by name, as they were given."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}


def _takes_nested(kind: Any) -> bool:
    """Return True if a type, or a part of it, is a described object: ``Adapter | None``, ``list[Adapter]``."""
    if get_args(kind):
        return any(map(_takes_nested, get_args(kind)))
    return isinstance(kind, type) and issubclass(kind, Described)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return the value of an option with each described object in it changed."""
    if isinstance(value, list | tuple) and any(isinstance(each, Described) for each in value):
        return [_mapped(each, change) for each in value]
    return change(value) if isinstance(value, Described) else value
