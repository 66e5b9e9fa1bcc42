"""Lightning checkpoints hold what trains, and load into the same adapter on the same base model only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from randlora_pl.adapters import DoRA, LoRA, RandLoRA, Together
from randlora_pl.tasks import AdaptationModule, Objective
from randlora_pl.utils.errors import UserError
from tests.support.products import covering, in_one_item

from .small import KINDS, make, trained

Make = Callable[..., Any]


@pytest.fixture
def checkpoint(fit: Callable[..., L.Trainer], tmp_path: Path) -> Callable[..., Path]:
    """Trains a task for a step and saves it."""

    def save(task: Objective, **data: Any) -> Path:
        fit(task, {"steps": 1} | data).save_checkpoint(tmp_path / "one.ckpt")
        return tmp_path / "one.ckpt"

    return save


@pytest.fixture
def usual(checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint of RandLoRA in both towers."""
    return checkpoint(make("vision-language"))


@pytest.mark.parametrize(("kind", "method"), covering(KINDS, ["randlora", "bitfit"], strength=1))
def test_checkpoint_holds_what_trains_and_nothing_else(
    kind: str, method: str, checkpoint: Make, trainer: Make, digits: Make
) -> None:
    task = make(kind, method)
    path = checkpoint(task)
    content = torch.load(path, weights_only=True)
    assert content["state_dict"].keys() == {f"objective.{name}" for name in trained(task)}
    assert all(torch.equal(content["state_dict"][f"objective.{name}"], value) for name, value in trained(task).items())
    numbers = sum(value.numel() for value in trained(task).values())
    assert path.stat().st_size < 3 * 4 * numbers + 100_000  # weights and two moments in float32

    other = make(kind, method)
    trainer(limit_test_batches=1).test(
        AdaptationModule(other), digits(), ckpt_path=path, weights_only=True, verbose=False
    )
    assert all(torch.equal(value, trained(task)[name]) for name, value in trained(other).items())


@in_one_item(
    ("options", "message"),
    [
        ({"adapter": LoRA(rank=2)}, "adapter.method is RandLoRA in the checkpoint and LoRA in this run"),
        ({"adapter": RandLoRA(rank=16)}, "adapter.rank is 8 in the checkpoint and 16 in this run"),
        ({"adapter": DoRA(RandLoRA(rank=8))}, "adapter.method is RandLoRA in the checkpoint and DoRA in this run"),
        ({"adapter": RandLoRA(rank=8, seed=7)}, "adapter.seed is 0 in the checkpoint and 7 in this run"),
        ({"targets": ["visual:mlp"]}, "unexpected"),
        ({"targets": ["all"]}, "missing"),
        (
            {"adapter": RandLoRA(rank=8, seed=0), "seed": 1},
            r"trained on open_clip tiny random \(weights \w+\), this run has open_clip tiny random \(weights \w+\)",
        ),
    ],
)
def test_other_adapters_and_bases_are_refused_with_both_values(
    options: dict[str, Any], message: str, usual: Path, trainer: Make, digits: Make
) -> None:
    other = make("vision-language", **options)
    with pytest.raises(UserError, match=message):
        trainer().fit(AdaptationModule(other), digits(), ckpt_path=usual, weights_only=True)
    assert other.run.step() == 0


def test_other_rates_of_the_parts_of_a_sum_are_refused(checkpoint: Make, trainer: Make, digits: Make) -> None:
    parts = [LoRA(rank=2), RandLoRA(rank=8)]
    path = checkpoint(make("vision-language", adapter=Together(parts)))
    with pytest.raises(UserError, match=r"lambdas trains at 1 times .* and at 3 times in this run"):
        other = make("vision-language", adapter=Together(parts, rates=[1, 3]))
        trainer().fit(AdaptationModule(other), digits(), ckpt_path=path, weights_only=True)


def test_tensors_that_do_not_fit_are_refused_and_nothing_is_loaded() -> None:
    task = make("linear head")
    task.set_classes(["a", "b"], ["{}"])
    task.adapt()
    module = AdaptationModule(task)
    state, before = {f"objective.{name}": value + 1 for name, value in trained(task).items()}, trained(task)
    name = next(name for name in state if name.endswith("lambdas"))
    for changed, message in (
        ({key: value for key, value in state.items() if key != name}, rf"missing \['{name}'\]"),
        (state | {"objective.more": torch.zeros(1)}, r"unexpected \['objective.more'\]"),
        (trained(task), r"head.weight lacks the prefix objective\., .* add the prefix to the names of a task"),
        (state | {name: state[name][:-1]}, rf"{name} has shape \(\d+, 8\) there and \(\d+, 8\) here"),
        (
            state | {"objective.head.weight": torch.zeros(3, 128)},
            r"head.weight has shape \(3, 128\) there and \(2, 128\) here",
        ),
    ):
        with pytest.raises(UserError, match=message):
            module.load_state_dict(changed)
        assert all(torch.equal(value, before[key]) for key, value in trained(task).items())
    module.load_state_dict(state)
    assert all(torch.equal(value, before[key] + 1) for key, value in trained(task).items())
    module.load_state_dict(module.state_dict())  # a whole state fits too


def test_checkpoint_of_something_else_is_refused(trainer: Make, digits: Make, tmp_path: Path) -> None:
    class Other(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

    plain = trainer()
    plain.strategy.connect(Other())
    plain.save_checkpoint(tmp_path / "other.ckpt", weights_only=True)
    with pytest.raises(UserError, match=r"layer\.\w+ lacks the prefix objective"):
        trainer().test(
            AdaptationModule(make("text head")), digits(), ckpt_path=tmp_path / "other.ckpt", weights_only=True
        )


def test_an_option_that_changes_speed_only_does_not_keep_a_run_from_going_on(checkpoint: Make, trainer: Make) -> None:
    def of(**options: Any) -> Objective:
        return make("text head", adapter=RandLoRA(rank=4, **options))

    path = checkpoint(of(memory="low"))
    content = torch.load(path, weights_only=True)
    other = of(memory="fast")
    other.set_classes(list("0123456789"), ["{}"])
    other.adapt()
    AdaptationModule(other).on_load_checkpoint(content)
    with pytest.raises(UserError, match=r"adapter\.rank"):
        wrong = make("text head", adapter=RandLoRA(rank=5))
        AdaptationModule(wrong).on_load_checkpoint(content)
