import json
from pathlib import Path

import pytest

from randlora_pl.data.catalog.registry import find
from randlora_pl.data.validate import class_names, read_classnames
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item


def test_names_are_the_rows_or_those_of_the_users_files(tmp_path: Path) -> None:
    assert class_names(find("digits"), ["0"] * 10)[:2] == ["zero", "one"]
    assert class_names(find("folder"), ["great_cat", "dog"]) == ["great cat", "dog"]
    assert class_names(find("pairs"), ["a_b", "a_b"]) == ["a_b", "a_b"], "captions are what they are"
    (tmp_path / "names.txt").write_text("tench\nshark\n")
    assert class_names(find("folder"), ["n01", "n02"], str(tmp_path / "names.txt")) == ["tench", "shark"]


def test_classnames_files(tmp_path: Path) -> None:
    def names(file: str, content: str) -> list[str]:
        (tmp_path / file).write_text(content)
        return read_classnames(tmp_path / file, ["n01", "n02"])

    assert names("a.txt", "tench\n\n great white shark \n") == ["tench", "great white shark"]
    assert names("a.csv", "folder,name\nn02,shark\nn01,tench\n") == ["tench", "shark"]
    assert names("b.csv", 'n01,"tench, a fish"\nn02,shark\n') == ["tench, a fish", "shark"]
    assert names("a.json", json.dumps({"n02": "shark", "n01": "tench"})) == ["tench", "shark"]
    assert names("b.json", json.dumps(["tench", "shark"])) == ["tench", "shark"]


@in_one_item(
    ("file", "content", "message"),
    [
        ("a.txt", "one", "has 1 class names, the dataset has 2 classes"),
        ("a.csv", "n01,tench,fish", "is not of the form folder,name"),
        ("a.csv", "n1,tench\nn02,shark", r"names the class 'n1', which the dataset does not have. Did you mean 'n01'"),
        ("a.json", '{"n01": "tench"}', "no name for 1 of 2 classes, the first: 'n02'"),
        ("a.json", '{"n01": ', "cannot be read"),
        ("a.json", "3", "cannot be read"),
        ("a.json", "[" * 10_000, "nested"),
    ],
)
def test_wrong_classnames_files(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read_classnames(tmp_path / file, ["n01", "n02"])


def test_missing_classnames_file(tmp_path: Path) -> None:
    for name in ("names.txt", "x" * 300):
        with pytest.raises(UserError, match="exist"):
            read_classnames(tmp_path / name, ["a"])
