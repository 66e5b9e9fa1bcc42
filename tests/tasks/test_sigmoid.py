"""Models with a logit bias (SigLIP) train with the sigmoid loss of all pairs, which the slow matrix defines."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.loss import SigLipLoss
from torch import Tensor

from randlora_pl.adapters import Frozen, FullFineTuning, LoRA, read_adapter
from randlora_pl.interop.base_model import load_base
from randlora_pl.interop.merge import merged
from randlora_pl.prompts import Fixed
from randlora_pl.tasks import PromptTask, TipAdapter, VisionLanguageTask, load_task
from randlora_pl.tasks.images import normalize
from randlora_pl.tasks.vision_language import sigmoid_losses
from randlora_pl.utils.errors import UserError

from .small import CLASSES, TEMPLATES, batch, frozen, images, in_run, shake, sigmoid_clip, trained

NAME = "Small-sigmoid"


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with sigmoid_clip():
        yield


def task_of(kind: type[Any] = VisionLanguageTask, **options: Any) -> Any:
    task = kind(NAME, "random", **({"adapter": FullFineTuning()} | options))
    task.set_classes(CLASSES, TEMPLATES)
    task.adapt()
    return task


def slow_losses(images: Tensor, texts: Tensor, labels: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The whole matrix of images and captions, pair by pair: minus log sigmoid(z (t x y + b))."""
    losses = []
    for x, own in zip(images, labels, strict=True):
        pairs = [(1 if other == own else -1) * (scale * x @ texts[other] + bias) for other in labels]
        losses.append(sum(-torch.sigmoid(pair).log() for pair in pairs))
    return torch.stack(losses)  # type: ignore[arg-type]


@given(st.integers(1, 12), st.integers(1, 5), st.booleans(), st.integers(0, 2**31 - 1))
def test_unique_captions_equal_the_whole_matrix(number: int, classes: int, different: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (number,), generator=generator)
    if different:
        labels, classes = torch.randperm(number, generator=generator), number
    x, y = (torch.randn(n, 6, generator=generator, dtype=torch.float64).requires_grad_() for n in (number, classes))
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, -2.0))
    weight = torch.rand(number, generator=generator, dtype=torch.float64)
    present, counts = torch.unique(labels, return_counts=True)
    fast = sigmoid_losses(scale * x @ y[present].T + bias, labels, present, counts)
    slow = slow_losses(x, y, labels, scale, bias)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-6)
    if different:
        expected = SigLipLoss()(x, y[labels], scale, bias)
        torch.testing.assert_close(fast.mean().double(), expected, rtol=1e-5, atol=1e-6)
    for tensor in (x, y, scale, bias):
        found = [torch.autograd.grad(loss @ weight.to(loss), tensor, retain_graph=True)[0] for loss in (fast, slow)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, 1, 3]])
def test_micro_batches_have_the_gradient_of_the_whole_matrix(labels: list[int], trainer: Callable[..., Any]) -> None:
    """Captions that differ: open_clip's own loss. Scale and bias train, too, as the whole model does."""
    task, other = task_of(), task_of()
    in_run(task, trainer(accumulate_grad_batches=2))
    whole = batch(labels)
    for part, rows in enumerate((slice(0, 2), slice(2, 4))):
        own = whole | {key: whole[key][rows] for key in ("image", "label", "weight", "index")}
        own |= {"micro_batch": part, "micro_batches": 2}
        losses, right = task.sample_losses(own)
        assert right.shape == (2,) and task.loss_floor(own) == 0.0
        carried = task.accumulated_loss(own)
        (((losses * own["weight"]).sum() + (0 if carried is None else carried)) / 2).backward()
    model = other.model
    x, y = (
        normalize(model.encode_image(whole["image"])),
        normalize(model.encode_text(other.caption_tokens(torch.arange(4)))),
    )
    scale, bias, rows = model.logit_scale.exp(), model.logit_bias, torch.tensor(labels)
    slow = slow_losses(x, y, rows, scale, bias).mean() if len(set(labels)) < 4 else SigLipLoss()(x, y, scale, bias)
    slow.backward()
    gradients = [{name: p.grad for name, p in each.named_parameters() if p.grad is not None} for each in (task, other)]
    assert gradients[0].keys() == trained(task).keys() >= {"backbone.logit_scale", "backbone.logit_bias"}
    for name, value in gradients[1].items():
        torch.testing.assert_close(2 * gradients[0][name], value, rtol=1e-3, atol=1e-6, msg=name)


def test_local_losses_compare_a_micro_batch_alone() -> None:
    task = task_of(loss_batch="local")
    part = batch([0, 2]) | {"step_classes": torch.arange(4), "step_counts": torch.ones(4, dtype=torch.long)}
    torch.testing.assert_close(task.sample_losses(part)[0], task_of().sample_losses(batch([0, 2]))[0])


def test_adapters_leave_scale_and_bias_frozen() -> None:
    task = task_of(adapter=LoRA(rank=2))
    assert {"backbone.logit_scale", "backbone.logit_bias"} <= frozen(task).keys()
    assert "sigmoid" in task.loss_note and "minimum" not in task.loss_note


def test_prompts_with_the_joint_loss_have_the_same() -> None:
    plain = task_of(caption="a photo of a {}.", adapter=LoRA(rank=2, alpha=8))
    options = {"prompts": Fixed(), "adapter": LoRA(rank=2, alpha=8)}
    task = task_of(PromptTask, loss_batch="joint", **options)
    shake(plain), shake(task)
    data = batch([0, 1, 1, 3])
    torch.testing.assert_close(task.sample_losses(data)[0], plain.sample_losses(data)[0])
    assert task.loss_floor(data) == 0.0


def test_all_classes_are_a_softmax_in_which_the_bias_cancels() -> None:
    """Its gradient is 0 and not None, as two processes wait for it, and no step moves it."""
    task = task_of(PromptTask, prompts=Fixed(), learning_rate=0.1)
    data = batch([0, 1, 1, 3])
    losses, _ = task.sample_losses(data)
    logits = task.class_logits(data["image"]) + task.model.logit_bias
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, data["label"], reduction="none"))
    (losses.sum() + task.accumulated_loss(data)).backward()
    assert task.model.logit_bias.grad == 0
    task.before_step([{"params": list(task.parameters()), "lr": 1.0}])
    assert task.model.logit_bias.grad is None and task.model.logit_scale.grad is not None


def test_options_that_do_not_suit_the_bias_are_refused() -> None:
    with pytest.raises(UserError, match=r"raw .* Small-sigmoid: use --model.logit_scale exp"):
        task_of(logit_scale="raw")
    with pytest.raises(UserError, match=r"TipAdapter .* Small-sigmoid, .* --model.loss_batch all"):
        task_of(PromptTask, prompts=Fixed(), adapter=Frozen(), head=TipAdapter(), loss_batch="joint")


@pytest.mark.parametrize("adapter", [FullFineTuning(), LoRA(rank=2, alpha=8)], ids=["full", "lora"])
def test_files_and_merged_weights_keep_scale_and_bias(adapter: Any, tmp_path: Path) -> None:
    task = task_of(adapter=adapter).eval()
    shake(task)
    task.save(tmp_path / "adapter")
    found, file = load_task(tmp_path / "adapter"), read_adapter(tmp_path / "adapter")
    weights = merged(load_base(file), file).model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        value = task.model.state_dict()[name]
        assert torch.equal(found.model.state_dict()[name], value) and torch.equal(weights[name], value)
    torch.testing.assert_close(found.class_logits(images(3)), task.class_logits(images(3)))
