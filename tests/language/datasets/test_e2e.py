from pathlib import Path
from typing import Literal

import pytest

from randlora_pl.language.prompt_sets import read_e2e, read_items
from randlora_pl.utils.errors import UserError
from tests.language.files import write, write_e2e


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_lines_are_read_and_grouped_by_meaning(tmp_path: Path, split: Literal["train", "validation", "test"]) -> None:
    found = read_e2e(write_e2e(tmp_path), split)
    assert len(found) == 4
    assert found[0][0] == "name : The Vaults | Type : pub | price : more than £ 30"
    assert found[1][1] == "Aromi is a coffee shop , not family-friendly ."
    groups = {item.prompt: list(item.references) for item in read_items("e2e", tmp_path, None)}
    assert list(groups) == [found[0][0], "name : Aromi | Type : coffee shop"]
    assert groups[found[0][0]] == [found[0][1], found[2][1]]
    assert groups[found[1][0]] == [found[1][1], found[3][1]]


@pytest.mark.parametrize("line", ["no bars", "a || b || c", "a ||", "|| b", "a | b"])
def test_a_malformed_line_is_told_with_its_number(tmp_path: Path, line: str) -> None:
    write(tmp_path / "train.txt", "a||b", "", line)
    with pytest.raises(UserError) as error:
        read_e2e(tmp_path, "train")
    assert str(error.value).startswith(f"{tmp_path / 'train.txt'}, line 3: expected")
    assert "\n" not in str(error.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test\.txt[\s\S]*e2e"):
        read_e2e(tmp_path, "validation")
    write(tmp_path / "train.txt", "")
    with pytest.raises(UserError, match="has no lines"):
        read_e2e(tmp_path, "train")
