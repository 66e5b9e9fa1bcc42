"""Imports at first use: names of our packages, and what libraries import for functions that no command calls.

torchmetrics imports `scipy.signal`, pyplot and transformers, and open_clip imports transformers: two seconds.
"""

import ast
import atexit
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

DEFERRED = (
    "scipy.signal",
    "matplotlib.axes",
    "matplotlib.pyplot",
    "transformers",
    "transformers.generation",
    "transformers.modeling_outputs",
)
"""Modules that are imported at the first use of one of their names."""


def _imported(module: str) -> Any:
    if isinstance(sys.modules.get(module), _Deferred):
        del sys.modules[module]
    return import_module(module)


class _Name:
    """Name in a deferred module; a call, an attribute and a subclass import the module."""

    def __init__(self, module: str, name: str) -> None:
        self._path = module, name

    def _value(self) -> Any:
        module, name = self._path
        return getattr(_imported(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._value()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `typing` looks for these, in annotations
            raise AttributeError(name)
        return getattr(self._value(), name)

    def __instancecheck__(self, instance: Any) -> bool:
        module = sys.modules.get(self._path[0])
        return module is not None and not isinstance(module, _Deferred) and isinstance(instance, self._value())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._value(),)


class _Deferred(ModuleType):
    """Stand-in for a module, which only the importing library keeps."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is not self:  # the import of the library is over
            return getattr(import_module(self.__name__), name)
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(self.__name__, name)


@contextmanager
def _style(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Do what `matplotlib.pyplot.style.context` does, which torchmetrics uses as a decorator."""
    with _imported("matplotlib.pyplot").style.context(*args, **kwargs):
        yield


@contextmanager
def _deferred() -> Iterator[None]:
    """Let stand-ins be imported instead of the deferred modules that are installed and not imported yet."""
    made: dict[str, _Deferred] = {}
    for name in DEFERRED:
        parent, _, child = name.rpartition(".")
        spec = find_spec(name.partition(".")[0])
        if name in sys.modules or spec is None:
            continue
        made[name] = sys.modules[name] = _Deferred(name)
        made[name].__spec__ = None if parent else spec
        if parent and parent not in made:
            setattr(import_module(parent), child, made[name])
    if "matplotlib.pyplot" in made:
        vars(made["matplotlib.pyplot"])["style"] = SimpleNamespace(context=_style)
    try:
        yield
    finally:
        for name, module in made.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
                delattr(sys.modules[parent], child)


@contextmanager
def quick_imports(*libraries: str) -> Iterator[None]:
    """Import libraries without their deferred modules, then run the imports of the caller, without garbage collections.

    Does nothing where torchmetrics is imported already, for example in a program of the user.
    """
    if "torchmetrics" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()  # the imports make a million objects, which all stay
    try:
        with suppress(Exception), _deferred():  # one that needs more than names is imported by the caller as usual
            for library in libraries:
                import_module(library)
        yield
    finally:
        gc.freeze()
        atexit.register(_unfreeze)
        gc.enable()


def _unfreeze() -> None:
    """Let the interpreter free everything at its end where Triton is loaded, which else reports leaks on stderr."""
    if "triton" in sys.modules:
        gc.unfreeze()


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package, which import a name as ``if TYPE_CHECKING`` does.

    These imports are all that a package writes down: they are its ``__all__``, too.

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
        if name == "__all__":
            return sorted(homes())
        if name.startswith("__") or name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes()[name]), name)

    return getattribute, lambda: sorted({*vars(sys.modules[package]), *homes()})
