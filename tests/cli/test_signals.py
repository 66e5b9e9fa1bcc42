"""SIGTERM before and after a training, which has a handling of its own."""

import os
import signal
from pathlib import Path

import pytest

from randlora_pl.cli import quick, stages
from tests.cli.conftest import SMALL, Run


def test_sigterm_is_told_in_a_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "datasets_verb", lambda words: signal.raise_signal(signal.SIGTERM))
    ended = run("datasets")
    assert (ended.code, ended.err) == (143, "randlora-pl: terminated\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_after_a_training_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "fit_figures", lambda app: os.kill(os.getpid(), signal.SIGTERM))
    ended = run("fit", *SMALL)
    (folder,) = Path("runs/quickstart").iterdir()
    assert (ended.code, ended.err.strip()) == (
        143,
        f"randlora-pl: terminated; go on with: randlora-pl fit --resume {folder}",
    )
