"""The schedule per epoch, in runs whose epochs end within steps."""

import math
from typing import Any

import lightning as L
import pytest

from randlora_pl.adapters import Fira
from randlora_pl.run.callbacks.summary import model_results
from randlora_pl.utils.errors import UserError

from .learners import make_prompts


class Rates(L.Callback):
    """Learning rates of all groups in each step, and the optimizer's kind."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])
        assert type(optimizer).__name__ == "SGD"


def test_second_heads_and_classifiers_have_a_rate_of_their_own() -> None:
    for kind, options, rate in (
        ("maple + dept", {"prompt_learning_rate": 0.01}, 0.065),
        ("two stages", {"learning_rate": 0.02}, 0.02),
        ("maple + dept", {"head_learning_rate": 0.3}, 0.3),
        ("two stages", {"head_learning_rate": 0.3}, 0.3),
    ):
        task = make_prompts(kind, **options)
        task.set_classes(["a cat", "a dog"], ["a photo of {}"])
        task.adapt()
        assert task.optimizer_groups()[-1]["lr"] == task.head_learning_rate == pytest.approx(rate)
        assert model_results(task)["head_learning_rate"] == task.head_learning_rate
    with pytest.raises(UserError, match=r"head_learning_rate is 0\.3, and no head trains"):
        make_prompts("coop", head_learning_rate=0.3)


def test_rates_of_all_groups_at_all_epochs(fit: Any) -> None:
    """10 samples in steps of 4: epochs begin in steps 0, 3 (sample 12), 5, 8."""
    task = make_prompts(
        "maple + dept", optimizer="sgd", schedule="epochs", prompt_learning_rate=0.0035, max_grad_norm=None
    )
    data = {"steps": None, "epochs": 4, "shots": 1, "min_batches_per_epoch": 1, "batch_size": 4, "sampling": "epochs"}
    fit(task, data, callbacks=[rates := Rates()])
    epochs = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    factors = [(1 + math.cos(math.pi * (epoch - 1) / 4)) / 2 for epoch in epochs]
    for number, group in enumerate(task.optimizer_groups()):
        assert group["lr"] in (0.0035, 0.02275)
        expected = [group["lr"] * factor if epoch else 1e-5 for epoch, factor in zip(epochs, factors, strict=True)]
        assert [rates[number] for rates in rates.seen] == pytest.approx(expected)


def test_runs_planned_in_steps_and_methods_with_an_own_optimizer_are_refused(fit: Any) -> None:
    for option in ({"warmup_steps": 2}, {"final_lr_fraction": 0.0}):
        with pytest.raises(UserError, match="the schedule of epochs has no warmup_steps or final_lr_fraction"):
            make_prompts("coop", schedule="epochs", **option)
        make_prompts("coop", **option)
    with pytest.raises(UserError, match=r"--data\.epochs"):
        fit(make_prompts("coop", schedule="epochs"))
    with pytest.raises(UserError, match=r"--data\.epochs is 1: set --data\.epochs 2 or more, or use --model\.schedule"):
        fit(make_prompts("coop", schedule="epochs"), {"steps": None, "epochs": 1})
    with pytest.raises(UserError, match="Fira has an optimizer of its own"):
        fit(make_prompts("coop", adapter=Fira(rank=2), optimizer="sgd", learning_rate=1e-3))
