"""The page about your own data shows what its commands print; `tests/docs/test_shell_blocks.py` runs its trainings."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from randlora_pl.commands.main import main
from tests.docs.pages import DIGITS, PAGES, joined, shown
from tests.test_readme import run

TEXT = PAGES["docs/your_own_data.md"]
LOOKING = [
    line for body in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.S) for line in joined(body) if " data " in line
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the page's code has run."""
    pytest.importorskip("datasets", reason='the page needs the extra: pip install ".[hf]"')
    folder = tmp_path_factory.mktemp("docs")
    before = Path.cwd()
    os.chdir(folder)
    exec("\n".join([DIGITS, *re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)]), {})
    yield folder
    os.chdir(before)


def test_looking(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = dict(shown(TEXT))
    assert len(LOOKING) == 5
    for command in (line.removeprefix("randlora-pl ") for line in LOOKING):
        run(command)
        out = capsys.readouterr().out
        assert out == outputs.get(command, out)


def test_messages(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
