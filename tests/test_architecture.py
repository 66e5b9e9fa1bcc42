"""The structure of the source: no import circles, files of one idea, plain English."""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from lightning.pytorch import LightningModule
from torch import nn

import randlora_pl
from randlora_pl.adapters import methods
from randlora_pl.run.options.classes import classes, own_task
from randlora_pl.tasks import Objective
from tests.docs.pages import PAGES, ROOT

PACKAGE = Path(randlora_pl.__file__).parent
FILES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
WORDS = r"told|(?<!\.)tells?|nobody|whoever|somebody|dear|for want of|is no|are no|those of|that of|in words|in a line"
FIRST = r"What|Whether|Of|That|Those|How|Which|Where"
MOST_WORDS, MOST_FIRST = 5, 0
"""Uses of these words (five are code: `in words`), and first lines of docstrings that begin so."""


@cache
def nodes_of(name: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))))


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, inside functions and for types, too."""
    found = set()
    for node in nodes_of(name):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("randlora_pl"):
            found |= {inner if (inner := f"{node.module}.{alias.name}") in FILES else str(node.module)
                      for alias in node.names}  # fmt: skip
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter({name: imports(name) - {name} for name in FILES}).prepare()  # raises an error that has the circle


def test_the_layout_has_a_line_for_each_layer_of_imports() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = " | ".join(settings["contracts"][0]["layers"]).split(" | ")
    layout = PAGES["CONTRIBUTING.md"].partition("\n## Where things are\n")[2].split("```")[1]
    assert re.findall(r"^(\w+)(?:/|\.py) +\S", layout, flags=re.M) == layers


def test_a_file_has_at_most_500_lines() -> None:
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in FILES.items()}
    assert {name: count for name, count in lines.items() if count > 500} == {}


def names_in(name: str) -> Iterator[str]:
    """Identifiers, imported names and string constants; docstrings are whole sentences."""
    for node in nodes_of(name):
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.alias | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_methods_are_named_in_their_folder_alone() -> None:
    """Other rooms ask for traits; only defaults of tasks remain, and the list may only shrink."""
    rest = ("randlora_pl.adapters.methods", "randlora_pl.lab")
    naming = {
        name.removeprefix("randlora_pl.")
        for name in FILES
        if name != "randlora_pl.adapters" and not name.startswith(rest) and {*names_in(name)} & {*methods.__all__}
    }
    assert naming == {
        *("language.tasks.causal_lm", "language.tasks.classification", "tasks.objective", "tasks.prompt.task"),
    }


def test_the_english_is_plain() -> None:
    words = first = 0
    for name, file in FILES.items():
        words += len(re.findall(rf"\b(?:{WORDS})\b", file.read_text(encoding="utf-8"), re.IGNORECASE))
        for node in nodes_of(name):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first += bool(re.match(rf"(?:{FIRST})\b", ast.get_docstring(node) or ""))
    assert words <= MOST_WORDS and first <= MOST_FIRST, (words, first)


def test_tasks_and_their_parts_are_named_in_their_folders_alone() -> None:
    own = {name for option in ("model", "model.head", "model.regulation") for name in classes(option)}
    export = "randlora_pl.language"
    inside = ("randlora_pl.tasks", "randlora_pl.language.tasks", "randlora_pl.lab.")
    others = [name for name in FILES if not name.startswith(inside) and name != export]
    assert {name: found for name in others if (found := {*names_in(name)} & own)} == {}


def test_one_module_has_the_objective_and_the_steps_of_lightning() -> None:
    """Objectives define no hook of Lightning, and their rooms import it in one file."""
    bases = {
        (name, node.name)
        for name in FILES
        for node in nodes_of(name)
        if isinstance(node, ast.ClassDef) and "LightningModule" in {*map(ast.unparse, node.bases)}
    }
    assert bases == {("randlora_pl.tasks.module", "AdaptationModule")}
    hooks = {name for name in dir(LightningModule) if name not in dir(nn.Module) and not name.startswith("_")}
    kinds = [kind for name in classes("model") if (kind := own_task(name)) is not None]
    ours = {base for kind in kinds for base in kind.__mro__ if issubclass(base, Objective)}
    assert {name for base in ours for name in vars(base)} & hooks == {"device"}
    importing = {
        name
        for name in FILES
        if name.startswith(("randlora_pl.tasks", "randlora_pl.language.tasks"))
        and any(
            isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning") for node in nodes_of(name)
        )
    }
    assert importing == {"randlora_pl.tasks.module"}
