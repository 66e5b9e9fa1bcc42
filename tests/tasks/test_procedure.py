"""A method's procedure runs right after each optimizer step, and its state is in checkpoints."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import LoRA, inject, load_adapter, register, save_adapter
from randlora_pl.adapters.base import Procedure, all_finite
from randlora_pl.tasks import AdaptationModule

from .small import make, trained
from .test_resume import SaveAt, assert_same_bits

Make = Callable[..., Any]
STEPS, SLOPE = 4, 10.0


class Shrink(Procedure):
    """Adds the sum of B to the loss, times a slope, and B times a sum of gradients that it has seen to B."""

    def __init__(self, model: nn.Module) -> None:
        self.own = [value for name, value in model.named_parameters() if name.endswith(".B")]
        self.calls: list[tuple[int, int]] = []
        self.seen: Tensor

    def start(self, model: nn.Module) -> None:
        self.seen = torch.zeros(())

    def penalty(self) -> Tensor:
        return SLOPE * torch.stack([value.sum() for value in self.own]).sum()

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        super().after_step(step, total)
        self.calls.append((step, total))
        for value in self.own:
            assert value.grad is not None
            self.seen = self.seen + value.grad.norm()
            value.mul_(1 + self.seen)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"].clone()

    def finish(self) -> dict[str, Any]:
        return {"shrink/seen": float(self.seen)}


@register
class Shrunk(LoRA):
    """LoRA with that procedure, under LoRA's name, by which checkpoints find methods."""

    @classmethod
    def method(cls) -> str:
        return "LoRA"

    def procedure(self, model: nn.Module) -> Procedure:
        return Shrink(model)


def run(trainer: Make, digits: Make, start: Path | None = None, **options: Any) -> Any:
    task = make("text head", adapter=Shrunk(rank=2, alpha=8))
    batch_size, accumulate = options.pop("batch_size", 6), options.get("accumulate_grad_batches", 1)
    data = digits(steps=STEPS, batch_size=batch_size // accumulate)
    trainer(**options).fit(AdaptationModule(task), data, ckpt_path=start, weights_only=True)
    return task


def test_a_resumed_run_ends_with_the_same_bits_from_every_step(trainer: Make, digits: Make, tmp_path: Path) -> None:
    """Also of a checkpoint of a checkpoint, whose state is loaded when the training starts."""
    saves = [SaveAt(tmp_path / f"{step}.ckpt", step) for step in range(1, STEPS + 1)]
    whole = run(trainer, digits, callbacks=saves, accumulate_grad_batches=2)
    procedure = whole.report.procedure
    assert procedure.calls == [(step, STEPS) for step in range(STEPS)]
    assert procedure.ran and procedure.finish() == {"shrink/seen": float(procedure.seen)}
    for save in saves:
        resumed = run(trainer, digits, save.path, accumulate_grad_batches=2)
        assert resumed.report.procedure.calls == [(step, STEPS) for step in range(save.step, STEPS)]
        assert_same_bits(trained(resumed), trained(whole))


def test_micro_batches_do_not_change_the_penalty(trainer: Make, digits: Make) -> None:
    """It makes most of the gradient here."""
    norms = []
    for accumulate in (1, 2, 3):
        own = trainer(accumulate_grad_batches=accumulate)
        task = run(lambda own=own, **_: own, digits, accumulate_grad_batches=accumulate)
        norms.append(float(own.callback_metrics["train/grad_norm"]))
    count = sum(value.numel() for value in task.report.procedure.own)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-3)
    assert norms[0] == pytest.approx(SLOPE * count**0.5, rel=0.05)


def test_a_scaled_step_with_an_infinite_gradient_is_skipped(trainer: Make, digits: Make) -> None:
    task = make("text head", adapter=Shrunk(rank=2, alpha=8))
    seen = []

    class Spoil(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.precision_plugin.scaler = object()  # type: ignore[union-attr]
            frozen = next(value for value in pl_module.parameters() if not value.requires_grad)
            frozen.grad = torch.full_like(frozen, torch.inf) if trainer.global_step == 1 else None

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(len(pl_module.objective.report.procedure.calls))

    trainer(callbacks=[Spoil()]).fit(AdaptationModule(task), digits(steps=STEPS))
    assert seen == [1, 1, 2, 3]
    assert bool(all_finite([torch.ones(2), None])) and not bool(all_finite([torch.ones(2), torch.tensor([torch.nan])]))


def test_saving_warns_once_that_a_procedure_was_never_called(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.WARNING, "randlora_pl")
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    report = inject(model, Shrunk(rank=2), targets=["0"])
    assert report.procedure is not None and not report.procedure.ran
    for _ in range(2):
        save_adapter(model, tmp_path / "adapter")
    assert ["after_step(step, total)" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    assert isinstance(report.procedure, Shrink)
    report.procedure.ran = False
    load_adapter(model, tmp_path / "adapter")  # what a file contains has been trained
    save_adapter(model, tmp_path / "adapter")
    assert not caplog.records
