"""A run that is broken off after some optimizer step and taken up again ends with the same bits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from randlora_pl.adapters import Adapter, Fira, LoRA, ProjectedAdamW, RandLoRA, SHiRA, Together
from randlora_pl.adapters.methods import shira
from randlora_pl.adapters.trained import update_buffers
from randlora_pl.data import ImageData
from randlora_pl.tasks import AdaptationModule, Objective
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item, marked

from .small import make, trained

Make = Callable[..., Any]
STEPS = 4


class SaveAt(L.Callback):
    """Saves where a run would be killed: at the end of the batch that completes an optimizer step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Rates(L.Callback):
    """Learning rate, positions and loss of every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, list[int], float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append((rate, batch["position"].tolist(), float(outputs["loss"])))


def task(kind: str = "vision-language", **options: Any) -> Objective:
    return make(kind, **{"adapter": RandLoRA(rank=16, dropout=0.2)} | options)


@pytest.fixture
def run(trainer: Make, digits: Make) -> Make:
    """Trains a new task on new data with a new trainer; returns the trainer and what was seen."""

    def go(own: Objective, data: dict[str, Any], start: Path | None = None, **options: Any) -> Any:
        callbacks = [rates := Rates(), *options.pop("callbacks", [])]
        new: L.Trainer = trainer(callbacks=callbacks, **options)
        images: ImageData = digits(**data)
        new.fit(AdaptationModule(own), images, ckpt_path=start, weights_only=True)
        return new, rates.seen

    return go


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("step", "accumulate", "sampling"),
    marked(
        [
            (1, 1, "with_replacement"),
            (3, 1, "epochs"),
            (1, 3, "epochs"),
            (3, 3, "with_replacement"),
            (STEPS, 1, "with_replacement"),
            (STEPS, 3, "epochs"),
        ],
        lambda row: row == (3, 3, "with_replacement"),
    ),
)
def test_resumed_run_ends_with_the_same_bits(
    step: int, accumulate: int, sampling: str, run: Make, tmp_path: Path
) -> None:
    data = {"steps": STEPS, "batch_size": 4, "sampling": sampling}
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    adapter: Adapter = RandLoRA(rank=16, dropout=0.2)
    if accumulate > 1:  # with three groups of the optimizer, or one
        adapter = Together([LoRA(rank=2, dropout=0.1, rate_ratio=4), adapter], rates=[5, 0.5])
    whole, path = task(adapter=adapter), tmp_path / "middle.ckpt"
    _, undisturbed = run(whole, data, callbacks=[SaveAt(path, step)], **options)
    torch.manual_seed(123)  # another process has another state
    resumed = task(adapter=adapter)
    trainer, seen = run(resumed, data, path, **options)
    assert trainer.global_step == STEPS
    assert seen == undisturbed[step * accumulate :]
    assert_same_bits(trained(resumed), trained(whole))
    assert len(undisturbed) == STEPS * accumulate


def test_projected_moments_resume_before_and_after_a_new_projection(run: Make, tmp_path: Path) -> None:
    data = {"steps": STEPS, "batch_size": 4}
    make_fira = partial(make, "linear head", adapter=Fira(rank=4, period=2), learning_rate=1e-3)
    whole, saves = make_fira(), [SaveAt(tmp_path / f"{step}.ckpt", step) for step in (2, 3)]
    first, undisturbed = run(whole, data, callbacks=saves)
    assert isinstance(first.optimizers[0], ProjectedAdamW)
    for save in saves:
        _, seen = run(resumed := make_fira(), data, save.path)
        assert seen == undisturbed[save.step :]
        assert_same_bits(trained(resumed), trained(whole))


@in_one_item("places", ["random", "top"])
def test_places_come_from_the_checkpoint(places: Any, run: Make, tmp_path: Path, monkeypatch: Any) -> None:
    data = {"steps": STEPS, "batch_size": 4}
    make_shira = partial(make, "linear head", adapter=SHiRA(rank=2, places=places))
    whole, path = make_shira(), tmp_path / "middle.ckpt"
    _, undisturbed = run(whole, data, callbacks=[SaveAt(path, 2)])
    monkeypatch.setattr(shira, "distinct", lambda seed, name, count, size: torch.arange(count))  # another version
    resumed = make_shira()
    _, seen = run(resumed, data, path)
    assert seen == undisturbed[2:]
    assert_same_bits(trained(resumed) | update_buffers(resumed), trained(whole) | update_buffers(whole))


@pytest.mark.parametrize(("kind",), marked(zip(["linear head", "text head"]), lambda row: row[0] == "linear head"))
def test_other_tasks_resume_too_into_a_shorter_last_step(kind: str, run: Make, tmp_path: Path) -> None:
    """40 samples of 12 a step, in micro-batches of 4: the last step has one micro-batch."""
    data = {"steps": None, "epochs": 1, "shots": 4, "min_batches_per_epoch": 1, "batch_size": 4}
    whole, path = task(kind), tmp_path / "middle.ckpt"
    _, undisturbed = run(whole, data, callbacks=[SaveAt(path, 2)], accumulate_grad_batches=3)
    assert len(undisturbed) == 10
    resumed = task(kind)
    _, seen = run(resumed, data, path, accumulate_grad_batches=3)
    assert seen == undisturbed[6:]
    assert_same_bits(trained(resumed), trained(whole))


def test_augmented_runs_resume_too(run: Make, tmp_path: Path) -> None:
    extra = {"randaugment": 9, "mixup": 0.3, "cutmix": 1.0, "balance": "sampler"}
    data = {"steps": STEPS, "batch_size": 4, "sampling": "epochs"} | extra
    whole, path = task("text head", label_smoothing=0.1), tmp_path / "middle.ckpt"
    _, undisturbed = run(whole, data, callbacks=[SaveAt(path, 2)], accumulate_grad_batches=2)
    torch.manual_seed(123)
    resumed = task("text head", label_smoothing=0.1)
    _, seen = run(resumed, data, path, accumulate_grad_batches=2)
    assert seen == undisturbed[4:]
    assert_same_bits(trained(resumed), trained(whole))
    with pytest.raises(UserError, match="softmax"):
        run(task(), data)


def test_runs_with_validations_resume_too(run: Make, tmp_path: Path) -> None:
    data, path = {"steps": STEPS, "batch_size": 4}, tmp_path / "middle.ckpt"
    options: dict[str, Any] = {"val_check_interval": 2, "limit_val_batches": 1, "accumulate_grad_batches": 2}
    whole, resumed = task(), task()
    run(whole, data, callbacks=[SaveAt(path, 3)], **options)
    _, seen = run(resumed, data, path, **options)
    assert len(seen) == 2 * (STEPS - 3)
    assert_same_bits(trained(resumed), trained(whole))


def test_checkpoint_within_an_optimizer_step_is_refused(run: Make, tmp_path: Path) -> None:
    """Its gradient is lost."""

    class SaveWithin(SaveAt):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            if batch["micro_batch"] == 1:
                super().on_train_batch_end(trainer)

    data, path = {"steps": 2, "batch_size": 4}, tmp_path / "middle.ckpt"
    run(task("linear head"), data, callbacks=[SaveWithin(path, 1)], accumulate_grad_batches=3)
    with pytest.raises(UserError, match="micro-batches"):
        run(task("linear head"), data, path, accumulate_grad_batches=3)


def test_typed_rates_beat_those_of_the_checkpoint(run: Make, tmp_path: Path) -> None:
    data, path = {"steps": STEPS, "batch_size": 4}, tmp_path / "middle.ckpt"
    _, undisturbed = run(task(), data, callbacks=[SaveAt(path, 2)])
    other = task(learning_rate=5e-4, weight_decay=0.3)
    trainer, seen = run(other, data, path)
    assert [rate for rate, *_ in seen] == pytest.approx([rate / 2 for rate, *_ in undisturbed[2:]])
    assert {group["weight_decay"] for group in trainer.optimizers[0].param_groups} == {0.3}
