"""Import of modules that the user names, and of no others: files of runs and adapters import nothing by themselves."""

import re
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from randlora_pl.utils.errors import UserError, brief, first_line

_named: dict[str, ModuleType] = {}
"""Modules that the user has named in this process since the last command began, in order."""


def forget_named() -> None:
    """Forget the modules that the user has named: a command inherits none of an earlier one in the same process."""
    _named.clear()


def import_named(name: str, where: str = "--import") -> ModuleType:
    """Import a module that the user names, from the working folder or among the installed packages.

    Args:
        name: Dotted name of the module.
        where: Option or place that names it, for messages.

    Raises:
        UserError: The module does not exist, or its code fails.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        raise UserError(f"{where}: {brief(name)} is not the name of a module. Give mine for the file mine.py.")
    _add_working_folder(name.partition(".")[0], where)
    _named[name] = imported(name, where)
    return _named[name]


def imported(name: str, where: str) -> ModuleType:
    """Import a module; convert what its code raises to an error of one or two lines.

    Raises:
        UserError: The module does not exist, or its code fails.
    """
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


def _add_working_folder(top: str, where: str) -> None:
    """Append the working folder to the path, where it hides no installed package.

    Raises:
        UserError: An installed package hides a file of the working folder.
    """
    folder = Path.cwd()
    if not {"", str(folder)} & set(sys.path):
        sys.path.append(str(folder))
    own = next((file for file in (folder / f"{top}.py", folder / top / "__init__.py") if file.is_file()), None)
    spec = find_spec(top) if own is not None and top not in sys.modules else None
    found = spec.origin if spec is not None else getattr(sys.modules.get(top), "__file__", None)
    if own is not None and found is not None and own.resolve() != Path(found).resolve():
        raise UserError(f"{where}: {own.name if own.parent == folder else top} is hidden by {found}. Rename it.")


def is_importable(top: str) -> bool:
    """Return True if a name without dots is a module or package, also of the working folder; nothing is imported."""
    if not top:  # of a pattern such as .*mlp
        return False
    try:
        found = find_spec(top) is not None
    except (ImportError, ValueError):
        found = top in sys.modules
    return found or any(Path(f"{top}{end}").exists() for end in ("", ".py"))


def named_modules() -> dict[str, ModuleType]:
    """Return the modules that the user has named, by name."""
    return dict(_named)


def import_words() -> str:
    """Return `` --import mine`` for each module that the user has named, as the end of a command; else nothing."""
    return "".join(f" --import {name}" for name in _named)
