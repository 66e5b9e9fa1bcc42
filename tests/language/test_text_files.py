import json
from pathlib import Path

import pytest

from randlora_pl.language.text_files import (
    COLUMNS,
    class_names,
    class_numbers,
    first_file,
    lines_of,
    own_files,
    read_own,
    read_records,
    read_text,
    scores,
)
from randlora_pl.utils.errors import UserError
from tests.language.classify import write_csv
from tests.support.products import in_one_item

RECORDS = [{"a": "one", "b": "x\ny"}, {"a": "two", "b": "", "more": 3}]


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "some.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (json.dumps(RECORDS), [1, 1]),
        (json.dumps(RECORDS, indent=2), [2, 6]),
        ("\ufeff" + json.dumps(RECORDS, indent=4).replace("\n", "\r\n"), [2, 6]),
        ("\n\n".join(map(json.dumps, RECORDS)) + "\n", [1, 3]),
    ],
)
def test_arrays_and_one_object_a_line_give_records_and_lines(
    tmp_path: Path, text: str | bytes, lines: list[int]
) -> None:
    found = read_records(write(tmp_path, text), ("a", "b"))
    assert found == [(lines[0], {"a": "one", "b": "x\ny"}), (lines[1], {"a": "two", "b": ""})]


@pytest.mark.parametrize("text", ["", " \n", "[ ]"])
def test_a_file_without_objects_gives_no_record(tmp_path: Path, text: str) -> None:
    """Who reads it knows whether it can be got again."""
    assert read_records(write(tmp_path, text), ("a", "b")) == []


@in_one_item(
    ("text", "said"),
    [
        ('[\n{"a": "1", "b": "2"},\n{"a": "1"}\n]', "line 3: the record lacks 'b'; each needs a, b"),
        ('{"a": "1", "b": "2"}\n{"b": "1"}', "line 2: the record lacks 'a'"),
        ('{"instruction": "1", "output": "2"}', "completions as docs/prompts.md shows"),
        ('[\n{"a": "1", "b": 2}]', "line 2: 'b' must be text, not 2"),
        ('[\n\n"text"]', "line 3: expected an object with the fields a, b"),
        ('[\n{"a": "1", "b": "2"}\n{"a": "1", "b": "2"}]', "line 3: no valid JSON"),
        ('[{"a": "1",\n"b": "2",\n"b" "3"}]', "line 3 (in the record that starts on line 1): no valid JSON"),
        ('[{"a": "1", "b": "2"},\n{"a": "unclosed}]', "line 2: no valid JSON"),
        ('[{"a": "1", "b": "2"},\n', "line 2: no valid JSON"),
        ('[{"a": "1", "b": "2"}\n', "line 2: no valid JSON"),
        ('[{"a": "1", "b": "2"},\n]', "line 2: no valid JSON"),
        ('[{"a": "1", "b": "2"}]\n\n]', "line 3: no valid JSON: Nothing may follow"),
        ('{"a": "1", "b": "2"}\n\n{"a": "1", "b": ', "line 3: no valid JSON"),
        ('{"a": "1", "b": "2"}\nversion https://git-lfs', "line 2: no valid JSON"),
        ("[" * 100_000, "line 1"),
        ('{"a": "1", "b": "2"}\n{"a": ' + "1" * 5000 + ', "b": "2"}', "line 2: no valid JSON: Exceeds the limit"),
        ('[{"a": "1", "b": "2"},\n{"a": ' + "1" * 5000 + ', "b": "2"}]', "line 2: no valid JSON: Exceeds the limit"),
        ('{"a": "1", "b": "2"}\n{"a": "\\ud83d", "b": "2"}', "line 2: 'a' has half a character"),
        (b'[{"a":\n\n"\xff"}]', "line 3: this is not UTF-8"),
    ],
)
def test_a_fault_is_told_with_file_and_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_records(path, ("a", "b"))
    assert str(path) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_lines_end_only_at_line_feeds(tmp_path: Path) -> None:
    path = write(tmp_path, "one\u2028still\x85one\x0c\r\n\ntwo\n")
    assert lines_of(read_text(path)) == ["one\u2028still\x85one\x0c", "", "two"]
    assert lines_of(read_text(write(tmp_path, "a"))) == ["a"]
    assert lines_of(read_text(write(tmp_path, ""))) == []


def test_a_missing_file_is_told_with_the_tree_and_the_source(tmp_path: Path) -> None:
    (tmp_path / "second").write_text("")
    assert first_file(tmp_path, ("first", "second"), "first", "the shop") == tmp_path / "second"
    for root, named in ((tmp_path, tmp_path / "first"), (tmp_path / "none", tmp_path / "none")):
        with pytest.raises(UserError) as error:
            first_file(root, ("first",), "a file called first", "the shop")
        assert str(error.value).startswith(f"{named} does not exist")
        assert "first" in str(error.value)
        assert "the shop" in str(error.value)


def test_what_is_there_but_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "plain").write_text("")
    cases = [
        (tmp_path, "first is not a file"),
        (tmp_path / "plain", "plain is not a folder"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ]
    for root, said in cases:
        with pytest.raises(UserError, match=said):
            first_file(root, ("first",), "a file called first", "the shop")


def test_a_whole_character_of_two_halves_is_text(tmp_path: Path) -> None:
    assert read_records(write(tmp_path, '{"a": "\\ud83d\\ude00"}'), ("a",)) == [(1, {"a": "\U0001f600"})]


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
        own_files(tmp_path, ".csv", COLUMNS)
    train = write_csv(tmp_path / "train.csv", [])
    assert own_files(train, ".csv", COLUMNS) == own_files(tmp_path, ".csv", COLUMNS) == {"train": train}
    test = write_csv(tmp_path / "test.csv", [])
    assert own_files(tmp_path, ".csv", COLUMNS) == {"train": train, "test": test}
