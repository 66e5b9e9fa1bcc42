"""Options declared once: fields of a class, whose docstrings are the help and whose types are checked here.

    class LoRA(Adapter):
        rank: Annotated[int, Positive] = 32
        '''Rank r.'''  # in double quotes: the help

Bases of described objects and `Declared` make a keyword-only dataclass of each of their subclasses.
The types of options and words that several commands have are at the end.
"""

import inspect
import math
import shlex
import sys
import types
from abc import ABCMeta
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from randlora_pl.utils.errors import UserError, brief, near
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.run_files import find_adapter, find_run, find_runs

LARGEST = 2**63 - 1
"""Largest whole number of an option; ``float`` and tensors would overflow."""

OTHER_NAMES = {"r": "rank", "lora_r": "rank", "lora_alpha": "alpha", "randlora_alpha": "alpha", "bs": "batch_size"}
OTHER_NAMES |= {"lora_dropout": "dropout", "target_modules": "targets"}
OTHER_NAMES |= {"lr": "learning_rate", "max_steps": "steps", "max_epochs": "epochs"}
"""Options as other programs name them, and ours."""


@dataclass(frozen=True)
class Check:
    """Condition on a value, as in ``Annotated[int, Positive]``.

    Attributes:
        holds: Function that returns True for a valid value of the annotated type.
        wanted: Description of a valid value, for messages.
    """

    holds: Callable[[Any], bool]
    wanted: str

    def __repr__(self) -> str:
        return self.wanted  # in the help of a plain LightningCLI


Positive = Check(lambda value: 0 < value < math.inf, "a positive number")
Finite = Check(math.isfinite, "a finite number")
NotNegative = Check(lambda value: 0 <= value < math.inf, "0 or a positive number")
Probability = Check(lambda value: 0 <= value < 1, "a number from 0 to below 1")

Share = Check(lambda value: 0 < value < 1, "a number between 0 and 1")


def at_least(least: float) -> Check:
    """Return the condition that a number has at least this value."""
    return Check(lambda value: value >= least, f"a number of at least {least:,}")


def between(least: float, most: float) -> Check:
    """Return the condition that a number is in this range, the ends included."""
    return Check(lambda value: least <= value <= most, f"a number from {least:,} to {most:,}")


Fraction = between(0, 1)

Count = Annotated[int, Positive]
"""A positive whole number."""


