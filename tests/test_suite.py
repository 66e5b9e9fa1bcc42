"""The suite stays small and can fail: what runs by default is counted, and known mistakes name the test that fails."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_at_most_4000_items_run_by_default(request: pytest.FixtureRequest) -> None:
    config = request.config
    if config.getoption("markexpr") not in config.getini("addopts"):
        pytest.skip("another part of the suite was asked for")
    assert len(request.session.items) <= 4000, "see CONTRIBUTING.md"


def test_each_mutation_fits_the_source_and_names_a_test_that_runs_by_default() -> None:
    """`scripts/mutations.py` runs them; who moves a file or a text changes `mutations.toml`."""
    entries = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text(encoding="utf-8"))["mutation"]
    assert len({(entry["file"], entry["old"]) for entry in entries}) == len(entries) == 60
    for entry in entries:
        text = (ROOT / entry["file"]).read_text(encoding="utf-8")
        assert text.count(entry["old"]) == 1 and entry["new"] != entry["old"], (entry["file"], entry["old"])
        file, _, name = entry["test"].partition("::")
        module = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        function = next((node for node in module.body if getattr(node, "name", "") == name.partition("[")[0]), None)
        assert isinstance(function, ast.FunctionDef), entry["test"]
        module_marks = [node for node in module.body if isinstance(node, ast.Assign)]  # pytestmark = ...
        decorators = [ast.unparse(node) for node in [*function.decorator_list, *module_marks]]
        marks = " ".join(each for each in decorators if "parametrize(" not in each)  # there only some cases have one
        assert not any(f"mark.{word}" in marks for word in ("slow", "full", "faults")), entry["test"]
