"""Classes that a user or an installed package adds to this program: modules that the user imports, and registries.

No other modules are imported: files of runs and adapters import nothing by themselves.
"""

import re
import sys
import traceback
from collections.abc import Collection
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from randlora_pl.utils.errors import UserError, brief, first_line

_named: dict[str, ModuleType] = {}
"""Modules that the user has named in this process since the last command began, in order."""


def forget_named() -> None:
    """Forget the modules that the user has named: a command inherits none of an earlier one in the same process."""
    _named.clear()


def import_named(name: str, where: str = "--import") -> ModuleType:
    """Import a module of the user, from the working folder or among the installed packages.

    Args:
        name: Dotted name of the module.
        where: Option or place with its name, for messages.

    Raises:
        UserError: The module does not exist, is hidden by another one, or its code fails.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        raise UserError(f"{where}: {brief(name)} is not the name of a module. Give mine for the file mine.py.")
    top, folder = name.partition(".")[0], Path.cwd()
    if not {"", str(folder)} & set(sys.path):  # last, where it hides no installed package
        sys.path.append(str(folder))
    own = next((file for file in (folder / f"{top}.py", folder / top / "__init__.py") if file.is_file()), None)
    spec = find_spec(top) if own is not None and top not in sys.modules else None
    other = spec.origin if spec is not None else getattr(sys.modules.get(top), "__file__", None)
    if own is not None and other is not None and own.resolve() != Path(other).resolve():
        raise UserError(f"{where}: {own.name if own.parent == folder else top} is hidden by {other}. Rename it.")
    _named[name] = import_or_refuse(name, where)
    return _named[name]


def import_or_refuse(name: str, where: str) -> ModuleType:
    """Import a module; convert its absence, and what its code raises, to a `UserError` of one or two lines."""
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{where}: the module {name} is neither in the working folder nor among the installed packages."
            ) from error
        frame = next((each for each in reversed(traceback.extract_tb(error.__traceback__)) if each.line), None)
        place = f" ({frame.filename}, line {frame.lineno})" if frame and "importlib" not in frame.filename else ""
        what = f"{type(error).__name__}: {first_line(error)}{place}"
        raise UserError(f"{where}: importing {name} fails: {what}.") from error


def is_importable(top: str) -> bool:
    """Return True if a name without dots is a module or package, also of the working folder; nothing is imported."""
    if not top:  # of a pattern such as .*mlp
        return False
    try:
        known = find_spec(top) is not None
    except (ImportError, ValueError):
        known = top in sys.modules
    return known or any(Path(f"{top}{end}").exists() for end in ("", ".py"))


def named_modules() -> dict[str, ModuleType]:
    """Return the modules that the user has named, by name."""
    return dict(_named)


def import_words() -> str:
    """Return `` --import mine`` for each module that the user has named, as the end of a command; else nothing."""
    return "".join(f" --import {name}" for name in _named)


PACKAGE = "randlora_pl"
LAB = f"{PACKAGE}.lab."  # its classes are found by their import paths, like a user's own, without --import
Kind = TypeVar("Kind", bound=object)


def is_outside(path: str) -> bool:
    """Return True if an import path is of a user or another package, or of `lab`, which other rooms do not know."""
    return not path.startswith(f"{PACKAGE}.") or path.startswith(LAB)


def is_own(kind: type) -> bool:
    """Return True if a class belongs to a user or another package, or to `lab`."""
    return is_outside(f"{kind.__module__}.")


def path_of(kind: type) -> str:
    """Return the name of a class in files: its import path, or the name alone for a class of this program."""
    return f"{kind.__module__}.{kind.__qualname__}" if is_own(kind) else kind.__name__


def parent_among(kind: type, known: Collection[str]) -> str | None:
    """Return the nearest among a class and its parents whose name this program knows; None if there is none."""
    return next((each.__name__ for each in kind.__mro__ if not is_own(each) and each.__name__ in known), None)


def check_importable(kind: type) -> None:
    """Refuse a class that another process could not import by its path.

    Raises:
        UserError: The class is in the main program, or not at the top level of its module.
    """
    name, module = kind.__qualname__, kind.__module__
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is kind:
        return
    place = "the main program" if module == "__main__" else f"{module}, but not at its top level"
    raise UserError(
        f"{kind.__name__} is defined in {place}, so a file of it could not be loaded again.",
        f"Move it to the top level of a module, and import it: from mine import {kind.__name__}",
    )


class Registry:
    """Registered classes, classes in modules that the user has named, and entry points of installed packages.

    Args:
        room: Package of this program with the classes of this kind. ``randlora_pl.ROOM`` is the entry-point group.
        what: Kind of the classes in messages.
    """

    def __init__(self, room: str, what: str) -> None:
        self.group, self.what = f"{PACKAGE}.{room}", what
        self._classes: dict[str, type] = {}

    def register(self, kind: type[Kind], base: type[Kind], built_in: Collection[str]) -> None:
        """Add a class.

        Args:
            kind: The class.
            base: Its required base class.
            built_in: Names of the classes of this program.

        Raises:
            UserError: It has another base, or the name of a class of this program.
        """
        self._classes[path_of(kind)] = self._checked(kind, base, built_in)

    def find(self, path: str, base: type[Kind], built_in: Collection[str]) -> type[Kind]:
        """Return a class by its import path. Nothing is imported but an entry point.

        Args:
            path: Import path.
            base: Required base class.
            built_in: Names of the classes of this program.

        Raises:
            UserError: The class is not known, or has another base or a taken name.
        """
        module, _, name = path.rpartition(".")
        kind = self._classes.get(path)
        if kind is None and (there := named_modules().get(module)) is not None:
            kind = getattr(there, name, None)
            if kind is None:
                raise UserError(f"The module {module} has no {self.what} {name}.")
        if kind is None and (path.startswith(LAB) or path in _entry_paths(self.group, tuple(sys.path))):
            kind = getattr(import_or_refuse(module, f"The entry point {path}"), name, None)
        if kind is None and not module:
            raise UserError(f"{path!r} is not the import path of a {self.what}.", "The file is damaged or was changed.")
        if kind is None:
            raise UserError(
                f"The {self.what} {path} is not part of this program, and a file imports nothing by itself.",
                f"Add --import {module} if you trust it. In Python, call {self.group}.register({name}).",
            )
        return self._checked(kind, base, built_in)

    def paths(self) -> list[str]:
        """Return the import paths of the registered classes and of the entry points."""
        return [*self._classes, *_entry_paths(self.group, tuple(sys.path))]

    def _checked(self, kind: object, base: type[Kind], built_in: Collection[str]) -> type[Kind]:
        """Return a class if it has the required base and a free name."""
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise UserError(f"{getattr(kind, '__name__', kind)} is not a subclass of {base.__name__}.")
        if is_own(kind) and kind.__name__.lower() in {name.lower() for name in built_in}:
            raise UserError(f"{path_of(kind)} has the name of a {self.what} of this program. Rename it.")
        return kind


@cache  # reads a file of every installed package: 20 ms
def _entry_paths(group: str, path: tuple[str, ...]) -> set[str]:
    from importlib.metadata import entry_points

    return {entry.value.replace(":", ".") for entry in entry_points(group=group)}


METHODS, TASKS = Registry("adapters", "method"), Registry("tasks", "task")


def is_registered(path: str) -> bool:
    """Return True if an import path is of a registered class, of an entry point or of `lab`."""
    return path.startswith(LAB) or path in METHODS.paths() or path in TASKS.paths()


def path_by_name(name: str) -> str | None:
    """Return the import path of a class from outside by its name alone; None if none is known."""
    named = [f"{module}.{name}" for module, there in named_modules().items() if isinstance(vars(there).get(name), type)]
    every = [*named, *METHODS.paths(), *TASKS.paths()]
    return next((path for path in every if path.rpartition(".")[2] == name), None)
