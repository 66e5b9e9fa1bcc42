"""The page about your own data tells the truth: its code and commands run here in their order, fits shortened."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.docs.pages import joined
from tests.docs.pages import shown as shown_on
from tests.test_readme import ROOT, SHORT, run

PAGE = ROOT / "docs" / "your_own_data.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.S)
CODE = [body for kind, body in BLOCKS if kind == "python"]
COMMANDS = [line.removeprefix("randlora-pl ") for kind, body in BLOCKS if kind == "sh" for line in joined(body)]
OWN = ("folder", "table", "hf", "webdataset", "pairs")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the page's code has run."""
    pytest.importorskip("datasets", reason='the page needs the extra: pip install ".[hf]"')
    folder = tmp_path_factory.mktemp("docs")
    before, threads = Path.cwd(), torch.get_num_threads()
    torch.set_num_threads(1)
    os.chdir(folder)
    names: dict[str, object] = {}
    for code in CODE:
        exec(code, names)
    yield folder
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    os.chdir(before)
    torch.set_num_threads(threads)


def shown(command: str) -> str | None:
    """The output below a command on the page, None where there is none or where it is of several commands."""
    return dict(shown_on(TEXT)).get(command)


def test_the_page_shows_every_kind_of_data() -> None:
    for name in OWN:
        assert any(c.startswith("fit ") and f"--data.dataset {name} " in c for c in COMMANDS), name
    assert any(c.startswith("predict ") for c in COMMANDS) and "## Tar shards" in TEXT


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("data ")])
def test_looking(command: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(command)
    out = capsys.readouterr().out
    assert out == (shown(command) or out)


@pytest.mark.slow
def test_training_and_then_the_commands_afterwards(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (c for c in COMMANDS if c.startswith("fit ")):
        run(command, *SHORT)
        assert "Next:" in capsys.readouterr().out, command
    folders = sorted(home.glob("runs/*/2*"))
    configs = [yaml.safe_load((folder / "config.yaml").read_text())["data"] for folder in folders]
    assert any((data["templates"], data["classnames"]) == ("prompts.txt", "names.csv") for data in configs)
    after = [c for c in COMMANDS if "/latest" in c]
    assert len(after) == 2
    for command in after:
        run(command, *(() if command.startswith("predict") else ("--trainer.limit_test_batches", "1")))
    (written,) = re.findall(r"```text\n(predictions.csv: .*?)```", TEXT, flags=re.S)
    assert written in capsys.readouterr().out
    assert len((home / "predictions.csv").read_text().splitlines()) == 1 + 179


@pytest.mark.slow
def test_the_sweep(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config,) = (body for kind, body in BLOCKS if kind == "yaml" and "models:" in body)
    (home / "own.yaml").write_text(config.replace("data.steps: 50", "data.steps: 1"))
    dry, real, report = (c for c in COMMANDS if "own" in c.split()[1])
    run(dry)
    assert "8 " in capsys.readouterr().out
    run(real, "--only", "seed=1", "budget=16-shot")
    cells = [json.loads(file.read_text()) for file in home.glob("runs/sweeps/own/cells/*/results.json")]
    assert len(cells) == 2 and {cell["steps"] for cell in cells} == {1}
    assert {cell["data/dataset"] for cell in cells} == {"folder"}
    run(report)
    assert (home / "runs" / "sweeps" / "own" / "report" / "report.md").is_file()


def test_messages(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from randlora_pl.commands.main import main

    shutil.copytree(home / "digits", tmp_path / "digits")
    lines = (home / "digits.csv").read_text().splitlines()
    monkeypatch.chdir(tmp_path)
    Path("digits.csv").write_text("\n".join(lines))
    for line in (16, 20, 30):
        Path(lines[line].partition(",")[0]).rename(f"{line}.png")
    fit = ["fit", "--config", "quickstart", "--data.dataset", "table", "--data.root", "digits.csv"]
    assert main(fit) == 2
    for line in (16, 20, 30):
        Path(f"{line}.png").rename(lines[line].partition(",")[0])
    wrong = [f"{line},{'test' if number > 20 else 'train'}" for number, line in enumerate(lines[1:], 1)]
    wrong[20] = wrong[20].replace(",zero,", ",Zero,")
    Path("digits.csv").write_text("\n".join(["path,label,split", *wrong]))
    assert main(fit) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("randlora-pl: error: ")]
    assert told == [line for line in TEXT.splitlines() if line.startswith("randlora-pl: error: ")]


def test_links_and_extras_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (PAGE.parent / target).exists(), target
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"\.\[(\w+)\]", TEXT):
        assert re.search(rf"^{extra} = \[", settings, flags=re.M), extra
