from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl.run.callbacks import Throughput, progress
from tests.run.callbacks.conftest import Fit


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
    trainer, _, _ = fit(Clock(), callback, limit_val_batches=1, val_check_interval=1)
    assert callback.images == 8  # of the fourth batch; the first three warm up
    assert callback.per_second == 4.0
    assert callback.seconds == 10 + 3 * 2 + 4 * 100
    assert float(trainer.logged_metrics["speed/images_per_second"]) == 4.0


def test_no_rate_before_anything_was_counted() -> None:
    assert Throughput().per_second is None
    assert Throughput().seconds == 0