def is_number(value: object) -> bool:
    """Return True for a number; the truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class Misfit(NamedTuple):
    """Part of a value that does not have its type.

    Attributes:
        name: Name of the part, such as ``layers.fc1[1]``.
        value: The part.
        wanted: Description of a valid value, empty if the part is missing.
    """

    name: str
    value: Any
    wanted: str

    def __str__(self) -> str:
        return f"{self.name} is {brief(self.value, 40)}" if self.wanted else f"{self.name} is missing"


_PLAIN = {bool: "true or false", str: "a text", int: "a whole number", float: "a number", type(None): "null"}


def misfit(value: Any, kind: Any, name: str = "") -> Misfit | None:
    """Return the first part of a value that does not have its type, or None.

    Whole numbers are numbers, and lists are tuples, as in JSON.

    Args:
        value: The value of an option, or of a file.
        kind: A type, union, literal, list, tuple, dictionary, or typed dictionary (further keys are allowed). Checks of
            ``Annotated`` are applied. A value of a type that is not known here is not checked.
        name: Name of the value.
    """
    origin, inner = get_origin(kind), get_args(kind)
    prefix = f"{name}." if name else ""
    if kind is Any or kind is inspect.Parameter.empty or isinstance(kind, str):
        return None
    if origin is Annotated:
        return _of_checked(value, inner[0], [each for each in inner[1:] if isinstance(each, Check)], name)
    if origin in (Union, types.UnionType):
        return _of_union(value, inner, name)
    if origin is NotRequired:
        return misfit(value, inner[0], name)
    if origin is Literal:
        fits = any(value == each and type(value) is type(each) for each in inner)
        return None if fits else Misfit(name, value, _either(map(str, inner)))
    if is_typeddict(kind):
        if not isinstance(value, dict):
            return Misfit(name, value, "a mapping")
        if missing := sorted(kind.__required_keys__ - value.keys()):
            return Misfit(prefix + missing[0], None, "")
        hints = get_type_hints(kind, include_extras=True)
        parts = [(value[key], each, prefix + key) for key, each in hints.items() if key in value]
    elif origin is dict:
        if not isinstance(value, dict):
            return Misfit(name, value, "a mapping such as {pattern: value}")
        parts = [(each, inner[1], f"{prefix}{key}") for key, each in value.items()]
    elif origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return Misfit(name, value, f"a list such as {'[0.5,1]' if _outer(inner[0]) in (int, float) else '[a,b]'}")
        kinds = [inner[0]] * len(value) if origin is list or inner[1:] == (...,) else inner
        if len(kinds) != len(value):
            return Misfit(name, value, f"a list of {len(kinds)}")
        parts = [(each, part, f"{name}[{place}]") for place, (each, part) in enumerate(zip(value, kinds, strict=True))]
    elif kind in _PLAIN:
        fits = isinstance(value, int | float if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        fits = fits and not (isinstance(value, int) and abs(value) > LARGEST)
        return None if fits else Misfit(name, value, _PLAIN[kind])
    else:
        fits = not inspect.isclass(kind) or isinstance(value, kind)
        return None if fits else Misfit(name, value, f"an object of {kind.__name__}")
    return next((wrong for part in parts if (wrong := misfit(*part))), None)


def _of_checked(value: Any, kind: Any, checks: list[Check], name: str) -> Misfit | None:
    """Return the misfit of a value and its checks; 2.5 and 0 both miss "a positive whole number"."""
    wrong = misfit(value, kind, name)
    if wrong is None and all(check.holds(value) for check in checks):
        return None
    if wrong is not None and (kind not in _PLAIN or not checks):
        return wrong
    wanted = " and ".join(check.wanted for check in checks)
    return Misfit(name, value, wanted.replace("number", "whole number") if kind is int else wanted)


def _of_union(value: Any, kinds: tuple[Any, ...], name: str) -> Misfit | None:
    """Return the misfit of the alternatives whose outer type fits, else of all: 0 misses "a positive number" alone."""
    misfits = {kind: misfit(value, kind, name) for kind in kinds}
    wrong = {kind: each for kind, each in misfits.items() if each is not None}
    if len(wrong) < len(misfits):
        return None
    closest = [kind for kind in wrong if type(value) is _outer(kind)]
    closest = closest or [kind for kind in wrong if kind not in (None, type(None))]
    if len(closest) == 1:
        return wrong[closest[0]]
    wanted = (literal_words(kind) if get_origin(kind) is Literal else [wrong[kind].wanted] for kind in closest)
    return Misfit(name, value, _either(each for some in wanted for each in some))


def _either(choices: Iterable[str]) -> str:
    """Return the choices as ``a, b or c``."""
    *others, last = dict.fromkeys(choices)
    return f"{', '.join(others)} or {last}" if others else last


def _outer(kind: Any) -> Any:
    """Return the type of a value of an annotation, whatever is inside."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return get_origin(kind) or kind


def literal_words(kind: Any) -> list[str]:
    """Return the texts that a type allows by name, in ``Literal[...]``."""
    own = get_args(kind) if get_origin(kind) is Literal else ()
    return [each for each in own if isinstance(each, str)] or [
        word for part in get_args(kind) for word in literal_words(part)
    ]


def option_types(cls: type) -> dict[str, Any]:
    """Return the types of a class's options by name, with their checks."""
    types: dict[str, Any] = {each.name: each.type for each in fields(cls) if each.init}
    for name, kind in types.items():
        if isinstance(kind, str):  # in quotes: evaluated where it stands
            home = next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))
            try:
                types[name] = eval(kind, vars(sys.modules[home.__module__]))
            except NameError:  # imported for type checkers only
                types[name] = Any
    return types


def check_options(made: Any) -> None:
    """Refuse an object with an option that does not have its type.

    Raises:
        UserError: The first such option.
    """
    for name, kind in option_types(type(made)).items():
        if wrong := misfit(getattr(made, name), kind, name):
            hint = near(wrong.value, literal_words(kind), 1) if isinstance(wrong.value, str) else ""
            default = getattr(type(made), name, None)
            example = f", such as {name}={type(default).__name__}()" if isinstance(type(default), NamedOptions) else ""
            raise UserError(f"{type(made).__name__}: {wrong}.{hint}", f"Set {wrong.wanted}{example}.")


