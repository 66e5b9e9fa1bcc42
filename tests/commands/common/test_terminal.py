"""Checks and texts that commands share."""

from pathlib import Path

import pytest

from randlora_pl.commands.common import check_output, check_parent, entry
from randlora_pl.utils.errors import UserError


def test_outputs_are_replaced_only_by_option(tmp_path: Path) -> None:
    check_output(tmp_path, overwrite=True)
    check_output(tmp_path / "new")
    check_parent(tmp_path / "new")
    with pytest.raises(UserError, match="or --overwrite"):
        check_output(tmp_path, overwrite=False)
    with pytest.raises(UserError, match="overwritten"):
        check_output(tmp_path)
    with pytest.raises(UserError, match="mkdir -p"):
        check_parent(tmp_path / "missing" / "new")


def test_entries_wrap_beside_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = entry("--name", "word " * 20, column=12).splitlines()
    assert lines[0].startswith("  --name    word")
    assert all(line.startswith(" " * 12 + "word") and len(line) <= 60 for line in lines[1:])
    assert entry("--a-long-name", "text", column=4) == "  --a-long-name\n    text"
