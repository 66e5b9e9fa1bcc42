import json
from pathlib import Path

import pytest

from randlora_pl.language.text_files import class_names, class_numbers, own_files, read_own, scores
from randlora_pl.utils.errors import UserError
from tests.language.classify import write_csv
from tests.support.products import in_one_item


def test_columns_stand_in_any_order_and_texts_may_hold_commas_and_line_breaks(tmp_path: Path) -> None:
    rows = [("1", "x", 'He said, "no"\nand left'), ("0", "y", "b")]
    file = write_csv(tmp_path / "train.csv", rows, ("label", "id", "text"))
    found = read_own(file)
    assert [row.texts for row in found] == [('He said, "no"\nand left',), ("b",)]
    assert class_names(found, file) == ["0", "1"]
    assert class_numbers(found, ["0", "1"]).labels == [1, 0]


def test_json_lines_hold_pairs_and_numbers(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps({"text_a": "a", "text_b": "b", "label": label}) for label in (10, 9, 2.5)))
    found = read_own(file)
    assert found[0].texts == ("a", "b")
    assert scores(found).labels == [10.0, 9.0, 2.5]
    assert class_names(found[:2], file) == ["9", "10"]  # by size, not by the alphabet


CSV = "text,label\n"
MISTAKES = {
    "": "has no records",
    CSV: "has no records",
    f"{CSV}a,b\nc\n": "line 3: 1 fields, but the header has 2",
    f'{CSV}a,b\n"c,d\n': "no valid CSV",
    "txt,label\na,b\n": "line 2: expected columns text .or text_a and text_b. and label; found txt, label",
    "text\na\n": "expected columns",
    f"{CSV}a,b\n ,c\n": "line 3: 'text' is empty",
    f"{CSV}a,\n": "line 2: 'label' is empty",
}


@in_one_item(("content", "message"), MISTAKES.items())
def test_mistakes_in_csv_files_are_told_with_their_line(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_own(file)


@pytest.mark.parametrize(("mark", "called"), [(";", "semicolons"), ("\t", "tabs")])
@pytest.mark.parametrize("quote", ["", '"'])
@in_one_item("name", ["train.csv", "train.TSV"])
def test_other_marks_than_commas_are_named(mark: str, called: str, quote: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    for row in (("good, bad", "a"), ("good", "a")):
        lines = (mark.join(f"{quote}{cell}{quote}" for cell in cells) for cells in (("text", "label"), row))
        file.write_text("\r\n".join(lines), encoding="utf-8-sig")
        with pytest.raises(UserError) as refused:
            read_own(file)
        said = f"{file}, line 1: there are {called} between the columns (text, label); expected commas."
        assert str(refused.value).startswith(said)
    file.write_text(f"text,label,a{mark}b{mark}c{mark}d\nx,y,z\n")  # in a name
    assert read_own(file)[0].texts == ("x",)
    file.write_text(f"text,a{mark}b{mark}c\nx,y\n")
    with pytest.raises(UserError, match="columns"):
        read_own(file)


def test_mistakes_in_json_lines_are_told_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    for content, message in (
        ('{"text": "a", "label": true}', "line 1: 'label' must be text"),
        ('{"text": 1, "label": "a"}', "line 1: 'text' must be text"),
        ('{"text": "a", "label": 1}\n{"text_a": "a", "text_b": "b", "label": 1}', "line 2: single texts and pairs"),
        ("", "has no records"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message) as found:
            read_own(file)
        assert "again" not in str(found.value) or content


def test_labels_must_fit(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "train.csv", [("a", "good"), ("b", "bad")])
    rows = read_own(file)
    assert class_names(rows, file) == ["bad", "good"]
    with pytest.raises(UserError, match="'goods'"):
        class_numbers(rows, ["bad", "goods"])
    with pytest.raises(UserError, match="'good'"):
        scores(rows)
    with pytest.raises(UserError, match="'good'"):
        class_names(rows[:1], file)
    score = "line 3: the label 1.5 looks like a score: --data.scores true"
    for labels, message in (
        (["1", "1.5", "3"], score),
        (["1", "1.5"], score),
        (map(str, range(1001)), "1,001 different"),
    ):
        file = write_csv(tmp_path / "train.csv", [("a", label) for label in labels])
        with pytest.raises(UserError, match=message):
            class_names(read_own(file), file)


def test_files_are_found_by_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data.root"):
        own_files(tmp_path, ".csv")
    train = write_csv(tmp_path / "train.csv", [])
    assert own_files(train, ".csv") == own_files(tmp_path, ".csv") == {"train": train}
    test = write_csv(tmp_path / "test.csv", [])
    assert own_files(tmp_path, ".csv") == {"train": train, "test": test}
