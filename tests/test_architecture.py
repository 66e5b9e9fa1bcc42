"""The structure of the source: no import circles, small folders and files, plain English."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import networkx

import randlora_pl

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
def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, inside functions and for types, too."""
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("randlora_pl"):
            found |= {inner if (inner := f"{node.module}.{alias.name}") in FILES else str(node.module)
                      for alias in node.names}  # fmt: skip
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = networkx.DiGraph((name, other) for name in FILES for other in imports(name))
    assert [sorted(circle) for circle in networkx.strongly_connected_components(graph) if len(circle) > 1] == []


def test_folders_and_files_are_small() -> None:
    folders = Counter(file.parent for file in FILES.values() if file.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > 16} == {}
    long = {file.relative_to(PACKAGE).as_posix() for file in FILES.values() if len(file.read_text().splitlines()) > 300}
    assert long == set()


def test_the_english_is_plain() -> None:
    words = first = 0
    for name, file in FILES.items():
        words += len(re.findall(rf"\b(?:{WORDS})\b", file.read_text(encoding="utf-8"), re.IGNORECASE))
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first += bool(re.match(rf"(?:{FIRST})\b", ast.get_docstring(node) or ""))
    assert words <= MOST_WORDS and first <= MOST_FIRST, (words, first)
