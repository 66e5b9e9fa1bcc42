"""A step of micro-batches is the undivided batch: loss, gradient, and weights after training."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from randlora_pl.adapters import LoRA, RandLoRA
from randlora_pl.data import ImageData
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, Objective, TextHeadTask, VisionLanguageTask
from randlora_pl.tasks.losses import StepFeatures
from randlora_pl.tasks.vision_language import caption_losses
from tests.support.products import marked

TASKS: dict[str, Callable[[], Objective]] = {
    "vision-language": lambda: VisionLanguageTask(name="tiny", pretrained="random", adapter=RandLoRA(rank=8)),
    "text head": lambda: TextHeadTask(name="tiny", pretrained="random", adapter=LoRA(rank=2, alpha=8)),
    "linear head": lambda: LinearHeadTask(name="tiny", pretrained="random", adapter=LoRA(rank=2, alpha=8)),
    "kept features": lambda: VisionLanguageTask("tiny", "random", adapter=LoRA(rank=2, alpha=8), keep_features=30.0),
}


def in_batch_loss(images: Tensor, texts: Tensor, labels: Tensor, scale: float) -> Tensor:
    """The protocol to the letter (2.3): one caption for each image, target = first image of the same class."""
    first = torch.tensor([int((labels == label).nonzero()[0]) for label in labels])
    return F.cross_entropy(scale * images @ texts[labels].T, first, reduction="none")


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_unique_captions_equal_all_captions_in_value_and_gradient(batch: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (batch,), generator=generator)
    images, texts = (
        torch.randn(n, 6, generator=generator, dtype=torch.float64).requires_grad_() for n in (batch, classes)
    )
    unique, counts = torch.unique(labels, return_counts=True)
    slow = in_batch_loss(images, texts, labels, 7.0)
    fast = caption_losses(7.0 * images @ texts[unique].T, labels, unique, counts)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
    for tensor in (images, texts):
        (slow_gradient,) = torch.autograd.grad(slow.mean(), tensor, retain_graph=True)
        (fast_gradient,) = torch.autograd.grad(fast.mean(), tensor, retain_graph=True)
        torch.testing.assert_close(fast_gradient, slow_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 0.5, 1024.0])
def test_shared_features_carry_the_gradient_of_every_micro_batch(factor: float) -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(3, 4, dtype=torch.float64)
    parts = torch.randn(3, 3, dtype=torch.float64)
    ((inputs @ weight) * parts.sum(0)).sum().backward()
    whole = weight.grad
    weight.grad = None
    features = StepFeatures(inputs @ weight)
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        loss = (features.use(last) * part).sum()
        if last:
            assert features.pending(factor).item() == 0
            loss = loss + features.pending(factor)
        (loss * factor).backward()
    assert weight.grad is not None and whole is not None
    torch.testing.assert_close(weight.grad / factor, whole)


def weights_after(task: Objective, data: ImageData, trainer: L.Trainer) -> dict[str, Tensor]:
    trainer.fit(AdaptationModule(task), data)
    return {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("task",), marked(zip(TASKS), lambda row: row[0] in ("vision-language",)))
def test_accumulated_training_equals_undivided_training(task: str, trainer: Any, digits: Any) -> None:
    """20 images a step, the last step shorter: 4 micro-batches of 5 against one of 20."""
    options = {"steps": None, "epochs": 1, "min_batches_per_epoch": 1, "shots": 5}  # 50 samples: 20, 20, 10
    whole_task, split_task = TASKS[task](), TASKS[task]()
    whole = weights_after(whole_task, digits(batch_size=20, **options), trainer())
    split = weights_after(split_task, digits(batch_size=5, **options), trainer(accumulate_grad_batches=4))
    start = weights_after(TASKS[task](), digits(batch_size=20, **options), trainer(max_steps=0))
    assert whole.keys() == split.keys()
    for name in whole:
        moved = (whole[name] - start[name]).norm()
        assert moved > 0, name
        assert (whole[name] - split[name]).norm() < 2e-3 * moved, name


def test_gradient_scaling_of_half_precision_reaches_the_text_tower_once(trainer: Any, digits: Any) -> None:
    """16-mixed multiplies every loss; what earlier micro-batches left must carry the factor once, not twice."""

    def weights(scale: float | None, batch_size: int) -> Tensor:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scale else []
        own = trainer(plugins=plugins, accumulate_grad_batches=6 // batch_size)
        found = weights_after(TASKS["vision-language"](), digits(batch_size=batch_size), own)
        return torch.cat([value.flatten() for value in found.values()])

    exact, whole, split = weights(None, 6), weights(256.0, 6), weights(256.0, 2)
    rounding = (whole - exact).norm()
    assert 0 < (split - whole).norm() < rounding < 0.05


def test_text_tower_runs_once_per_optimizer_step(trainer: Any, digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = VisionLanguageTask(name="tiny", pretrained="random", adapter=RandLoRA(rank=8))
    calls: list[int] = []
    build = task.build

    def counted() -> torch.nn.Module:
        model = build()
        encode = model.encode_text
        model.encode_text = lambda tokens: calls.append(len(tokens)) or encode(tokens)  # type: ignore[assignment, operator, func-returns-value]
        return model

    monkeypatch.setattr(task, "build", counted)
    trainer(accumulate_grad_batches=3).fit(AdaptationModule(task), digits(batch_size=8, steps=2))
    assert len(calls) == 2
    assert max(calls) <= 10
