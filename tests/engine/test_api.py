"""Runs from Python."""

import logging
import os
from pathlib import Path

import pytest

import randlora_pl
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.run_results import read_results
from tests.support.cli import SMALL, Run

DIFFERENT = ("seconds", "per_second", "memory", "time", "command")


def test_fit_gives_the_run_of_the_command_line(run: Run) -> None:
    assert run("fit", *SMALL, "--model.adapter", "LoRA", "--model.adapter.rank", "3").code == 0
    (typed,) = Path("runs").glob("*/2*")
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    options = dict(zip((word.removeprefix("--") for word in SMALL[2::2]), SMALL[3::2], strict=True))
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)  # as its import does
    made = randlora_pl.fit("quickstart", options, {"model": {"adapter": "LoRA"}}, {"model.adapter.rank": 3})
    assert logging.getLogger("lightning.pytorch").level == logging.WARNING
    assert made.folder != typed and made.results["finished"]
    figures = [{k: v for k, v in r.items() if not any(word in k for word in DIFFERENT)}
               for r in (made.results, read_results(typed))]  # fmt: skip
    assert figures[0].items() == figures[1].items()
    assert made.task.adapter.options()["rank"] == 3 and made.data.row.name == "digits"
    files = [folder / "adapter" / "adapter.safetensors" for folder in (made.folder, typed)]
    assert made.adapter == files[0].parent and files[0].read_bytes() == files[1].read_bytes()


def test_a_typo_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="steps"):
        randlora_pl.fit("quickstart", {"data.stpes": 3})
    assert not list(tmp_path.iterdir())
