import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback

from randlora_pl import __version__
from randlora_pl.adapters import RandLoRA, read_adapter, trainable_parameters
from randlora_pl.data import ImageData
from randlora_pl.run.callbacks import Patience, RunCheckpoint, ValidationSchedule
from randlora_pl.run.callbacks.checkpoint import CheckpointFile, is_finite, steps_between, validations
from randlora_pl.tasks import LOSS, AdaptationModule, Measure, TextHeadTask, make_trainer
from randlora_pl.tasks.measures import ACCURACY
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.run_files import LAST
from tests.run.callbacks.conftest import Fit
from tests.support.products import in_one_item
from tests.tasks.small import trained


def test_last_checkpoint_follows_the_optimizer_steps(fit: Fit, tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / "last.ckpt"
    steps: list[int] = []

    def note(*_: Any) -> None:
        if file.is_file():
            steps.append(torch.load(file, weights_only=True)["global_step"])

    fit(RunCheckpoint(every_n_steps=2), LambdaCallback(on_train_batch_start=note), accumulate_grad_batches=3)
    assert steps == [2] * 6  # before each micro-batch of the steps 3 and 4
    assert torch.load(file, weights_only=True)["global_step"] == 4
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]  # no temporary file is left


def test_adapter_folder_holds_the_last_weights(fit: Fit, tmp_path: Path) -> None:
    _, task, _ = fit(RunCheckpoint())
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

        log = LambdaCallback(on_validation_epoch_end=lambda _, task, own=figures: task.log("val/own", next(own)))
        checkpoint = RunCheckpoint(monitor="val/own", mode=mode)
        fit(log, checkpoint, limit_val_batches=1, val_check_interval=1)
        assert checkpoint.best_step == best
        training = read_adapter(tmp_path / "adapter-best").config["metadata"]["training"]
        assert training["step"] == best and training["val/own"] == pytest.approx(checkpoint.best)
        assert checkpoint.validated["val/own"] == pytest.approx(0.3)


