from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch

from randlora_pl.data import ImageData
from randlora_pl.tasks import AdaptationModule, make_trainer
from randlora_pl.utils.errors import UserError

from .small import CLASSES, TEMPLATES, make


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


def test_a_model_that_a_callback_builds_knows_its_run() -> None:
    class Early(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            pl_module.configure_model()  # as Lightning's averages of weights do

    task = make("text head")
    task.set_classes(CLASSES, TEMPLATES)
    trainer = make_trainer(accelerator="cpu", precision="bf16-true", callbacks=[Early()])
    with pytest.raises(UserError, match="bf16-true would round"):
        trainer.fit(AdaptationModule(task), train_dataloaders=[])


def test_a_module_of_another_kind_may_call_its_loss_objective(digits: Callable[..., ImageData]) -> None:
    class Module(L.LightningModule):
        objective, blended_labels, image_spec = torch.nn.CrossEntropyLoss(), True, None

    data = digits()
    data.trainer = L.Trainer(accelerator="cpu", logger=False, barebones=True)
    data.trainer.strategy._lightning_module = module = Module()
    assert data.learner is module
