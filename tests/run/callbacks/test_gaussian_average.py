"""The mean over epochs: its weights, its values, and the same bits after an interruption."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from randlora_pl.adapters import LoRA, read_adapter
from randlora_pl.data import ImageData
from randlora_pl.run.callbacks import GaussianAverage, RunCheckpoint
from randlora_pl.run.callbacks.checkpoint import gaussian_weights
from randlora_pl.tasks import AdaptationModule, TextHeadTask, make_trainer
from randlora_pl.utils.errors import UserError
from tests.tasks.prompt.learners import make_prompts
from tests.tasks.small import trained

EPOCHS = 4


class EachEpoch(Callback):
    """Keeps the values at the end of each epoch: 10 images in steps of 4; saves after a step."""

    ends = (3, 5, 8, 10)

    def __init__(self, path: Path | None = None, step: int = 4) -> None:
        self.values: list[dict[str, Tensor]] = []
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch["micro_batch"] != batch["micro_batches"] - 1:
            return
        if trainer.global_step in self.ends:
            self.values.append(trained(pl_module.objective))
        if trainer.global_step == self.step and self.path is not None:
            trainer.save_checkpoint(self.path)


def run(folder: Path, *callbacks: Callback, start: Path | None = None, steps: int | None = None) -> TextHeadTask:
    task = TextHeadTask("tiny", "random", adapter=LoRA(rank=2, alpha=8), learning_rate=0.01)
    length = {"steps": steps} if steps else {"epochs": EPOCHS, "min_batches_per_epoch": 1}
    trainer = make_trainer(
        accelerator="cpu",
        limit_val_batches=0,
        accumulate_grad_batches=2,
        callbacks=[*callbacks],
        default_root_dir=folder,
    )
    data = ImageData(dataset="digits", shots=1, batch_size=2, **length)  # type: ignore[arg-type]
    trainer.fit(AdaptationModule(task), data, ckpt_path=start, weights_only=True)
    return task


def test_weights_are_those_of_a_normal_distribution() -> None:
    weights = gaussian_weights(50, 30, 30)
    density = [math.exp(-((epoch - 30) ** 2) / 1800) for epoch in range(1, 51)]
    assert weights == pytest.approx([each / sum(density) for each in density])
    assert sum(weights) == pytest.approx(1)
    assert gaussian_weights(5, 3, 1e-9) == [0, 0, 1, 0, 0]
    assert gaussian_weights(5, 9, 1e-3) == [0, 0, 0, 0, 1]  # beyond the run
    with pytest.raises(UserError, match="sigma is 0"):
        GaussianAverage(sigma=0)


def test_a_run_ends_with_the_mean_also_after_an_interruption(tmp_path: Path) -> None:
    middle = tmp_path / "middle.ckpt"
    each, mean = EachEpoch(middle), GaussianAverage(mu=3, sigma=1)
    task = run(tmp_path, mean, each, RunCheckpoint())
    weights = gaussian_weights(EPOCHS, 3, 1)
    assert len(each.values) == EPOCHS
    for name, value in trained(task).items():
        parts = [weight * values[name].double() for weight, values in zip(weights, each.values, strict=True)]
        torch.testing.assert_close(value, torch.stack(parts).sum(0).float(), rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, each.values[-1][name])
    saved = read_adapter(tmp_path / "adapter").tensors
    assert sum(any(torch.equal(value, other) for other in saved.values()) for value in trained(task).values()) == len(
        trained(task)
    )
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.equal(last["state_dict"][f"objective.{name}"], value) for name, value in each.values[-1].items())
    for start in (middle, tmp_path / "checkpoints" / "last.ckpt"):
        again = run(tmp_path, GaussianAverage(mu=3, sigma=1), start=start)
        assert all(torch.equal(value, trained(task)[name]) for name, value in trained(again).items())


def test_a_small_deviation_selects_one_epoch_and_equal_values_stay(tmp_path: Path) -> None:
    each = EachEpoch()
    task = run(tmp_path, GaussianAverage(mu=2, sigma=1e-6), each)
    assert all(torch.equal(value, each.values[1][name]) for name, value in trained(task).items())
    mean, module = GaussianAverage(mu=3, sigma=2), torch.nn.Linear(3, 2)
    data = SimpleNamespace(epochs=7, finished_epochs=lambda step: step)
    mean.on_train_start(SimpleNamespace(datamodule=data, global_step=0), module)  # type: ignore[arg-type]
    for step in range(1, 8):
        mean.on_train_batch_end(SimpleNamespace(datamodule=data, global_step=step), module)  # type: ignore[arg-type]
    assert all(torch.equal(value, mean._mean[name]) for name, value in module.named_parameters())
    with pytest.raises(UserError, match=r"--data\.epochs"):
        run(tmp_path, GaussianAverage(), steps=2)
    trainer, two_stages = SimpleNamespace(datamodule=SimpleNamespace(epochs=4)), make_prompts("two stages")
    with pytest.raises(UserError, match=r"set --model\.classifier_steps 0, or remove the callback"):
        GaussianAverage().setup(trainer, AdaptationModule(two_stages), "test")  # type: ignore[arg-type]
