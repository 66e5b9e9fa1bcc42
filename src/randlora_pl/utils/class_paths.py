"""Public paths of this project's classes in saved configs, such as ``randlora_pl.adapters.RandLoRA``.

Modules move, so configs name the public path: the first parent package that exports a class of this name.
"""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]


def public_path(path: str) -> str:
    """Return the shortest path that exports a class of this project; return any other text unchanged.

    Args:
        path: Dotted path of the class.
    """
    if not re.fullmatch(r"randlora_pl(\.\w+)+", path):
        return path
    *packages, name = path.split(".")
    for depth in range(1, len(packages) + 1):
        if name in exported(*packages[1:depth]):
            return ".".join([*packages[:depth], name])
    return path


def with_public_paths(value: Any) -> Any:
    """Return a config with the public path of every class in it."""
    if isinstance(value, dict):
        return {key: with_public_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_public_paths(inner) for inner in value]
    return public_path(value) if isinstance(value, str) else value


@cache
def exported(*package: str) -> frozenset[str]:
    """Return the names in the ``__all__`` of a package, read from its source text; none if it has no ``__all__``.

    Args:
        *package: Names of the folders below ``randlora_pl``.
    """
    file = _PACKAGE.joinpath(*package, "__init__.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else ():
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return frozenset(ast.literal_eval(node.value))
    return frozenset()
