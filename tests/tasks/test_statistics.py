"""Running statistics of a base that trains: in checkpoints, in fingerprints, and the same in every process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randlora_pl.adapters import FullFineTuning, LinearProbe
from randlora_pl.adapters.trained import base_buffers
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, Objective

from .test_resume import SaveAt

Make = Callable[..., Any]
MODEL = "test_resnet.r160_in1k"


def make(adapter: Any, targets: list[str] | None = None) -> LinearHeadTask:
    return LinearHeadTask(MODEL, "random", adapter=adapter, targets=targets, img_size=32, learning_rate=1e-2)


def state(task: Objective) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in task.trained_state().items()}


def test_a_resumed_run_ends_with_the_same_statistics(trainer: Make, digits: Make, tmp_path: Path) -> None:
    whole, resumed, path = make(FullFineTuning()), make(FullFineTuning()), tmp_path / "middle.ckpt"
    data: dict[str, Any] = {"steps": 3, "batch_size": 4}
    trainer(callbacks=[SaveAt(path, 1)]).fit(AdaptationModule(whole), digits(**data))
    trainer().fit(AdaptationModule(resumed), digits(**data), ckpt_path=path, weights_only=True)
    one, other = state(whole), state(resumed)
    assert any(name.endswith("running_mean") for name in one)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert whole.fingerprint() == resumed.fingerprint()
    next(iter(base_buffers(resumed.model).values())).add_(1)
    assert whole.fingerprint() != resumed.fingerprint()
    early = torch.load(path, weights_only=True)["state_dict"]
    AdaptationModule(resumed).load_state_dict({name: value for name, value in early.items() if "running" not in name})
    fresh = make(FullFineTuning())
    fresh.set_classes(whole.classnames, whole.templates)
    fresh.adapt()
    for name, value in base_buffers(fresh.model).items():
        if "running" in name:  # not in the checkpoint, so those of the base
            assert torch.equal(base_buffers(resumed.model)[name], value)


def test_full_fine_tuning_of_targets_resumes_and_lets_statistics_rest(
    trainer: Make, digits: Make, tmp_path: Path
) -> None:
    whole, resumed = (make(FullFineTuning(), ["conv"]) for _ in range(2))
    trainer(callbacks=[SaveAt(tmp_path / "a", 1)]).fit(AdaptationModule(whole), digits(steps=3, batch_size=4))
    trainer().fit(AdaptationModule(resumed), digits(steps=3, batch_size=4), ckpt_path=tmp_path / "a", weights_only=True)
    one, other = state(whole), state(resumed)
    assert one.keys() == {f"backbone.{row.layer}" for row in whole.report.rows} | {"head.weight"} and len(one) == 15
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_statistics_of_a_frozen_base_rest(trainer: Make, digits: Make) -> None:
    task = make(LinearProbe())
    trainer().fit(AdaptationModule(task), digits(steps=1, batch_size=4))
    assert task.trained_state().keys() == {"head.weight"}
