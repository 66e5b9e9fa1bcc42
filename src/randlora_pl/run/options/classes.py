"""The classes in a config: one form of writing them, and those that a task takes by default."""

import re
from collections.abc import Iterable
from typing import Any

from randlora_pl.run.options.class_index import read_classes
from randlora_pl.utils.class_paths import with_public_paths
from randlora_pl.utils.errors import UserError, brief

Tree = dict[str, Any]

CLASSES = ("model", "model.adapter", "model.adapter.inner", "model.prompts", "model.head", "model.regulation")
"""Options with a class as value, each after the one whose argument it is."""
INNER, LISTED = "inner", "parts"
"""Arguments of an adapter that are an adapter and a list of adapters."""
LISTS = (f"model.adapter.{LISTED}", f"model.adapter.{INNER}.{LISTED}")
"""Options with a list of classes as value."""
_MAY_BE_NONE = ("model.head", "model.regulation")
CLASS_KEYS = frozenset({"class_path", "init_args", "dict_kwargs"})
"""Keys by which a config builds an object of any class."""
_GROUPS = ("data", "trainer", "run", "checkpoint", "gradient_flow", "spectrum", "unseen_gradient")


def normalize(tree: Tree) -> Tree:
    """Return the same config with every class as ``{class_path: NAME, init_args: {...}}``, and no empty sections.

    Class paths become the public ones.

    Raises:
        UserError: A section or a class has another type.
    """
    tree = {key: with_public_paths(value) for key, value in _mapping("a config", tree).items() if value is not None}
    for group in _GROUPS:
        if group in tree:
            _mapping(group, tree[group])
    if "model" in tree:
        tree["model"] = _as_class("model", tree["model"])
    return tree


def _as_class(option: str, value: Any) -> Tree:
    """Return the value of an option as a class, with the classes among its arguments."""
    node = {"class_path": value} if isinstance(value, str) else dict(_mapping(option, value, "a class or "))
    if not isinstance(node.get("class_path", ""), str):
        raise UserError(f"{option} is {brief(node['class_path'])}: give the name of a class.")
    arguments = dict(_mapping(f"init_args of {option}", node.pop("init_args", None) or {}))
    for name in set(node) - {"class_path", "dict_kwargs"}:  # as on the command line, which leaves init_args out
        arguments[name] = node.pop(name)
    for name in set(arguments) & set(_inside(option)):
        if arguments[name] is not None:
            arguments[name] = _as_class(f"{option}.{name}", arguments[name])
        elif f"{option}.{name}" not in _MAY_BE_NONE:
            del arguments[name]
    if option.startswith("model.adapter") and isinstance(arguments.get(LISTED), list):
        arguments[LISTED] = [_as_class(f"{option}.{LISTED}", each) for each in arguments[LISTED]]
    return node | ({"init_args": arguments} if arguments else {})


def _inside(option: str) -> list[str]:
    """Return the names of the arguments of an option's class that are classes themselves."""
    place = "model.adapter" if option.startswith("model.adapter.") else option  # an adapter in another is like any
    return [name for above, _, name in (each.rpartition(".") for each in CLASSES) if above == place]


def _mapping(what: str, value: Any, other: str = "") -> Tree:
    if not isinstance(value, dict):
        raise UserError(f"{what} is {brief(value)}: expected {other}options such as {{name: value}}.")
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{what} has the key {brief(key)}, which is not the name of an option.")
    return value


def with_default_classes(tree: Tree, typed: Iterable[str] = ()) -> Tree:
    """Return a config with the classes that its task takes by default, whose options then need no class.

    Args:
        tree: A normalized config.
        typed: Short names of typed options, which may belong to a class that no default has.
    """
    model = tree.get("model", {})
    known = read_classes("tasks") | read_classes("language")
    task = known.get(str(model.get("class_path")).rpartition(".")[2], known["AdaptationTask"])
    arguments = dict(model.get("init_args") or {})
    for name in _inside("model"):
        option, given = task.options.get(name), arguments.get(name, {})
        if option is None or not isinstance(given, dict) or "class_path" in given:
            continue
        wanted = given or any(key.startswith(f"model.{name}.") for key in typed)
        default = option.default if option.default != "None" else option.kind if wanted else None
        if default and (found := re.match(r"\w+", default)):
            arguments[name] = {"class_path": found[0]} | given
    return tree | {"model": model | {"init_args": arguments}} if arguments else tree
