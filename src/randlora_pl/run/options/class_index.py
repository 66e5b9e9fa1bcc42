"""Classes and their options, read from the source text to avoid the seconds of PyTorch's import."""

import ast
import importlib.util
import re
import typing
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from randlora_pl.utils import options
from randlora_pl.utils.class_paths import exported, public_path

PACKAGE = Path(__file__).resolve().parents[2]

_TYPES: dict[str, Any] = {name: getattr(typing, name) for name in ("Annotated", "Any", "Literal", "Optional", "Union")}
_TYPES |= {kind.__name__: kind for kind in (int, float, bool, str, list, dict, tuple)}
_TYPES |= {make.__name__: make for make in (options.at_least, options.between)}
_TYPES |= {name: check for name, check in vars(options).items() if isinstance(check, options.Check)}


@dataclass(frozen=True)
class Option:
    """Option of a class.

    Attributes:
        name: Name of the option.
        kind: Its annotation, as written, with the types that names in it stand for.
        default: Its default, as written; None if the option is required.
        help: The text below it, joined.
    """

    name: str
    kind: str
    default: str | None
    help: str

    @property
    def choices(self) -> str:
        """The type as a reader sees it: ``int | ceil`` of ``Annotated[int, Positive] | Literal['ceil']``."""
        kind = re.sub(r"Annotated\[(\w+)[^]]*\]", r"\1", self.kind)
        return re.sub(r"Literal\[(.*?)\]", lambda found: " | ".join(ast.literal_eval(f"[{found[1]}]")), kind)

    @property
    def sentence(self) -> str:
        """The first sentence of its help, without the stop."""
        return re.split(r"(?<=[^.\d])[.;:] ", self.help + " ")[0].rstrip(". ")

    @property
    def type(self) -> Any:
        """The type, with its checks; Any if it names a class, whose values only the parser checks."""
        try:
            return eval(self.kind, {"__builtins__": {}}, _TYPES)
        except (NameError, SyntaxError, TypeError):
            return Any


@dataclass(frozen=True)
class ClassSource:
    """Class as its source text describes it.

    Attributes:
        name: Name of the class.
        module: Dotted path of the package that exports it, else of its module.
        summary: First line of its docstring.
        bases: Names of its base classes.
        options: Its options by name, then those that it inherits.
        constants: Constants, and tuples of constants, among its class attributes and its base classes', by name.
    """

    name: str
    module: str
    summary: str
    bases: tuple[str, ...]
    options: dict[str, Option] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)


@cache
def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@cache
def _modules(file: Path) -> dict[str, str]:
    """Return the module of every name that a file imports from this project."""
    imports = re.findall(r"^from (randlora_pl\.[\w.]+) import (\([^)]*|.*)", _text(file), re.MULTILINE)
    return {name: module for module, names in imports for name in re.findall(r"\w+", names)}


@cache
def _spelled_out(kind: str, file: Path) -> str:
    """Return an annotation of a file with the types that names in it stand for, such as ``Literal[...]``."""

    def type_of(name: re.Match[str]) -> str:
        module = _modules(file).get(name[0])
        source = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py") if module else file
        found = re.search(
            rf"^{name[0]} = ((?:Literal|Annotated)\[.*\]|[\w\[\], ]+ \| .*)$", _text(source), re.MULTILINE
        )
        return _spelled_out(found[1], source) if found else name[0]

    return re.sub(r"\b(?!Any\b|None\b|Literal\b|Annotated\b)[A-Z]\w+\b(?!')", type_of, kind)


