from collections.abc import Callable
from pathlib import Path

import pytest

from randlora_pl.run.options.shipped import config_folder, config_names, find_config, headline
from randlora_pl.utils.errors import UserError
from tests.support.cli import Run


def test_names_paths_and_short_names_find_the_same_file(tmp_path: Path) -> None:
    file = config_folder() / "adapters" / "lora.yaml"
    for name in ("lora", "adapters/lora", "adapters/lora.yaml", "configs/adapters/lora.yaml", str(file)):
        assert find_config(name).read_text() == file.read_text()
    own = tmp_path / "lora"
    own.write_text("data: {}")
    assert find_config(str(own)) == own


def test_unknown_config_gets_a_hint() -> None:
    with pytest.raises(UserError, match="'quickstart'"):
        find_config("quikstart")
    with pytest.raises(UserError, match="'adapters/randlora'"):
        find_config("randlra")


def test_every_config_opens_with_what_it_is_and_its_command() -> None:
    for name, file in config_names().items():
        text = file.read_text()
        assert text.startswith("# ") and headline(file), name
        head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        assert "randlora-pl " in head, name
        if "/" not in name:
            assert "Cost" in head or "minutes" in head, name


def test_list_cat_and_cp(run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    listed = run("config", "list").out
    assert all(name in listed for name in config_names())
    assert run("config", "cat", "lora").out == find_config("lora").read_text()
    assert run("config", "cp", "lora").code == 0
    assert (tmp_path / "lora.yaml").read_text() == find_config("lora").read_text()
    assert "overwritten" in refused("config", "cp", "lora")
    assert "exist" in refused("config", "cp", "lora", "nowhere/lora.yaml")
    assert run("config", "cp", "lora", "mine.yaml").code == 0
    assert "'list'" in refused("config", "lst")
