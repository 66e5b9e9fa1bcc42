"""An adapter folder gives the task back: same logits, for every task and method."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import RandLoRA, adapted_layers, inject, save_adapter
from randlora_pl.models import load_clip
from randlora_pl.run.options.classes import classes, takes_texts
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, Objective, load_task
from randlora_pl.utils.errors import UserError
from tests.support.products import marked

from .small import CLASSES, KINDS, METHODS, TEMPLATES, built, images, make, shake, trained


def logits_of(task: Objective) -> Tensor:
    with torch.no_grad():
        return task.eval().class_logits(images(3, task.image_spec.size))


def saved(folder: Path, kind: str, method: str = "randlora", **options: Any) -> Objective:
    """A task that is not at its start, and its folder."""
    task = built(kind, method, **options)
    shake(task)
    task.save(folder, {"step": 3})
    return task


def test_every_task_on_images_is_restored_and_tested() -> None:
    names = {name for name, kind in classes("model").items() if not takes_texts(kind)}
    kinds = {kind.__name__ for kind in KINDS.values()}
    assert kinds | {"PromptTask"} == names  # which has a folder of tests


OFTEN = {"vision-language": "randlora", "text head": "full", "linear head": "adalora"}


@pytest.mark.parametrize(("kind", "method"), marked(product(KINDS, METHODS), lambda row: row in OFTEN.items()))
def test_restored_task_gives_the_same_logits(kind: str, method: str, tmp_path: Path) -> None:
    task = saved(tmp_path / "adapter", kind, method)
    restored = load_task(tmp_path / "adapter")
    assert type(restored) is type(task)
    assert restored.classnames == (CLASSES if task.has_classes else []) and restored.templates == TEMPLATES
    assert not any(module.training for module in restored.modules())
    found, expected = logits_of(restored), logits_of(task)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # merged against unmerged
    assert not torch.allclose(found, logits_of(built(kind, method)), atol=1e-3)  # one output moves little
    assert {name: value.tolist() for name, value in trained(restored).items()} == {
        name: value.tolist() for name, value in trained(task).items()
    }
    assert all(layer.merged for layer in adapted_layers(restored.model).values() if layer.delta is not None)


def test_restored_timm_model_has_its_image_size(tmp_path: Path) -> None:
    task = saved(tmp_path / "adapter", "linear head", name="test_vit.r160_in1k", img_size=48)
    restored = load_task(tmp_path / "adapter")
    assert restored.image_spec == task.image_spec and restored.image_spec.size == 48
    torch.testing.assert_close(logits_of(restored), logits_of(task), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_scale": "raw", "caption": "{}!", "eval_prompts": "caption", "seed": 4, "targets": ["visual:mlp"]},
        {"eval_prompts": "ensemble", "adapter": RandLoRA(rank=8, match="lora:2"), "gradient_checkpointing": True},
    ],
)
def test_options_of_the_task_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    task = saved(tmp_path / "adapter", "vision-language", **options)
    restored = load_task(tmp_path / "adapter")
    assert restored.constructor() == task.constructor()
    assert restored.adapter.describe() == task.adapter.describe()
    torch.testing.assert_close(logits_of(restored), logits_of(task), rtol=1e-4, atol=1e-4)


def test_overrides_win(tmp_path: Path) -> None:
    """For example where the weights file has moved."""
    there, here = tmp_path / "there.pt", tmp_path / "here.pt"
    torch.save(load_clip("tiny", "random", seed=3).model.state_dict(), there)
    task = built("text head", pretrained=str(there))
    task.save(tmp_path / "adapter")
    there.rename(here)
    with pytest.raises(UserError, match=r"there\.pt"):
        load_task(tmp_path / "adapter")
    restored = load_task(tmp_path / "adapter", pretrained=str(here))
    torch.testing.assert_close(logits_of(restored), logits_of(task), rtol=1e-4, atol=1e-3)


# What is refused


def test_folder_that_no_task_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter folder"):
        load_task(tmp_path)
    layer = nn.Sequential(nn.Linear(4, 4))
    inject(layer, METHODS["lora"](), ["0"])
    save_adapter(layer, tmp_path / "plain")
    with pytest.raises(UserError, match="task"):
        load_task(tmp_path / "plain")


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", "text head")
    with pytest.raises(UserError, match="trained"):
        load_task(tmp_path / "adapter", seed=1)


def test_restored_task_can_be_tested_and_trained_further(tmp_path: Path, trainer: Any, digits: Any) -> None:
    task, data = make("linear head"), digits()
    trainer().fit(AdaptationModule(task), data)
    task.save(tmp_path / "adapter")
    restored, own = load_task(tmp_path / "adapter"), trainer(limit_test_batches=2)
    assert isinstance(restored, LinearHeadTask)
    assert own.test(AdaptationModule(restored), data, verbose=False)[0] == pytest.approx(
        own.test(AdaptationModule(task), data, verbose=False)[0], rel=1e-4
    )
    before = trained(restored)
    own.fit(AdaptationModule(restored), data)
    assert all(not torch.equal(value, before[name]) for name, value in trained(restored).items())
