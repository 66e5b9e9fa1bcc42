"""SIGTERM before and after a training, which has a handling of its own."""

import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.commands import inspect as quick
from randlora_pl.run import stages
from tests.support.cli import SMALL, Run


def test_sigterm_is_told_in_a_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "datasets", lambda: signal.raise_signal(signal.SIGTERM))
    ended = run("datasets")
    assert (ended.code, ended.err) == (143, "randlora-pl: terminated\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_within_a_callback_that_drops_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Thing:
        pass

    def datasets() -> int:
        thing = Thing()
        reference: Any = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
        del thing
        time.sleep(0.1)
        return 0 if reference() is None else 1

    monkeypatch.setattr(quick, "datasets", datasets)
    ended = run("datasets")
    assert (ended.code, ended.err) == (143, "randlora-pl: terminated\n")


def test_sigterm_after_a_training_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "fit_metrics", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    ended = run("fit", *SMALL)
    (folder,) = Path("runs/quickstart").glob("2*")
    assert (ended.code, ended.err.strip()) == (
        143,
        f"randlora-pl: terminated; resume with: randlora-pl fit --resume {folder}",
    )
