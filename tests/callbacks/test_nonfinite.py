from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_pl.adapters import RandLoRA, read_adapter
from randlora_pl.callbacks import AdapterCheckpoint, NonFiniteLoss
from randlora_pl.errors import UserError
from randlora_pl.tasks import TextHeadTask
from tests.callbacks.conftest import Fit


class Diverging(TextHeadTask):
    """Its loss is infinite at the third step; the weights may be spoilt one step before."""

    spoils = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx < 2:
            return loss
        if self.spoils:
            with torch.no_grad():
                next(p for p in self.parameters() if p.requires_grad).fill_(torch.nan)
        return loss * torch.inf


class Spoiling(Diverging):
    spoils = True


@pytest.mark.parametrize(("kind", "step"), [(Diverging, 2), (Spoiling, 1)])
def test_last_good_adapter_is_kept(fit: Fit, tmp_path: Path, kind: type[TextHeadTask], step: int) -> None:
    class FirstStepOnly(AdapterCheckpoint):
        def _save_last(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 1:
                super()._save_last(trainer, pl_module)

    with pytest.raises(UserError, match=rf"at step 3. Lower --model.learning_rate .*\(step {step}\)"):
        fit(NonFiniteLoss(), FirstStepOnly(every_n_steps=1), task=kind("tiny", "random", RandLoRA(rank=16)))
    saved = read_adapter(tmp_path / "adapter")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.tensors.values())
    assert saved.config["metadata"]["training"]["step"] == step


def test_nothing_is_kept_where_nothing_is_good(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is kept"):
        fit(NonFiniteLoss(), task=Spoiling("tiny", "random", RandLoRA(rank=16)))
    assert not (tmp_path / "adapter").exists()


def test_finite_runs_are_left_alone(fit: Fit) -> None:
    trainer, _, _ = fit(NonFiniteLoss())
    assert trainer.global_step == 4
