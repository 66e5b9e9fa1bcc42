"""AdaLoRA in a task: the budget holds in every phase, and a run that is resumed in any of them ends with its bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from randlora_pl.adapters import read_adapter
from randlora_pl.tasks import AdaptationModule
from tests.support.cli import SMALL, Run

from .small import make
from .test_resume import SaveAt, assert_same_bits

Make = Callable[..., Any]
STEPS = 10
PHASES = {"warm-up": 2, "pruning": 5, "pruned last": 8, "final": 9}


class Ranks(L.Callback):
    """Ranks that are kept after each step, and those whose E is not zero."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        updates = pl_module.objective.report.procedure.updates
        masks, diagonals = (torch.cat([getattr(update, name) for update in updates]) for name in ("mask", "E"))
        self.seen.append((int(masks.sum()), int(diagonals.count_nonzero())))


def test_runs_resumed_in_every_phase_end_with_the_same_bits(trainer: Make, digits: Make, tmp_path: Path) -> None:
    """Also with a checkpoint's importance and mask on a model that has another mask."""
    data = {"steps": STEPS, "batch_size": 4}
    saves = [SaveAt(tmp_path / f"{name}.ckpt", step) for name, step in PHASES.items()]
    whole, ranks = make("text head", "adalora"), Ranks()
    trainer(callbacks=[ranks, *saves]).fit(AdaptationModule(whole), digits(**data))
    pruning: Any = whole.report.procedure
    first, last = 3 * len(pruning.updates), 2 * len(pruning.updates)
    assert pruning.phases(STEPS) == (2, 7)
    budgets = [pruning.budget(step, STEPS) for step in range(STEPS)]
    kept = [ranks for ranks, _ in ranks.seen]
    assert kept == [first] * 4 + [budgets[4]] * 2 + [budgets[6]] + [last] * 3
    assert [alive for _, alive in ranks.seen] == [first] * 4 + [budgets[4], first, budgets[6]] + [last] * 3
    assert last <= budgets[6] < budgets[4] < first
    for save in saves:
        assert torch.load(save.path, weights_only=True)["procedure"]["ended"] == (save.step > 7)
        resumed, again = make("text head", "adalora"), Ranks()
        trainer(callbacks=[again]).fit(
            AdaptationModule(resumed), digits(**data), ckpt_path=save.path, weights_only=True
        )
        assert again.seen == ranks.seen[save.step :]
        assert_same_bits(resumed.trained_state(), whole.trained_state())
        assert resumed.fingerprint() == whole.fingerprint()
        for own, other in zip(pruning.scores(), resumed.report.procedure.scores(), strict=True):  # type: ignore[union-attr, attr-defined]
            assert torch.equal(own, other)


def test_results_and_files_have_the_ranks(run: Run, tmp_path: Path) -> None:
    """`fit` through the command line; a run that has ended has exactly its budget."""
    options = ("--model.adapter", "AdaLoRA", "--model.adapter.rank", "3", "--model.adapter.every", "1")
    done = run("fit", *SMALL, *options, "--trainer.accumulate_grad_batches", "2")
    assert done.code == 0, done.err
    assert "procedure" not in done.err
    (folder,) = (tmp_path / "runs" / "quickstart").glob("2*")
    results = json.loads((folder / "results.json").read_text())
    masks = {name: value for name, value in read_adapter(folder / "adapter").tensors.items() if name.endswith("mask")}
    assert results["adalora/triplets"] == 2 * len(masks) == sum(int(mask.sum()) for mask in masks.values())
    assert sum(results["adalora/ranks"].values()) == results["adalora/triplets"]
    assert results["adalora/parameters"] < results["adapter_parameters"]