def check_declaration(cls: type) -> None:
    """Refuse a class with options that a dataclass would silently ignore.

    Raises:
        TypeError: It has a constructor, or sets an inherited option without a type.
    """
    if "__init__" in vars(cls):
        raise TypeError(f"{cls.__name__} has a constructor. Declare its options in the class: `rank: int = 4`.")
    own = vars(cls).get("__annotations__", {})
    bases = [base for base in cls.__mro__[1:] if is_dataclass(base)]
    inherited = {each.name for base in bases for each in fields(base)}
    if plain := [name for name in vars(cls) if name in inherited and name not in own]:
        raise TypeError(f"{cls.__name__}.{plain[0]} is an option: give its type, too, as in `{plain[0]}: int = 4`.")


class NamedOptions(ABCMeta):
    """Metaclass whose classes show their options in `help`, own ones first, and name near ones if one is unknown."""

    def __init__(cls, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if is_dataclass(cls):
            order = [name for base in cls.__mro__ for name in vars(base).get("__annotations__", ())]
            types, (_, *parameters) = option_types(cls), inspect.signature(cls.__init__).parameters.values()
            parameters.sort(key=lambda option: (option.kind, order.index(option.name)))
            cls.__signature__ = inspect.Signature([each.replace(annotation=types[each.name]) for each in parameters])

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


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
class Declared(metaclass=NamedOptions):
    """Base of tasks, data modules and callbacks with options: each subclass becomes a mutable keyword-only dataclass.

    Objects are equal to themselves alone, so that modules stay hashable. An annotated attribute that is not an option
    is a ``ClassVar``. ``__post_init__`` of the base of tasks and of data calls Lightning's constructor.
    """

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        check_declaration(cls)
        dataclass(kw_only=True, eq=False, repr=False)(cls)

    def __post_init__(self) -> None:
        """Check the options by their types; a subclass with further work calls this first."""
        check_options(self)


def check_rank_or_error(rank: int | None, error: float | None) -> None:
    """Raise a `UserError` unless exactly one of rank and error is given, in its range."""
    if (rank is None) == (error is None):
        raise UserError(
            "Pass either --rank K or --error E (relative, in the Frobenius norm), for example --error 0.05."
        )
    if rank is not None and rank < 1:
        raise UserError(f"--rank is {rank}. Pass a positive integer.")
    if error is not None and not 0 <= error < 1:
        raise UserError(f"--error is {error}. Pass a relative error of at least 0 and below 1, for example 0.05.")


@dataclass(frozen=True)
class Option:
    """Part of a type that explains and converts a parameter, as in ``Annotated[Path, Option("DIR")]``.

    Attributes:
        value: Name of the value on the help page; by default it follows from the type.
        help: Explanation, unless the docstring of the command has one.
        read: Function that converts the typed value.
        names: How the option is typed, if not like the parameter.
        repeated: True if the option is typed again for each value of a sequence.
    """

    value: str = ""
    help: str = ""
    read: Callable[[Any], Any] | None = None
    names: tuple[str, ...] = ()
    repeated: bool = False


Adapter = Annotated[Path, Option("ADAPTER", "Adapter folder or .safetensors file, or a run", find_adapter)]
Run = Annotated[Path, Option("RUN", "Run folder, or runs/NAME for its newest run", find_run)]
Runs = Annotated[Sequence[Path], Option("RUN", "Run folders or adapters", find_runs)]
Folder = Annotated[Path, Option("DIR")]
File = Annotated[Path, Option("FILE")]
Device = Annotated[str, Option("DEVICE", "cpu, cuda, mps ..., auto is the best available")]
Overwrite = Annotated[bool, Option(help="Replace the output if it exists")]
Json = Annotated[bool, Option(help="Print the result as JSON")]
Root = Annotated[
    str | None,
    Option("PATH", "Folder with the data (default: the user's data folder)", names=("--root", "--data.root")),
]
Weights = Annotated[
    Sequence[Path], Option("FILE", "Weights file of a base model that this machine does not have", repeated=True)
]
"""For `register_weights`."""


class Words(list[str]):
    """The words after the name of a command. They are not parsed if the function has no other parameter."""

    def command(self, name: str, *without: str) -> str:
        """Return the typed command with the modules that it imports, without some options of one value."""
        typed = list(self)
        for option in without:
            if option in typed:
                at = typed.index(option)
                del typed[at : at + 2]
        return shlex.join(["randlora-pl", *name.split(), *typed]) + import_words()


class Rest(list[str]):
    """The words that are not options of the command."""
