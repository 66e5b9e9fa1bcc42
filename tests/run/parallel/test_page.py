"""The page about many devices: its commands are ours, its links lead somewhere."""

import re
from pathlib import Path

import pytest

from randlora_pl.commands.main import main
from randlora_pl.run.command import prepare
from tests.docs.pages import commands_of

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "many_devices.md").read_text(encoding="utf-8")


def test_its_commands_and_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    fits = [words[1:] for words in commands_of(PAGE) if words[0] == "fit"]
    assert [prepare("fit", fit).flat()["model.name"] for fit in fits] == ["ViT-B-32", "ViT-H-14"]
    assert main(["fit", "--help"]) == 0
    page = capsys.readouterr().out
    for option in ("--run.timeout", "--resume", "--run.name", "--checkpoint.every_n_steps", "loss_batch"):
        assert option in page and option in PAGE, option
    for path in re.findall(r"(?:bash|sbatch|python) ((?:configs|scripts)/\S+)", PAGE):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`(tests/\S+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path
