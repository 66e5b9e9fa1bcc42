from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from randlora_pl.adapters import RandLoRA, read_adapter
from randlora_pl.run.callbacks import NonFiniteLoss, RunCheckpoint
from randlora_pl.tasks import AdaptationModule, TextHeadTask
from randlora_pl.utils.device import choose_as_on_cuda
from randlora_pl.utils.errors import UserError
from tests.run.callbacks.conftest import Fit
from tests.support.products import in_one_item
from tests.tasks.small import trained


def number_of(task: TextHeadTask, batch: dict[str, Any]) -> int:
    """The number of a micro-batch in its run."""
    return task.run.step() * task.run.micro_batches() + int(batch["micro_batch"])


class Diverging(TextHeadTask):
    """Its loss is infinite at the third step; the weights may be spoilt one step before."""

    spoils = False

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        losses, right = super().sample_losses(batch)
        if number_of(self, batch) < 2:
            return losses, right
        if self.spoils:
            with torch.no_grad():
                next(p for p in self.parameters() if p.requires_grad).fill_(torch.nan)
        return losses * torch.inf, right


class Spoiling(Diverging):
    spoils = True


@pytest.mark.parametrize(("kind", "step"), [(Diverging, 2), (Spoiling, 1)])
def test_last_good_adapter_is_kept(fit: Fit, tmp_path: Path, kind: type[TextHeadTask], step: int) -> None:
    class FirstStepOnly(RunCheckpoint):
        def _save_last(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 1:
                super()._save_last(trainer, pl_module)

    with pytest.raises(UserError, match=rf"at step 3. Lower --model.learning_rate .*\(step {step}\)"):
        fit(NonFiniteLoss(), FirstStepOnly(every_n_steps=1), task=kind("tiny", "random", adapter=RandLoRA(rank=16)))
    saved = read_adapter(tmp_path / "adapter")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.tensors.values())
    assert saved.config["metadata"]["training"]["step"] == step


def test_nothing_is_kept_where_nothing_is_good(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing"):
        fit(NonFiniteLoss(), task=Spoiling("tiny", "random", adapter=RandLoRA(rank=16)))
    assert not (tmp_path / "adapter").exists()


def test_weights_spoilt_by_the_last_step_are_not_kept(fit: Fit, tmp_path: Path) -> None:
    def spoil(trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 4:
            with torch.no_grad():
                next(p for p in module.parameters() if p.requires_grad).fill_(torch.nan)

    with pytest.raises(UserError, match=r"0\.01"):
        fit(LambdaCallback(on_train_batch_end=spoil), NonFiniteLoss(), RunCheckpoint(every_n_steps=2))
    saved = read_adapter(tmp_path / "adapter")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.tensors.values())


@pytest.mark.parametrize(("zero", "error"), [(True, UserError), (False, SystemExit)])
def test_all_processes_stop_and_the_first_one_says_why(zero: bool, error: type[BaseException]) -> None:
    strategy = SimpleNamespace(reduce_boolean_decision=lambda bad, all: not all)
    trainer: Any = SimpleNamespace(world_size=2, strategy=strategy, is_global_zero=zero, global_step=0)
    trainer.precision, trainer.default_root_dir = "32-true", "nowhere"
    spoilt = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(spoilt.weight, torch.nan)
    module = AdaptationModule(TextHeadTask("tiny", "random"))
    module.objective.backbone = spoilt
    with pytest.raises(error, match="on one of the devices" if zero else "2"):
        NonFiniteLoss().on_before_backward(trainer, module, torch.tensor(1.0))


class Weights(Callback):
    """Copies of what trains after each micro-batch."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.after.append(trained(pl_module.objective))


class OneBad(TextHeadTask):
    """The loss of one micro-batch is not finite, by ``spoil``; its gradient may be."""

    bad = 2
    spoil = staticmethod(lambda loss: loss * torch.inf)

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        losses, right = super().sample_losses(batch)
        return self.spoil(losses) if number_of(self, batch) == self.bad else losses, right


@in_one_item(
    ("bad", "accumulate", "clip", "word", "every"),
    [
        *((2, 1, 1.0, "inf", 2), (2, 1, None, "nan", 2), (2, 1, 1.0, "inf", 1), (4, 2, 1.0, "constant", 2)),
        *((5, 2, None, "inf", 2), (7, 2, 1.0, "inf", 3)),
    ],
)
def test_no_non_finite_loss_changes_weights_where_the_device_checks(
    fit: Fit, tmp_path: Path, bad: int, accumulate: int, clip: float | None, word: str, every: int
) -> None:
    """As on a GPU, whose host reads the loss one step later: also in the middle of a step, and in the last one."""
    spoils: dict[str, Any] = {
        "inf": lambda loss: loss * torch.inf,
        "nan": lambda loss: loss * torch.nan,
        "constant": lambda loss: loss + torch.inf,  # the gradient is finite
    }
    task = OneBad("tiny", "random", adapter=RandLoRA(rank=16), max_grad_norm=clip)
    task.bad, task.spoil = bad, spoils[word]
    step, weights = bad // accumulate + 1, Weights()
    stopped = rf"the loss is {'nan' if word == 'nan' else 'inf'} at step {step}. Lower .*\(step {step - 1}\)"
    options = {"default_root_dir": tmp_path, "accumulate_grad_batches": accumulate}
    with choose_as_on_cuda(), pytest.raises(UserError, match=stopped):
        fit(weights, NonFiniteLoss(), RunCheckpoint(every_n_steps=every), task=task, **options)
    whole, before = bad - bad % accumulate, trained(task)  # micro-batches of whole steps before
    late = every > 1  # a checkpoint reads at once
    assert len(weights.after) == min(4 * accumulate, whole + accumulate * (1 + late)), "not more than a step later"
    assert all(torch.equal(weights.after[whole - 1][name], value) for name, value in before.items())
    assert any(not torch.equal(weights.after[0][name], value) for name, value in before.items())
    saved = read_adapter(tmp_path / "adapter")
    assert saved.config["metadata"]["training"]["step"] == step - 1
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == step - 1, "a resumed run repeats the bad step"


@pytest.mark.parametrize(("scale", "stops"), [(2.0**10, True), (2.0**120, False)])
def test_a_scaler_skips_a_non_finite_loss_and_its_own_overflow(fit: Fit, scale: float, stops: bool) -> None:
    """The latter, of 16-mixed, ends no run."""
    task, weights = OneBad("tiny", "random", adapter=RandLoRA(rank=16)), Weights()
    task.bad = 2 if stops else -1
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    with choose_as_on_cuda(), pytest.raises(UserError, match="inf at step 3") if stops else nullcontext():
        fit(weights, NonFiniteLoss(), task=task, plugins=[plugin], precision=None, max_steps=4 if stops else 2)
    if stops:
        assert all(torch.equal(weights.after[1][name], value) for name, value in trained(task).items())
    else:
        assert scaler.get_scale() < scale, "an overflow was found"


def test_the_device_checks_to_the_same_weights(fit: Fit) -> None:
    """Of a finite run."""
    _, plain, _ = fit(NonFiniteLoss())
    with choose_as_on_cuda():
        _, watched, _ = fit(NonFiniteLoss())
        _, unwatched, _ = fit()
    for name, value in trained(watched).items():
        assert torch.equal(trained(unwatched)[name], value)
        torch.testing.assert_close(trained(plain)[name], value)
