from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from randlora_pl.callbacks import ProgressBar
from tests.callbacks.conftest import Fit


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

    monkeypatch.setattr("randlora_pl.callbacks.progress.LateCopy", Late)
    bar, trainer = ProgressBar(), SimpleNamespace(callback_metrics={"train/loss": torch.tensor(2.0)})
    bar._read(trainer)  # type: ignore[arg-type]
    trainer.callback_metrics["train/acc"] = torch.tensor(0.5)
    arrived.append(True)
    bar._read(trainer)  # type: ignore[arg-type]
    assert bar._here == {"train/loss": 2.0}
    bar._read(trainer)  # type: ignore[arg-type]
    assert bar._here == {"train/loss": 2.0, "train/acc": 0.5}
