"""Objects that are described by their options; an option can itself be an object, or a list of objects."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, dataclass_transform, get_args

from randlora_pl.utils.adapter_schema import OTHER_VERSION
from randlora_pl.utils.errors import UserError, brief, errors_in
from randlora_pl.utils.options import NamedOptions, check_declaration, check_options
from randlora_pl.utils.own_classes import path_of


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False, field_specifiers=(field,))
class Described(metaclass=NamedOptions):
    """Base of `Adapter`: a frozen dataclass of options, which give the same object again.

    Every subclass declares its own options as fields. An object is equal to itself alone, and holds its options alone;
    anything else is a property.
    """

    neutral: ClassVar[tuple[str, ...]] = ()
    """Options that do not change the update, as the memory that it may take."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        check_declaration(cls)
        dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)

    def __post_init__(self) -> None:
        """Check the options by their types; a subclass with further checks calls this first."""
        check_options(self)

    def __repr__(self) -> str:
        return f"{self.method()}({', '.join(f'{name}={value!r}' for name, value in self._values().items())})"

    @classmethod
    def method(cls) -> str:
        """Return the method's name in tables and on the command line."""
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
        return {"method": path_of(type(self)), "options": self.options()}

    def identity(self) -> dict[str, Any]:
        """Return `describe` without `neutral` options; equal identities mean equal adapters."""
        values = self._values()
        nested = {name: _mapped(values[name], lambda each: each.identity()) for name in self.nested_options()}
        options = {name: value for name, value in (self.options() | nested).items() if name not in self.neutral}
        return {"method": path_of(type(self)), "options": options}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some options changed."""
        return type(self)(**(self._values() | changes))

    def nested(self) -> list[Self]:
        """Return the adapters that are options of this one."""
        adapters: list[Self] = []
        for name in self.nested_options():
            _mapped(getattr(self, name), adapters.append)
        return adapters

    def leaves(self) -> list[Self]:
        """Return the adapters inside this one, at any depth, that contain no others; itself if it contains none."""
        return [leaf for each in self.nested() for leaf in each.leaves()] or [self]

    def exchanged(self, old: Self, new: Self) -> Self:
        """Return a copy with ``new`` in place of ``old``, which is one of the `leaves`."""
        if self is old:
            return new
        names = self.nested_options()
        changes = {name: _mapped(getattr(self, name), lambda each: each.exchanged(old, new)) for name in names}
        return self.replace(**changes) if changes else self

    def _values(self) -> dict[str, Any]:
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


def make(
    kinds: Mapping[str, type[Described]],
    description: Any,
    source: object,
    hint: str = OTHER_VERSION,
    find: Callable[[str], type[Described]] | None = None,
) -> Described:
    """Return the object that `Described.describe` described.

    Args:
        kinds: Classes by their names in files.
        description: ``{"method": ..., "options": {...}}`` of JSON values, from a file.
        source: Source of the description, for messages.
        hint: End of the message for an option of another type.
        find: Function that returns a class by its import path, or raises an error.

    Raises:
        UserError: The name or an option is unknown, or has another type; the message has ``source``.
    """
    if not isinstance(description, dict) or not isinstance(description.get("options"), dict):
        raise UserError(f"{source}: {brief(description, 60)} describes nothing that this version has; {hint}.")
    method, options = description.get("method"), dict(description["options"])
    if isinstance(method, str) and method not in kinds and "." in method and find is not None:
        with errors_in(source):
            kinds = {**kinds, method: find(method)}
    if not isinstance(method, str) or method not in kinds:
        raise UserError(f"{source}: method {method!r} is unknown. This version has {', '.join(kinds)}.")
    kind = kinds[method]
    for name in kind.nested_options():
        if name in options:
            value = options[name]
            inner = [make(kinds, each, source, hint, find) for each in (value if isinstance(value, list) else [value])]
            options[name] = inner if isinstance(value, list) else inner[0]
    try:
        return kind(**options)
    except UserError as error:
        raise UserError(f"{source}: {error.what.removesuffix('.')}; {hint}.") from None
    except Exception as error:  # a class of a user may raise anything
        raise UserError(f"{source}: {method} does not accept these options ({' '.join(str(error).split())}).") from None
