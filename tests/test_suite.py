"""The suite stays small and can fail: what runs by default is counted, and known mistakes name the test that fails."""

import ast
import inspect
import itertools
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.products import covering, in_one_item

ROOT = Path(__file__).parents[1]


def test_at_most_4000_items_run_by_default(request: pytest.FixtureRequest) -> None:
    config = request.config
    if config.getoption("markexpr") not in config.getini("addopts"):
        pytest.skip("another part of the suite was asked for")
    assert len(request.session.items) <= 4000, "see CONTRIBUTING.md"


def test_each_mutation_fits_the_source_and_names_a_test_that_runs_by_default() -> None:
    """`scripts/mutations.py` runs them; who moves a file or a text changes `mutations.toml`."""
    entries = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text(encoding="utf-8"))["mutation"]
    assert len({(entry["file"], entry["old"]) for entry in entries}) == len(entries) == 82
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


def test_covering_picks_a_part_in_which_any_two_values_meet() -> None:
    factors = [range(4), "ab", range(3), "xyz"]
    rows = covering(*factors)
    assert [row.values for row in rows] == list(itertools.product(*factors))
    picked = [row.values for row in rows if not row.marks]
    for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2):
        assert {(row[i], row[j]) for row in picked} == set(itertools.product(first, second))
    assert len(picked) < 20 < len(rows)


def test_in_one_item_runs_every_row_with_a_folder_of_its_own(tmp_path: Path) -> None:
    failed: list[str] = []

    class Subtests:
        @contextmanager
        def test(self, msg: str) -> Iterator[None]:
            try:
                yield
            except AssertionError:
                failed.append(msg)

    @in_one_item(("number", "name"), [(1, "a"), (2, "b"), (3, "c"), (4, "d")])
    def odd(number: int, name: str, tmp_path: Path) -> None:
        assert not list(tmp_path.iterdir())
        (tmp_path / name).touch()
        assert number % 2

    assert list(inspect.signature(odd).parameters) == ["tmp_path", "subtests"]
    odd(subtests=Subtests(), tmp_path=tmp_path)
    assert failed == ["(2, 'b')", "(4, 'd')"] and len(list(tmp_path.glob("*/?"))) == 4
