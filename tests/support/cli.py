"""Run the command line in process, in an empty folder."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from randlora_pl.commands.main import main
from tests.support.shared import made_once

SMALL = [
    *("--config", "quickstart", "--model.pretrained", "random", "--data.shots", "2", "--data.batch_size", "8"),
    *("--model.learning_rate", "null", "--model.warmup_steps", "0"),  # those of the method
    *("--data.steps", "3", "--data.eval_batch_size", "32", "--trainer.limit_test_batches", "1"),
    *("--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
]
"""A run of the tiny CLIP with random weights that takes about a second once everything is imported."""


@dataclass
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]
Refused = Callable[..., str]


@pytest.fixture
def drawn() -> None:
    """Let `run` draw the plots of tests. Otherwise they are white, because a fifth of a tiny run would draw them."""


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Run:
    """`main` in an empty folder, with what it printed."""
    plots = sys.modules.get("randlora_pl.run.callbacks.figures")
    if plots is not None and "drawn" not in request.fixturenames:
        import numpy as np

        white = np.full((8, 8, 3), 255, np.uint8)
        monkeypatch.setattr(plots, "pixels", lambda figure: white)
        for name in ("confusion_figure", "samples_figure"):
            monkeypatch.setattr(plots, name, lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANDLORA_PL_TRACEBACK", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)  # some libraries set it, and tables are cut to it
    monkeypatch.setattr(os, "environ", os.environ.copy())
    capsys.readouterr()

    def call(*args: str) -> Result:
        os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
        code = main(list(args))
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Refused:
    """The message of a command that must end with one or two lines, code 2, and no file written."""

    def call(*args: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = run(*args)
        assert result.code == 2
        warned = [line for line in result.err.splitlines() if " images here, expected " in line]
        lines = [line for line in result.err.strip().splitlines() if line not in warned]  # tests' copies are tiny
        assert 1 <= len(lines) <= 2, result.err
        assert lines[0].startswith("randlora-pl: error: ")
        assert "Traceback" not in result.err and "usage" not in result.err
        assert sorted(tmp_path.rglob("*")) == before
        return result.err

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a model with two blocks, to be read only."""

    def make(root: Path) -> None:
        from tests.tasks.small import two_blocks  # here, because it imports all there is

        with two_blocks():
            assert main(["fit", *SMALL, "--run.root", str(root), "--trainer.val_check_interval", "1"]) == 0
        os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)

    return next((made_once(tmp_path_factory, "finished", make) / "quickstart").glob("2*"))
