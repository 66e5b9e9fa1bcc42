import json
from pathlib import Path

import pytest

from randlora_pl.language.text_files import first_file, lines_of, read_records, read_text
from randlora_pl.utils.errors import UserError
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