def _fields(node: ast.ClassDef, file: Path) -> dict[str, Option]:
    """Return the options that a class declares as fields, also beside ``TYPE_CHECKING``; the text below is the help.

    An option without a name is one of a base that the class does not have.
    """
    found: dict[str, Option] = {}
    body = [each for item in node.body for each in (item.orelse if isinstance(item, ast.If) else [item])]
    for item, below in zip(body, [*body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        kind, default = ast.unparse(item.annotation).strip("'"), item.value
        if kind.startswith("ClassVar"):
            continue
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
        name = item.target.id
        if isinstance(default, ast.Call) and ast.unparse(default.func) == "field":
            given = {each.arg: each.value for each in default.keywords}
            name = "" if "init" in given else name
            default = _made(given["default_factory"]) if "default_factory" in given else given.get("default")
        written = None if default is None else ast.unparse(default)
        found[item.target.id] = Option(name, _spelled_out(kind, file), written, " ".join(str(text).split()))
    return found


def _made(factory: ast.expr) -> ast.expr:
    """Return what a ``default_factory`` makes: an empty list, ``LoRA()``, or the value of a lambda."""
    empty = {"list": "[]", "dict": "{}"}.get(ast.unparse(factory))
    if empty:
        return ast.parse(empty, mode="eval").body
    return factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], [])


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    return {
        target.id: ast.literal_eval(item.value)
        for item in node.body
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant | ast.Tuple)
        if all(isinstance(each, ast.Constant) for each in getattr(item.value, "elts", ()))
        for target in item.targets
        if isinstance(target, ast.Name)
    }


def _read(file: Path, module: str) -> dict[str, tuple[ClassSource, dict[str, str]]]:
    """Return the classes of one file, each with the room of every name that the file imports from this project."""
    body = ast.parse(_text(file)).body if "\nclass " in _text(file) else []
    rooms = {name: module.split(".")[1] for name, module in _modules(file).items()} if body else {}
    return {
        node.name: (
            ClassSource(
                node.name,
                public_path(f"{module}.{node.name}").rpartition(".")[0],
                (ast.get_docstring(node) or "").partition("\n")[0],
                tuple(ast.unparse(base).rpartition(".")[2] for base in node.bases),
                _fields(node, file),
                _constants(node),
            ),
            rooms,
        )
        for node in body
        if isinstance(node, ast.ClassDef)
    }


@cache
def read_classes(package: str) -> dict[str, ClassSource]:
    """Return the classes of a package of this project, for example ``adapters``, and of its subfolders, by name.

    Args:
        package: Name of a folder below ``randlora_pl``.
    """
    raw: dict[str, tuple[ClassSource, dict[str, str]]] = {}
    for file in sorted((PACKAGE / package).rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        raw |= _read(file, ".".join(["randlora_pl", *parts]))

    def complete(name: str) -> dict[str, Option]:
        source, rooms = raw[name]
        inherited: dict[str, Option] = {}
        for base in source.bases:
            if base in raw:
                inherited |= complete(base)
            elif base in rooms:
                inherited |= read_classes(rooms[base])[base].options
        found = source.options | {key: value for key, value in inherited.items() if key not in source.options}
        return {key: value for key, value in found.items() if value.name}

    def constants(name: str) -> dict[str, Any]:
        source = raw[name][0]
        inherited = [constants(base) for base in reversed(source.bases) if base in raw]
        return {key: value for some in [*inherited, source.constants] for key, value in some.items()}

    return {
        name: replace(source, options=complete(name), constants=constants(name)) for name, (source, _) in raw.items()
    }


def subclasses(package: str, base: str) -> dict[str, ClassSource]:
    """Return the public classes of a package that derive from ``base``, directly or not, and that nothing derives from.

    Args:
        package: Name of a folder below ``randlora_pl``.
        base: Name of the base class.
    """
    classes = read_classes(package)

    def derives(name: str) -> bool:
        return any(parent == base or (parent in classes and derives(parent)) for parent in classes[name].bases)

    public = exported(package)
    return {
        name: source
        for name, source in classes.items()
        if derives(name) and not name.startswith("_") and (not public or name in public)
    }


@cache
def trainer_options() -> dict[str, Option]:
    """Return the Lightning trainer's options by name, from its source text; empty if it has another place."""
    spec = importlib.util.find_spec("lightning")
    places = (spec.submodule_search_locations if spec else None) or ()
    for file in (Path(place) / "pytorch" / "trainer" / "trainer.py" for place in places):
        trainer = next((item for item in ast.parse(_text(file)).body if getattr(item, "name", "") == "Trainer"), None)
        for item in trainer.body if isinstance(trainer, ast.ClassDef) else ():
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                return {
                    each.arg: Option(
                        each.arg, ast.unparse(each.annotation or ast.Name("Any")), ast.unparse(default), ""
                    )
                    for each, default in zip(item.args.kwonlyargs, item.args.kw_defaults, strict=True)
                    if default is not None
                }
    return {}
