"""A run of learned prompts that is broken off after an optimizer step ends with the same bits."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from randlora_pl.callbacks import GaussianAverage
from tests.support.products import in_one_item
from tests.tasks.small import trained

from .learners import make_prompts

RUNS: dict[str, dict[str, Any]] = {
    "coop + randlora": {},
    "maple + dept": {"optimizer": "sgd", "schedule": "epochs"},
    "promptsrc": {"optimizer": "sgd", "schedule": "epochs"},
    "promptsrc + randlora": {},
    "tip": {"prompt_learning_rate": 0.1},
    "two stages": {},  # the second begins after step 5
}
DATA = {"steps": None, "epochs": 3, "min_batches_per_epoch": 1, "shots": 1, "batch_size": 2, "sampling": "epochs"}


class SaveAt(L.Callback):
    """Saves after some optimizer steps."""

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if trainer.global_step in self.steps and batch["micro_batch"] == batch["micro_batches"] - 1:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@in_one_item("kind", RUNS)
def test_resumed_runs_end_with_the_same_bits(kind: str, trainer: Any, digits: Any, tmp_path: Path) -> None:
    """30 samples in steps of two micro-batches of 2: epochs end in the middle of step 3, at step 5, and at the end."""

    def run(*callbacks: L.Callback, start: Path | None = None) -> dict[str, torch.Tensor]:
        task = make_prompts(kind, **RUNS[kind])
        average = [GaussianAverage(mu=2, sigma=1)] if "src" in kind else []
        own = trainer(callbacks=[*average, *callbacks], accumulate_grad_batches=2)
        own.fit(task, digits(**DATA), ckpt_path=start, weights_only=True)
        assert own.global_step == 8
        return trained(task) | task.trained_state()

    steps = (2, 5, 7) if kind == "two stages" else (2, 5)
    whole = run(SaveAt(tmp_path, steps))
    for step in steps:
        torch.manual_seed(123)  # another process has another state
        resumed = run(start=tmp_path / f"{step}.ckpt")
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_a_step_of_sgd_resumes_with_the_rates_typed_last(trainer: Any, digits: Any, tmp_path: Path) -> None:
    task = make_prompts("maple + dept", optimizer="sgd", schedule="epochs")
    trainer(callbacks=[SaveAt(tmp_path, (6,))]).fit(task, digits(**DATA))
    other = make_prompts("maple + dept", optimizer="sgd", schedule="epochs", prompt_learning_rate=4e-3)
    own = trainer(max_steps=7)
    own.fit(other, digits(**DATA), ckpt_path=tmp_path / "6.ckpt", weights_only=True)
    assert own.optimizers[0].state  # the momentum
    assert sorted({group["initial_lr"] for group in own.optimizers[0].param_groups}) == pytest.approx([4e-3, 0.026])
