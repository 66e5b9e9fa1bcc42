"""The README tells the truth: its commands exist, parse, and the first two are what continuous integration runs."""

import re
import shlex
from pathlib import Path

import pytest

from randlora_pl.cli.configs import find_config
from randlora_pl.cli.main import VERBS
from randlora_pl.cli.train import prepare

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    re.sub(r"\s+#.*", "", line.partition("randlora-pl ")[2])
    for line in TEXT.splitlines()
    if re.match(r" {4}.*\brandlora-pl [a-z]", line)
]


def test_the_readme_has_its_commands() -> None:
    assert len(COMMANDS) >= 5
    assert {shlex.split(command)[0] for command in COMMANDS} <= VERBS.keys()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("fit") and "--resume" not in c])
def test_fit_commands_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert prepare("fit", shlex.split(command)[1:]).config["data"]["dataset"]


def test_the_test_command_is_what_continuous_integration_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert '-m venv .venv && .venv/bin/pip install ".[test]" && .venv/bin/pytest' in TEXT
    assert '-m venv .venv && .venv/bin/pip install -q ".[test]"' in script
    assert ".venv/bin/pytest" in script
    assert "fit --config quickstart" in script


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    assert find_config("quickstart").is_file()
