import csv
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import Tensor

from randlora_pl.run.callbacks import PeakMemory, ProgressBar, ProgressLines, StepNumbers, Throughput, progress
from randlora_pl.tasks.optim import schedule_factor
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


def test_peak_is_logged_and_goes_on_across_a_resume(fit: Fit) -> None:
    callback = PeakMemory()
    trainer, _, _ = fit(callback)
    assert 1 < float(trainer.logged_metrics["memory/peak_mb"]) <= callback.peak / 1e6 * 1.001
    resumed = PeakMemory()
    resumed.load_state_dict({"peak": 10**15})
    assert resumed.peak == 10**15


def test_a_run_may_log_no_step() -> None:
    logged: list[float] = []
    module = SimpleNamespace(device=torch.device("cpu"), log=lambda name, value, **_: logged.append(float(value)))
    callback = PeakMemory()
    for step in range(3):
        callback.on_train_batch_end(SimpleNamespace(global_step=step, log_every_n_steps=0), module)  # type: ignore[arg-type]
    assert len(set(logged)) == 1 and logged[0] > 0


def test_curves_are_numbered_by_the_optimizer_steps_done(fit: Fit, tmp_path: Path) -> None:
    options = {"limit_val_batches": 1, "val_check_interval": 2, "accumulate_grad_batches": 2}
    _, task, _ = fit(StepNumbers(), logger=CSVLogger(tmp_path, "", "csv"), **options)
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").open(newline="")))
    trained, validated = ([row for row in rows if row[name]] for name in ("train/loss", "val/loss"))
    assert [row["step"] for row in trained] == [row["step"] for row in validated] == ["1", "2", "3", "4"]
    for row in (*trained, *validated):  # 8 x 2 of 20 images a step
        assert float(row["epoch"]) == pytest.approx(int(row["step"]) * 16 / 20)
    rates = {name: [float(row[name]) for row in trained] for name in rows[0] if name.startswith("lr-AdamW")}
    expected = [
        task.learning_rate * schedule_factor(step, 4, task.warmup_steps, task.final_lr_fraction) for step in range(4)
    ]
    assert rates and all(found == pytest.approx(expected) for found in rates.values())


def test_rate_leaves_out_the_warm_up_and_validation(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    class Clock(Callback):
        """Each batch takes two seconds, the first ten; each validation a hundred."""

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> None:
            now[0] += 2 if index else 10

        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            now[0] += 100

    callback = Throughput()
    assert callback.per_second is None and callback.seconds == 0
    trainer, _, _ = fit(Clock(), callback, limit_val_batches=1, val_check_interval=1)
    assert callback.images == 8  # of the fourth batch; the first three warm up
    assert callback.per_second == 4.0
    assert callback.seconds == 10 + 3 * 2 + 4 * 100
    assert float(trainer.logged_metrics["speed/images_per_second"]) == 4.0
