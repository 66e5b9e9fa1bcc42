"""Checks that commands share."""

from pathlib import Path

import pytest

from randlora_pl.commands.common.arguments import check_output, check_parent
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
