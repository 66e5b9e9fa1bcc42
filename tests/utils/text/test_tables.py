import pytest

from randlora_pl.utils.text import table
from tests.support.products import in_one_item


def test_columns_are_aligned_and_the_widest_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = table(("a", "bc", "n"), [("  long name", "word " * 10, 1), (None, "x", 1000)], right=(2,))
    assert text.splitlines() == [
        "a            bc                        n",
        "  long name  word word word word       1",
        "             word word word word",
        "             word word",
        "             x                      1000",
    ]


def test_nothing_is_wrapped_or_left_out_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert table(("a", "bc"), [("y" * 99, "x" * 999)], optional=("a",)).endswith("y  " + "x" * 999)


@in_one_item("width", [12, 20, 33, 60, 150])
def test_no_line_is_longer_than_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    cells = [("name_of_a_thing", "some words " * 9, 4), ("a", "/path/without/spaces" * 5, 10**6)]
    text = table(("first", "second", "n"), cells)
    assert max(map(len, text.splitlines())) <= width
    for cell in ("".join(str(cell).split()) for row in cells for cell in row):
        assert all(text.count(letter) >= cell.count(letter) for letter in set(cell)), "nothing is lost"


def test_columns_have_a_letter_on_the_narrowest_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "5")
    assert table(("ab", "cd", "ef"), []).splitlines() == ["a  c  e", "b  d  f"]


def test_a_narrow_terminal_leaves_optional_columns_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        return table(("name", "licence", "text"), [("x" * 10, "MIT" * 4, "two words " * 9)], optional=("licence",))

    assert "MIT" in shown(50) and "left out" not in shown(50)
    assert "MIT" not in shown(49) and shown(49).endswith("(left out to fit the terminal: licence)")


def test_numbers_stay_whole_beside_a_long_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    lines = table(("layer", "norm of A", "n"), [("blocks.attn.in_proj_weight", 0.312345, 768)]).splitlines()
    assert lines == ["layer           norm of A  n", "blocks.attn.in  0.312345   768", "_proj_weight"]
