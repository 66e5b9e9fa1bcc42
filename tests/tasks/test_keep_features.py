"""The term of the loss that keeps features near the ones of the pretrained tower, against its definition."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from randlora_pl.adapters import Frozen, FullFineTuning, LinearProbe, LoRA
from randlora_pl.prompts import DeepPrompts
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, PromptTask, VisionLanguageTask
from randlora_pl.tasks.images import ImageTask
from randlora_pl.utils.errors import UserError
from tests.tasks.small import CLASSES, KINDS, TEMPLATES, batch, built, shake


def loss_of(task: ImageTask, labels: list[int], weight: list[float], factor: float) -> torch.Tensor:
    """The loss of a step as `AdaptationModule` sums it, with another factor of the term."""
    task.keep_features = factor
    step = batch(labels, weight)
    losses, _ = task.sample_losses(step)
    carried = task.accumulated_loss(step)
    return (losses * task.loss_weights(step)).sum() + (0 if carried is None else carried)


def gradients(task: ImageTask, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    task.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [*KINDS, "prompts"])
def test_value_and_gradient_are_those_of_the_definition(kind: str) -> None:
    labels, weight, factor = [0, 1, 3, 1], [0.4, 0.3, 0.3, 0.0], 2.5
    if kind == "prompts":
        prompts = DeepPrompts(depth=2)
        task: ImageTask = PromptTask("tiny", "random", adapter=LoRA(rank=2, alpha=8), prompts=prompts)
        task.set_classes(CLASSES, TEMPLATES)
        task.adapt()
    else:
        task = built(kind, "lora")  # type: ignore[assignment]
    task.train()
    plain = copy.deepcopy(task)  # the update is zero at its start
    shake(task)

    def encode(one: ImageTask, images: torch.Tensor, prompted: bool) -> torch.Tensor:
        if prompted and isinstance(one, PromptTask):
            return one._images(images)
        return getattr(one.model, "visual", one.model)(images)  # type: ignore[no-any-return]

    images = batch(labels)["image"]
    frozen = encode(plain, images, False).detach()
    distances = 1 - F.cosine_similarity(encode(task, images, True), frozen)
    assert distances.min() > 1e-4
    without, whole = loss_of(task, labels, weight, 0.0), loss_of(task, labels, weight, factor)
    slow = without + factor * (torch.tensor(weight) * distances).sum()
    torch.testing.assert_close(whole, slow, rtol=1e-5, atol=1e-6)
    expected, found = gradients(task, slow), gradients(task, whole)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)
    assert not task._features  # none is left for another batch


def test_the_trainer_adds_it(trainer: "type[L.Trainer]", digits: object) -> None:
    """A weight that outshines the loss keeps the features, and the logged loss leaves it out."""
    away = []
    for factor in (0.0, 1e4):
        task = VisionLanguageTask(
            "tiny", "random", adapter=LoRA(rank=2, alpha=8), learning_rate=0.01, keep_features=factor
        )
        own = trainer(precision="bf16-mixed")  # type: ignore[call-arg]
        own.fit(AdaptationModule(task), digits(steps=6))  # type: ignore[operator]
        task.train()
        distance = loss_of(task, [0, 1], [0.5, 0.5], 1.0) - loss_of(task, [0, 1], [0.5, 0.5], 0.0)
        away.append(distance.item())
        assert own.callback_metrics["train/loss"] < 10
    assert 0 <= away[1] < away[0] / 4


def test_an_evaluation_notes_nothing() -> None:
    task = built("linear head", "lora", keep_features=1.0)
    task.eval()
    task.class_logits(batch([0])["image"])
    assert task._features is None


def test_what_has_no_features_to_keep_is_refused() -> None:
    texts = PromptTask("tiny", "random", adapter=Frozen(), keep_features=1.0)  # learns words alone
    texts.set_classes(CLASSES, TEMPLATES)
    texts.adapt()
    texts.train()
    with pytest.raises(UserError, match="changes no image features"):
        texts.sample_losses(batch([0, 1], [0.5, 0.5]))
    with pytest.raises(UserError, match="FullFineTuning leaves no pretrained model to compare with"):
        VisionLanguageTask("tiny", "random", adapter=FullFineTuning(), keep_features=1.0)
    with pytest.raises(UserError, match="LinearProbe changes no features"):
        LinearHeadTask("tiny", "random", adapter=LinearProbe(), keep_features=1.0)
    with pytest.raises(UserError, match="keep_features is -1"):
        VisionLanguageTask("tiny", "random", keep_features=-1.0)
