import csv
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from randlora_pl.run.callbacks import StepNumbers
from randlora_pl.tasks.optim import schedule_factor
from tests.run.callbacks.conftest import Fit


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