def test_spoilt_weights_do_not_replace_a_good_checkpoint(fit: Fit, tmp_path: Path) -> None:
    def spoil(trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 3:
            with torch.no_grad():
                next(p for p in module.parameters() if p.requires_grad).fill_(torch.inf)

    _, task, _ = fit(LambdaCallback(on_train_batch_end=spoil), RunCheckpoint(every_n_steps=1))
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
    def stop(trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = args[-1] == 6  # the first micro-batch of the third step

    fit(LambdaCallback(on_train_batch_end=stop), RunCheckpoint(every_n_steps=2), accumulate_grad_batches=3)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    done = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
    assert done == 6


def test_the_counts_of_a_repeated_validation_are_those_of_a_whole_one(fit: Fit) -> None:
    trainer, task, _ = fit(checkpoint := RunCheckpoint())
    repeated = {"ready": 3, "started": 3, "processed": 2, "completed": 2}  # Lightning takes these for an unfinished one
    saved = {"loops": {"fit_loop": {"epoch_loop.val_loop.batch_progress": {"total": repeated, "current": {}}}}}
    checkpoint.on_save_checkpoint(trainer, task, saved)
    progress = saved["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    assert progress == {"total": dict.fromkeys(repeated, 2), "current": {}}


def test_the_task_has_the_metric_that_selects_the_best_adapter() -> None:
    wide = Measure("wide", validated=False)
    for measures, given, wanted in (
        ((wide, Measure("mae", mode="min"), LOSS), {}, ("val/mae", "min")),
        ((wide,), {}, ("val/loss", "min")),
        ((ACCURACY, LOSS), {}, ("val/acc", "max")),
        ((ACCURACY, LOSS), {"monitor": "val/loss"}, ("val/loss", "min")),
        ((ACCURACY, LOSS), {"mode": "min"}, ("val/acc", "min")),
    ):
        kind = type("Measured", (TextHeadTask,), {"measures": measures})
        checkpoint = RunCheckpoint(**given)
        checkpoint.setup(make_trainer(accelerator="cpu"), AdaptationModule(kind("tiny")), "fit")
        assert (checkpoint.monitor, checkpoint.mode) == wanted


def test_impossible_options() -> None:
    with pytest.raises(UserError, match="positive"):
        RunCheckpoint(every_n_steps=0)
    with pytest.raises(UserError, match="max or min"):
        RunCheckpoint(mode="best")


@in_one_item(
    ("steps", "samples", "held_out", "global_batch", "wanted"),
    [
        (203, 1294, 143, 64, 21),  # all digits for ten epochs: once a pass
        (125, 160, 143, 64, 18),  # few shots: a validation is larger than a pass
        (125, 160, 1430, 64, 25),  # and five times in any run
        (10_000, 64_000, 0, 64, 1000),
        (102, 19, 2, 64, 6),  # and at most twenty times
        (10, 8, 1, 64, 1),
        (9, 8, 1, 64, 9),  # a trial
        (1, 8, 1, 64, 1),
    ],
)
def test_validations_are_a_pass_apart(steps: int, samples: int, held_out: int, global_batch: int, wanted: int) -> None:
    plan = SimpleNamespace(num_samples=samples, global_batch=global_batch)
    assert steps_between(steps, SimpleNamespace(held_out=held_out, plan=plan)) == wanted


class Seen(Callback):
    """The steps that were validated, and a death at one of them: within it, or once all of it is saved."""

    def __init__(self, dies_in: int | None = None, dies_after: int | None = None) -> None:
        self.steps: list[int] = []
        self.dies_in, self.dies_after = dies_in, dies_after

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.dies_in:
            raise RuntimeError("killed")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)
        if trainer.global_step == self.dies_after:
            raise RuntimeError("killed")


Go = Callable[..., tuple[Trainer, TextHeadTask]]


@pytest.fixture
def go(tmp_path: Path) -> Go:
    """Trains on eight digits a step; two steps apart validations on the loss, of which the highest is the best."""

    def call(seen: Seen, steps: int, patience: int | None = None, folder: str = "run", **options: Any) -> Any:
        data = ImageData(dataset="digits", shots=2, steps=steps, batch_size=8, eval_batch_size=64)
        task = TextHeadTask("tiny", "random", adapter=RandLoRA(rank=16))
        ends = [] if patience is None else [Patience("val/loss", "max", patience)]
        kept = RunCheckpoint(monitor="val/loss", mode="max", patience=patience)
        callbacks = [ValidationSchedule(), *ends, kept, seen]
        options = {"limit_val_batches": 1, "accelerator": "cpu", "callbacks": callbacks} | options
        trainer = make_trainer(default_root_dir=tmp_path / folder, **options)
        start = tmp_path / folder / LAST
        trainer.fit(AdaptationModule(task), data, ckpt_path=start if start.is_file() else None, weights_only=True)
        return trainer, task

    return call


@pytest.mark.parametrize(
    ("steps", "options", "wanted"),
    [
        (11, {"accumulate_grad_batches": 2}, [2, 4, 6, 8, 10, 11]),
        pytest.param(30, {"max_steps": 11}, [2, 4, 6, 8, 10, 11], marks=pytest.mark.full),
        pytest.param(4, {}, [4], marks=pytest.mark.full),
        (2, {"limit_val_batches": 0}, []),
    ],
)
def test_a_run_is_validated_in_between_and_at_its_end(
    steps: int, options: dict[str, Any], wanted: list[int], go: Go
) -> None:
    trainer, _ = go(seen := Seen(), steps, **options)
    assert seen.steps == wanted and trainer.global_step == min(steps, 11)
    assert validations(trainer, trainer.datamodule) == len(wanted)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "death", [{"dies_in": 6}, *(pytest.param({"dies_after": step}, marks=pytest.mark.full) for step in (4, 6))], ids=str
)
def test_a_killed_run_loses_patience_at_the_same_step(death: dict[str, int], go: Go) -> None:
    _, whole = go(undisturbed := Seen(), 12, 2, folder="whole")
    assert undisturbed.steps == [2, 4, 6]
    with pytest.raises(RuntimeError, match="killed"):
        go(first := Seen(**death), 12, 2)
    trainer, resumed = go(second := Seen(), 12, 2)
    assert trainer.global_step == 6 and trainer.should_stop
    assert [*first.steps, *second.steps] == undisturbed.steps
    assert all(torch.equal(value, trained(whole)[name]) for name, value in trained(resumed).items())


@pytest.mark.parametrize("death", [{"dies_in": 11}, pytest.param({"dies_after": 11}, marks=pytest.mark.full)], ids=str)
def test_a_run_that_was_killed_in_its_last_validation_repeats_it(death: dict[str, int], go: Go) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        go(first := Seen(**death), 11)
    trainer, _ = go(second := Seen(), 11)
    assert [*first.steps, *second.steps] == [2, 4, 6, 8, 10, 11] and trainer.global_step == 11


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}])
def test_patience_without_validations_is_refused(options: dict[str, Any], go: Go) -> None:
    with pytest.raises(UserError, match="patience"):
        go(Seen(), 12, 2, **options)
    with pytest.raises(UserError, match="patience"):
        RunCheckpoint(patience=0)
