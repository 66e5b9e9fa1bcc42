import pytest

from randlora_pl.cli.common.tables import entry, table


def test_columns_are_aligned_and_the_last_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = table(("a", "bc"), [("long name", "x" * 99), (None, 1)]).splitlines()
    assert lines[0] == "a          bc"
    assert lines[1].endswith("...") and len(lines[1]) == 40
    assert lines[2] == " " * 11 + "1"


def test_nothing_is_cut_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert table(("a", "bc"), [("y" * 99, "x" * 999)], narrow=("a",)).endswith("y  " + "x" * 999)


def test_narrow_columns_leave_room_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    _, line = table(("a", "bc"), [("y" * 99, "x" * 99)], narrow=("a",)).splitlines()
    assert len(line) == 60 and line.startswith("y" * 21 + "...  x")


def test_entries_wrap_beside_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = entry("--name", "word " * 20, column=12).splitlines()
    assert lines[0].startswith("  --name    word")
    assert all(line.startswith(" " * 12 + "word") and len(line) <= 60 for line in lines[1:])
    assert entry("--a-long-name", "text", column=4) == "  --a-long-name\n    text"
