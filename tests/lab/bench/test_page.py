"""The pages about speed: their commands and options exist, and they hide no machine."""

import re
from pathlib import Path

import pytest
import yaml

from randlora_pl.commands.main import main, members
from randlora_pl.lab.bench import chosen
from randlora_pl.run.options.shipped import find_config
from tests.docs.help import help_page
from tests.docs.pages import PAGES, commands_of

ROOT = Path(__file__).parents[3]
BOTH = [PAGES[f"docs/{name}.md"] for name in ("speed", "measurements")]
PAGE = "\n".join(BOTH)


def test_its_benches_are_ours() -> None:
    commands = [words[1:] for words in commands_of(PAGE) if words[0] == "bench"]
    assert {command[0] for command in commands} == {*members("bench")}
    for command in commands:
        options = [word for word in command if word.startswith("--")]
        assert all(f"  {option} " in help_page(f"bench {command[0]}") for option in options), command
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
    assert all("AMD EPYC" in page for page in BOTH)
    assert "docs/speed.md" in (ROOT / "README.md").read_text(encoding="utf-8")
