"""Pieces of the losses that the tests of whole steps do not reach."""

import pytest
import torch
import torch.nn.functional as F

from randlora_pl.data.image_batches import counted_classes
from randlora_pl.data.transforms import _mixed
from randlora_pl.tasks.images import normalize, similarities
from randlora_pl.tasks.losses import StepFeatures, class_losses
from randlora_pl.tasks.vision_language import caption_losses, pair_floor
from randlora_pl.utils import rng


def test_similarities_stay_in_float32_under_autocast() -> None:
    images, texts = torch.randn(5, 64), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = images @ texts.T
        found = similarities(normalize(images.bfloat16()), normalize(texts.bfloat16()))
    assert rounded.dtype == torch.bfloat16  # what autocast would have done
    exact = F.normalize(images.bfloat16().double(), dim=1) @ F.normalize(texts.bfloat16().double(), dim=1).T
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


def test_caption_floor_is_the_greatest_lower_bound_of_the_losses() -> None:
    classes, counts = torch.tensor([1, 4, 9]), torch.tensor([1, 60, 3])
    labels = torch.tensor([4, 9, 1, 4])
    model = torch.nn.Identity()  # without a logit bias
    floor = pair_floor(model, labels, classes, counts)
    torch.testing.assert_close(floor, torch.tensor([60.0, 3.0, 1.0, 60.0]).log())
    right = 50.0 * (labels[:, None] == classes)
    torch.testing.assert_close(caption_losses(right, labels, classes, counts), floor)
    assert (caption_losses(torch.randn(4, 3), labels, classes, counts) > floor).all()
    assert pair_floor(model, torch.tensor([1]), torch.tensor([1]), torch.tensor([0])) == 0, "of padding alone"


def test_step_of_frozen_texts_carries_nothing() -> None:
    features = StepFeatures(torch.randn(2, 3))
    weight = torch.randn(3, requires_grad=True)
    (features.use(False) @ weight).sum().backward()
    assert features.leaf.grad is None
    assert features.pending(1.0).item() == 0
    assert not features.pending(1.0).requires_grad


def test_classes_of_padding_alone_add_nothing_to_a_local_loss() -> None:
    labels, counted = torch.tensor([3, 1, 3, 7]), torch.tensor([True, True, True, False])
    classes, counts = counted_classes(labels, counted)
    assert (classes.tolist(), counts.tolist()) == ([1, 3, 7], [1, 2, 0])
    logits = torch.randn(4, 3, requires_grad=True)
    losses = caption_losses(logits, labels, classes, counts)
    repeated = logits[:3][:, [1, 0, 1]]  # a column for each image that counts
    torch.testing.assert_close(losses[:3], F.cross_entropy(repeated, torch.arange(3), reduction="none"))
    (losses * counted).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and not logits.grad[:, 2].any()


def test_a_micro_batch_of_padding_alone_still_has_a_finite_loss() -> None:
    labels = torch.tensor([2, 2])
    classes, counts = counted_classes(labels, torch.zeros(2, dtype=torch.bool))
    assert (classes.tolist(), counts.tolist()) == ([2], [2])
    assert caption_losses(torch.randn(2, 1), labels, classes, counts).isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_blended_weighted_and_smoothed_cross_entropy_is_the_slow_sum(smoothing: float) -> None:
    """Share x weight of the class x smoothed cross-entropy with the class, summed over the two labels."""
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 1, 0])
    weight = torch.tensor([0.5, 2.0, 1.0, 1.5])[labels] / 6
    batch = {"image": torch.rand(6, 3, 4, 4, generator=generator), "label": labels, "weight": weight}
    mix = {"kind": "mixup", "alpha": 1.0, "seed": 5, "classes": 4, "rows": list(range(6))}
    blended = batch | _mixed(batch, mix)
    with rng.seeded(5):
        share = float(torch.distributions.Beta(torch.tensor([1.0]), torch.tensor([1.0])).sample(()))

    def one(row: int, label: int) -> float:
        logs = logits[row].log_softmax(0)
        return float(-(1 - smoothing) * logs[label] - smoothing * logs.mean())

    slow = 0.0
    for row in range(6):
        other = (row - 1) % 6
        slow += share * float(weight[row]) * one(row, int(labels[row]))
        slow += (1 - share) * float(weight[other]) * one(row, int(labels[other]))
    losses, right = class_losses(logits, blended, smoothing)
    assert float((losses * blended["weight"]).sum()) == pytest.approx(slow, rel=1e-5)
    guesses = logits.argmax(1)
    assert torch.equal(right, blended["target"][torch.arange(6), guesses])
    plain, hits = class_losses(logits, batch, smoothing)
    assert plain.tolist() == pytest.approx([one(row, int(labels[row])) for row in range(6)], rel=1e-5)
    assert torch.equal(hits, guesses == labels)
