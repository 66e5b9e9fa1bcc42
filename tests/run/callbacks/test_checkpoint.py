import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl import __version__
from randlora_pl.adapters import read_adapter, trainable_parameters
from randlora_pl.run.callbacks import AdapterCheckpoint
from randlora_pl.run.callbacks.checkpoint import CheckpointFile, is_finite
from randlora_pl.utils.errors import UserError
from tests.run.callbacks.conftest import Fit


class Saves(Callback):
    """Notes the step of every checkpoint that is in its place."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.file.is_file():
            self.steps.append(torch.load(self.file, weights_only=True)["global_step"])


def test_last_checkpoint_follows_the_optimizer_steps(fit: Fit, tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / "last.ckpt"
    saves = Saves(file)
    fit(AdapterCheckpoint(every_n_steps=2), saves, accumulate_grad_batches=3)
    assert saves.steps == [2] * 6  # before each micro-batch of the steps 3 and 4
    assert torch.load(file, weights_only=True)["global_step"] == 4
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]  # no temporary file is left


def test_adapter_folder_holds_the_last_weights(fit: Fit, tmp_path: Path) -> None:
    _, task, _ = fit(AdapterCheckpoint())
    saved = read_adapter(tmp_path / "adapter")
    expected = trainable_parameters(task.model)
    assert saved.tensors.keys() == expected.keys()
    assert all(torch.equal(saved.tensors[name], expected[name]) for name in expected)
    training = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["metadata"]["training"]
    assert training["step"] == 4 and training["frame"]["size"] == 32
    assert (training["dataset"], training["steps"], training["randlora_pl"]) == ("digits", 4, __version__)


def test_best_adapter_is_the_one_of_the_best_validation(fit: Fit, tmp_path: Path) -> None:
    for mode, best in (("max", 2), ("min", 1)):
        figures = iter([0.3, 0.9, 0.9, 0.3])  # of equal ones the first is the best

        class Figures(Callback):
            def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
                pl_module.log("val/own", next(figures))  # noqa: B023 - used in this round only

        checkpoint = AdapterCheckpoint(monitor="val/own", mode=mode)
        fit(Figures(), checkpoint, limit_val_batches=1, val_check_interval=1)
        assert checkpoint.best_step == best
        training = read_adapter(tmp_path / "adapter-best").config["metadata"]["training"]
        assert training["step"] == best and training["val/own"] == pytest.approx(checkpoint.best)
        assert checkpoint.validated["val/own"] == pytest.approx(0.3)


def test_spoilt_weights_do_not_replace_a_good_checkpoint(fit: Fit, tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if trainer.global_step == 3:
                with torch.no_grad():
                    next(p for p in pl_module.parameters() if p.requires_grad).fill_(torch.inf)

    _, task, _ = fit(Spoil(), AdapterCheckpoint(every_n_steps=1))
    assert not is_finite(task)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_flipped_bit_is_noticed_by_the_checksum(tmp_path: Path) -> None:
    file, numbers = tmp_path / "last.ckpt", torch.arange(100.0)
    CheckpointFile().save_checkpoint({"numbers": numbers}, file)
    content = bytearray(file.read_bytes())
    content[content.index(numbers.numpy().tobytes()) + 50] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="bad checksum"):
        CheckpointFile().load_checkpoint(file)


def test_end_between_two_micro_batches_keeps_the_last_whole_step(fit: Fit, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = args[-1] == 6  # the first micro-batch of the third step

    fit(Stop(), AdapterCheckpoint(every_n_steps=2), accumulate_grad_batches=3)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    done = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
    assert done == 6


def test_the_counts_of_a_repeated_validation_are_those_of_a_whole_one(fit: Fit) -> None:
    trainer, task, _ = fit(checkpoint := AdapterCheckpoint())
    repeated = {"ready": 3, "started": 3, "processed": 2, "completed": 2}  # Lightning takes these for an unfinished one
    saved = {"loops": {"fit_loop": {"epoch_loop.val_loop.batch_progress": {"total": repeated, "current": {}}}}}
    checkpoint.on_save_checkpoint(trainer, task, saved)
    progress = saved["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    assert progress == {"total": dict.fromkeys(repeated, 2), "current": {}}


def test_impossible_options() -> None:
    with pytest.raises(UserError, match="positive"):
        AdapterCheckpoint(every_n_steps=0)
    with pytest.raises(UserError, match="max or min"):
        AdapterCheckpoint(mode="best")
