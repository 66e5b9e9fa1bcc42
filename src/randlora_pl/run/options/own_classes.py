"""Classes from outside this program in configs: imported where the user names them, refused where a run's file does."""

import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from randlora_pl.run.options.classes import CLASSES, LISTS, Tree, normalize
from randlora_pl.run.options.compose import Command, parse_value, read_config
from randlora_pl.run.options.validate import tasks
from randlora_pl.utils.errors import UserError, brief, errors_in
from randlora_pl.utils.own_classes import (
    import_named,
    imported,
    is_importable,
    named_modules,
    parent_among,
    path_by_name,
    registered,
)

_LIBRARIES = ("randlora_pl", "lightning")
"""Packages with classes that any config may name."""


def import_classes(command: Command) -> None:
    """Import the modules of classes from outside that a command or its configs name.

    Args:
        command: What the user typed and the configs that the user named, without any config of a run or adapter.

    Raises:
        UserError: A module does not exist, or its code fails.
    """
    found = list(paths_in(command.config))
    for name, text in command.values.items():
        if name.startswith(("trainer.", "model")):
            found += _paths(name, parse_value(text), name.startswith("trainer.") or name in (*CLASSES, *LISTS))
    for option, path in found:
        module = path.rpartition(".")[0]
        if re.fullmatch(r"\w+(\.\w+)+", path) and module not in named_modules() and not registered(path):
            import_named(module, f"--{option} {path}")  # other texts are refused as names


def check_run_config(file: Path) -> Path:
    """Return the config of a run or adapter; refuse classes from outside that the user has not imported.

    Raises:
        UserError: It names one; the message has the option that imports it.
    """
    for option, path in paths_in(normalize(read_config(file))):
        module = path.rpartition(".")[0]
        if module not in named_modules() and not registered(path):
            raise UserError(
                f"{file}: {option} is {path}, which is not of this program, and a run imports nothing by itself.",
                f"Add --import {module} if you trust it.",
            )
    return file


def paths_in(tree: Tree) -> Iterator[tuple[str, str]]:
    """Yield the option and the import path of each class or function from outside in a config."""
    for name, value in tree.items():
        yield from _paths(name, value, name == "trainer" or "." in name)


def _paths(option: str, value: Any, any_text: bool) -> Iterator[tuple[str, str]]:
    """Yield the paths at ``class_path`` in a value, and with ``any_text`` each text that could be imported.

    Any text may be a class in the options of a class from outside, and below a dotted key, which may end at any option.
    """
    if isinstance(value, str):
        read = parse_value(value) if re.search(r"[\[{:]", value) else None
        if isinstance(read, dict | list):
            yield from _paths(option, read, any_text)
        elif any_text and _outside(value) and is_importable(value.partition(".")[0]):
            yield option, value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _paths(option, each, any_text)
    elif isinstance(value, dict):
        any_text = any_text or _outside(value.get("class_path"))
        for key, each in value.items():
            short = str(key).rpartition(".")[2]
            if short == "class_path":
                if _outside(each):
                    yield option, each
            else:
                place = option if short == "init_args" else f"{option}.{key}"
                yield from _paths(place, each, any_text or "." in str(key))


def _outside(path: Any) -> bool:
    """Return True if a value is the import path of a class that neither this program nor Lightning has."""
    return isinstance(path, str) and "." in path and path.partition(".")[0] not in _LIBRARIES


def task_name(path: str) -> str | None:
    """Return the name of the task of this program that a config names, or whose child it names; else None.

    Args:
        path: Name or import path of a task that is imported already, or is an entry point.
    """
    path = path if path in tasks() else path_by_name(path) or path
    module, _, name = path.rpartition(".")
    there = imported(module, f"The entry point {path}") if registered(path) else named_modules().get(module)
    kind = getattr(there, name, None)
    return parent_among(kind, tasks()) if isinstance(kind, type) else name if name in tasks() else None


def own_class(finder: str, path: str, file: Path) -> Any:
    """Return the class from outside that a file names; nothing is imported but an entry point.

    Args:
        finder: ``module:function`` below ``randlora_pl`` that finds it.
        path: Import path of the class.
        file: The file, for messages.

    Raises:
        UserError: The user has not imported it.
    """
    module, _, name = finder.partition(":")
    with errors_in(file):
        return getattr(import_module(f"randlora_pl.{module}"), name)(path)


def check_own_options(kind: type, options: Mapping[str, Any], file: Path) -> None:
    """Refuse a text from a file for an option that is a class or a function, which the parser would import.

    Raises:
        UserError: There is one.
    """
    for name, option in inspect.signature(kind).parameters.items():
        if not _plain(option.annotation) and any("." in text for text in _texts(options.get(name))):
            raise UserError(f"{file}: {name} is {brief(options[name])}, which a file cannot hold: it was changed.")


def _plain(hint: Any) -> bool:
    """Return True if a type has plain values only."""
    if get_origin(hint) is Literal:
        return True
    hint = hint.__origin__ if get_origin(hint) is Annotated else hint
    inner = get_args(hint) or (hint,)
    plain = (str, int, float, bool, type(None), list, dict, tuple, Any, ..., inspect.Parameter.empty)
    return all(_plain(each) for each in inner) if inner != (hint,) else hint in plain


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value."""
    if isinstance(value, str):
        yield value
    for each in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from _texts(each)
