"""The page about speed: its commands and options exist, and it hides no machine."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from randlora_pl.bench.methods import chosen
from randlora_pl.cli.bench.verbs import PAGES
from randlora_pl.cli.main import main
from randlora_pl.config.shipped import find_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


def test_its_benches_are_ours() -> None:
    commands = [
        shlex.split(line) for line in re.findall(r"randlora-pl bench ([a-z][^`\n]*?)(?:`|  |$)", PAGE, flags=re.M)
    ]
    assert {command[0] for command in commands} == {"train", "captions", "answers", "adapters"}
    for command in commands:
        options = [word for word in command if word.startswith("--")]
        assert all(f"  {option} " in PAGES[command[0]] for option in options), command
        if "--methods" in command:
            first = command.index("--methods") + 1
            names = [word for word in command[first:] if not word.startswith("--")]
            assert set(chosen(names)) == set(names)


def test_its_comparisons_are_shipped() -> None:
    for name in set(re.findall(r"--config (compare\w+)", PAGE)):
        content = yaml.safe_load(find_config(name).read_text(encoding="utf-8"))
        assert len(content["seeds"]) == 5 and len(content["methods"]) == 2


def test_its_switches_are_options_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in set(re.findall(r"--model\.(\w+)", PAGE)):
        assert option in shown, option


def test_its_pictures_are_there_and_its_figures_name_their_machine() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / path).is_file(), path
    assert "AMD EPYC" in PAGE
    assert "docs/speed.md" in (ROOT / "README.md").read_text(encoding="utf-8")
