import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor

from randlora_pl.run.callbacks import ProgressBar, ProgressLines
from tests.run.callbacks.conftest import Fit


def test_bar_of_the_whole_training_says_so(fit: Fit) -> None:
    bar = ProgressBar()
    trainer, task, _ = fit(bar, enable_progress_bar=True)
    assert bar._get_train_description(0) == "Training"
    assert "v_num" not in bar.get_metrics(trainer, task)
    assert bar.refresh_rate >= 10, "a stage ends after a refresh"
    assert "train/acc" in bar.get_metrics(trainer, task)


def test_metrics_that_arrive_late_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = []

    class Late:
        def __init__(self, values: Tensor) -> None:
            self.values = values

        arrived = property(lambda _: bool(arrived))

        def read(self) -> Tensor:
            return self.values

    monkeypatch.setattr("randlora_pl.run.callbacks.progress.LateCopy", Late)
    bar, trainer = ProgressBar(), SimpleNamespace(callback_metrics={"train/loss": torch.tensor(2.0)})
    bar._read(trainer)  # type: ignore[arg-type]
    trainer.callback_metrics["train/acc"] = torch.tensor(0.5)
    arrived.append(True)
    bar._read(trainer)  # type: ignore[arg-type]
    assert bar._here == {"train/loss": 2.0}
    bar._read(trainer)  # type: ignore[arg-type]
    assert bar._here == {"train/loss": 2.0, "train/acc": 0.5}


def test_a_log_file_gets_lines_and_a_terminal_gets_none(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("randlora_pl.run.callbacks.progress.LINE_SECONDS", 0.0)
    fit(ProgressLines(), limit_val_batches=3, data={"eval_batch_size": 48})
    lines = [line for line in capsys.readouterr().out.splitlines() if " of " in line]
    assert [line.partition(" of ")[0] for line in lines] == [
        "step 1",
        "step 2",
        "step 3",
        "validation: 1",
        "validation: 2",
    ]
    metrics = r"train/loss [\d.]+, train/acc [\d.]+"
    assert re.fullmatch(r"step 2 of 4, [\d.e+]+ (steps/s|s/step), \d+ s left, " + metrics, lines[1])
    monkeypatch.setattr("randlora_pl.run.callbacks.progress.LINE_SECONDS", 30.0)
    fit(ProgressLines())
    monkeypatch.setattr("randlora_pl.run.callbacks.progress.LINE_SECONDS", 0.0)
    monkeypatch.setattr("randlora_pl.run.callbacks.progress.Console", partial(Console, force_interactive=True))
    fit(ProgressLines())
    assert "step" not in capsys.readouterr().out
