"""The indices of splits that the package has are those that their rules give."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.data.catalog.registry import find
from randlora_pl.data.readers.trees import INDICES


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).parents[2] / "scripts" / "write_split_indices.py"
    spec = importlib.util.spec_from_file_location("write_split_indices", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shipped(name: str) -> Any:
    return json.loads((INDICES / f"{name}.json").read_text(encoding="utf-8"))


def test_eurosats_index_is_what_the_rule_gives(script: Any) -> None:
    """The file that ships, from the sizes of the classes alone; it never changes."""
    listed = shipped("eurosat")
    assert listed == script.eurosat()
    assert sum(script.EUROSAT.values()) == 27_000
    for name, size in script.EUROSAT.items():
        val, test = set(listed["val"][name]), set(listed["test"][name])
        assert len(val) == len(test) == 270 and not val & test and max(val | test) <= size and min(val | test) >= 1


def test_caltech101s_index_is_what_the_rule_gives(script: Any) -> None:
    """A fifth of the images of each class, rounded up or down."""
    listed = shipped("caltech101")
    assert listed == script.caltech101() and set(listed) == {"test"}
    assert list(script.CALTECH101) == list(find("caltech101").classnames)
    assert sum(script.CALTECH101.values()) == 8_677 and sum(map(len, listed["test"].values())) == 1_736
    for name, size in script.CALTECH101.items():
        numbers = listed["test"][name]
        assert len(set(numbers)) == len(numbers) and set(numbers) <= set(range(1, size + 1))
        assert abs(len(numbers) - size / 5) < 1
