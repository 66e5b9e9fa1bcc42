"""The linear head: its start, its learning rate, and the backbones that it sits on."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import timm
import torch
import torch.nn.functional as F

from randlora_pl.adapters import LinearProbe, LoRA, RandLoRA
from randlora_pl.models import load_clip
from randlora_pl.run.callbacks import GaussianAverage, WrittenAnswers
from randlora_pl.tasks import LinearHeadTask
from randlora_pl.tasks.measures import class_answers
from randlora_pl.tasks.module import own_module
from randlora_pl.utils.errors import UserError

from .small import TEMPLATES, batch, built, frozen, images, make, trained

VIT = "test_vit.r160_in1k"  # timm's own, for tests


def task_of(**options: Any) -> LinearHeadTask:
    task = built("linear head", **options)
    assert isinstance(task, LinearHeadTask)
    return task


def wide(classes: int, seed: int) -> torch.Tensor:
    """The start of a head for many classes."""
    task = LinearHeadTask("tiny", "random", adapter=LinearProbe(), seed=seed)
    task.set_classes([str(number) for number in range(classes)], TEMPLATES)
    task.adapt()
    return task.head.weight.detach()


def test_head_starts_normal_with_a_standard_deviation_of_one_hundredth() -> None:
    weight = wide(200, seed=0)
    assert weight.shape == (200, 128)
    assert weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=3e-4)
    inside = [(weight.abs() < width * 0.01).float().mean().item() for width in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.01)  # shares of a normal distribution


def test_head_has_no_bias_and_its_own_learning_rate(fit: Callable[..., L.Trainer]) -> None:
    task = make("linear head", head_learning_rate=0.5, learning_rate=0.25, weight_decay=0.2)
    (optimizer,) = fit(task, max_steps=1).optimizers
    assert isinstance(task, LinearHeadTask)
    assert task.head.bias is None
    *backbone, head = optimizer.param_groups
    assert head["params"] == [task.head.weight]
    assert (head["initial_lr"], head["weight_decay"]) == (0.5, 0.2)
    assert {group["initial_lr"] for group in backbone} == {0.25}
    assert task.resolved() == {
        "pretrained": "random",
        "targets": None,
        "learning_rate": 0.25,
        "head_learning_rate": 0.5,
        "adapter": task.adapter,
    }


@pytest.mark.parametrize(("name", "rate"), [("tiny", 2e-2), (VIT, 1e-3)])
def test_default_learning_rate_of_the_head(name: str, rate: float) -> None:
    assert LinearHeadTask(name, "random").head_learning_rate == rate


def test_linear_probe_trains_the_head_alone(fit: Callable[..., L.Trainer]) -> None:
    task = make("linear head", adapter=LinearProbe())
    fit(task)
    assert trained(task).keys() == {"head.weight"}
    fresh = load_clip("tiny", "random").model.visual.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(value, fresh[name.removeprefix("backbone.visual.")]) for name, value in frozen(task).items())


def test_logits_of_a_clip_tower_are_linear_in_unit_features() -> None:
    task, part = task_of(), batch([3, 0, 0])
    with torch.no_grad():
        features = F.normalize(load_clip("tiny", "random").model.encode_image(part["image"]), dim=1)  # type: ignore[operator]
        losses, right = task.sample_losses(part)
        logits = features @ task.head.weight.T
    torch.testing.assert_close(task.class_logits(part["image"]), logits)
    torch.testing.assert_close(losses, F.cross_entropy(logits, part["label"], reduction="none"))
    assert right.tolist() == (logits.argmax(1) == part["label"]).tolist()


# timm


def test_logits_of_a_timm_model_are_linear_in_its_features() -> None:
    task = task_of(name=VIT, img_size=32, adapter=LoRA(rank=2))
    with torch.no_grad():
        logits, features = task.class_logits(images(3)), task.model(images(3))
    torch.testing.assert_close(logits, features @ task.head.weight.T)
    assert not torch.allclose(features.norm(dim=1), torch.ones(3))  # raw, as in the protocol
    assert task.identity.library == "timm" and task.image_spec.size == 32
    assert features.shape[1] == timm.create_model("test_vit", num_classes=0).num_features


def test_a_model_that_pools_nothing_is_refused() -> None:
    task = task_of(name=VIT, img_size=32, adapter=LoRA(rank=2))
    task.model.global_pool = ""  # type: ignore[assignment]
    with pytest.raises(UserError, match="vector"):
        task.class_logits(images(3))


def test_timm_model_trains_at_another_image_size(fit: Callable[..., L.Trainer]) -> None:
    task = LinearHeadTask(VIT, "random", adapter=RandLoRA(rank=16), img_size=48, gradient_checkpointing=True)
    trainer = fit(task, {"batch_size": 8}, limit_val_batches=1)
    assert {row.layer.split(".")[-1] for row in task.report.rows} == {"qkv", "fc1", "fc2"}
    assert trainer.callback_metrics["val/acc"] >= 0
    fresh = LinearHeadTask(VIT, "random", adapter=RandLoRA(rank=16), img_size=48)
    fresh.set_classes(task.classnames, task.templates)
    fresh.adapt()
    assert all(not torch.equal(value, trained(fresh)[name]) for name, value in trained(task).items())
    assert all(torch.equal(value, frozen(fresh)[name]) for name, value in frozen(task).items())


def test_texts_and_foreign_modules_are_refused() -> None:
    with pytest.raises(UserError, match=r"LinearHeadTask has no text tower\. Use --part classifier or image"):
        make("linear head").text_model()
    with pytest.raises(UserError, match=r"has no objective: train AdaptationModule\(task\)"):
        own_module(L.LightningModule())


def test_modules_of_a_user_have_what_needs_no_objective() -> None:
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(epochs=2))
    WrittenAnswers().on_test_end(trainer, L.LightningModule())
    GaussianAverage().setup(trainer, L.LightningModule(), "fit")


def test_answers_are_as_many_as_the_outputs() -> None:
    answers = class_answers(torch.tensor([[0.2, 0.8]]), ["a", "b", "c"], 5)
    assert answers.rows == [["b", "0.800000", "a", "0.200000"]]
