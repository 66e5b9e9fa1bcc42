import pytest

from randlora_pl.commands.common.tables import entry


def test_entries_wrap_beside_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = entry("--name", "word " * 20, column=12).splitlines()
    assert lines[0].startswith("  --name    word")
    assert all(line.startswith(" " * 12 + "word") and len(line) <= 60 for line in lines[1:])
    assert entry("--a-long-name", "text", column=4) == "  --a-long-name\n    text"
