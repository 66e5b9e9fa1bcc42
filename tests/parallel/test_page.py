"""The page about many devices: its table is what the formula gives, its commands are ours, its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from randlora_pl.cli.main import main
from randlora_pl.engine.command import prepare
from tests.docs.pages import commands_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "many_devices.md").read_text(encoding="utf-8")


def scaling(*words: str) -> list[str]:
    command = [sys.executable, str(ROOT / "scripts" / "scaling_table.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_table_is_that_of_the_formula() -> None:
    assert [line for line in PAGE.splitlines() if line.startswith("|")] == scaling()
    (command,) = re.findall(r"scripts/scaling_table.py (.*)", PAGE)
    assert scaling(*shlex.split(command)) == scaling()
    slow = next(line for line in scaling("--bytes", "605000000") if line.startswith("| 64 | 1 x"))
    assert "191.54" in slow and "191.5 ms" in PAGE


def test_more_gpus_and_slower_links_take_longer() -> None:
    times = {tuple(line.split(" | ")[:2]): float(line.split(" | ")[2]) for line in scaling()[2:]}
    fast = [time for (_, link), time in times.items() if link != "1 x 100 Gb/s"]
    assert fast == sorted(fast)
    assert times["| 64", "1 x 100 Gb/s"] > times["| 64", "8 x 400 Gb/s"]


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
