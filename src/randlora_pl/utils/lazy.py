"""Names of a package that are imported at first use."""

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package, which import a name as ``if TYPE_CHECKING`` does.

    Thus a run imports the tasks and callbacks that it uses, and a listing does without PyTorch. The arguments are the
    package's ``__name__`` and ``__file__``.
    """

    @cache
    def homes() -> dict[str, str]:
        body = ast.parse(Path(file).read_text(encoding="utf-8")).body
        checked = (node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        imports = (item for node in checked for item in node.body if isinstance(item, ast.ImportFrom))
        return {alias.name: str(item.module) for item in imports for alias in item.names}

    def getattribute(name: str) -> Any:
        if name.startswith("__") or name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes()[name]), name)

    return getattribute, lambda: sorted({*vars(sys.modules[package]), *homes()})
