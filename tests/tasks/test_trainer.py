from collections.abc import Callable
from pathlib import Path

import pytest

from randlora_pl.data import ImageData
from randlora_pl.tasks import AdaptationModule, make_trainer

from .small import make


def test_a_run_prints_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    digits: Callable[..., ImageData],
) -> None:
    monkeypatch.chdir(tmp_path)
    task, data, trainer = make("vision-language"), digits(), make_trainer(accelerator="cpu", limit_test_batches=1)
    (before,) = trainer.test(AdaptationModule(task), data, verbose=False)
    trainer.fit(AdaptationModule(task), data)
    (after,) = trainer.test(AdaptationModule(task), data, verbose=False)
    assert trainer.global_step == 3 and before["test/loss"] != after["test/loss"]
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "") and not [str(each.message) for each in recwarn]
