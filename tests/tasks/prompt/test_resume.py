"""A run of learned prompts that is broken off after an optimizer step ends with the same bits."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from randlora_pl.run.callbacks import GaussianAverage
from randlora_pl.tasks import AdaptationModule
from tests.support.products import marked
from tests.tasks.small import trained

from .learners import make_prompts

RUNS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "coop + randlora": ((2,), {}),
    "maple + dept": ((5,), {"optimizer": "sgd", "schedule": "epochs"}),
    "promptsrc": ((2, 5), {"optimizer": "sgd", "schedule": "epochs"}),
    "promptsrc + randlora": ((2, 5), {}),
    "tip": ((2,), {"prompt_learning_rate": 0.1}),
    "two stages": ((2, 7), {}),  # the second begins after step 5
}
"""Steps after which a run is broken off, and options of the task."""
DATA = {"steps": None, "epochs": 3, "min_batches_per_epoch": 1, "shots": 1, "batch_size": 2, "sampling": "epochs"}


class SaveAt(L.Callback):
    """Saves after some optimizer steps."""

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        if trainer.global_step in self.steps and batch["micro_batch"] == batch["micro_batches"] - 1:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize(("kind",), marked(zip(RUNS), lambda row: row[0] not in ("coop + randlora", "promptsrc")))
def test_resumed_runs_end_with_the_same_bits(kind: str, trainer: Any, digits: Any, tmp_path: Path) -> None:
    """30 samples in steps of two micro-batches of 2: epochs end in the middle of step 3, at step 5, and at the end."""
    steps, options = RUNS[kind]

    def run(*callbacks: L.Callback, start: Path | None = None) -> dict[str, torch.Tensor]:
        task = make_prompts(kind, **options)
        average = [GaussianAverage(mu=2, sigma=1)] if "src" in kind else []
        own = trainer(callbacks=[*average, *callbacks], accumulate_grad_batches=2)
        own.fit(AdaptationModule(task), digits(**DATA), ckpt_path=start, weights_only=True)
        assert own.global_step == 8
        return trained(task) | task.trained_state()

    whole = run(SaveAt(tmp_path, steps))
    for step in steps:
        torch.manual_seed(123)  # another process has another state
        resumed = run(start=tmp_path / f"{step}.ckpt")
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
