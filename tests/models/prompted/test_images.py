"""Learned tokens in the image towers of both libraries, against hooks on the unchanged tower."""

from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_pl.models import load_clip, set_gradient_checkpointing
from randlora_pl.models.text import image_blocks, image_features, image_width
from tests.prompts import reference
from tests.support.products import in_one_item

TOWERS = {"tiny": 6, "Small-custom": 2, "Small-coca": 2, "Small-timm": 6, "Small-mean": 2}
"""Blocks; the pooling is of a class token, a learned one, timm's, and a mean over all patches."""


def built(name: str) -> tuple[Any, Tensor]:
    clip = load_clip(name)
    noise = torch.randn(2, 3, clip.image.size, clip.image.size, generator=torch.Generator().manual_seed(1))
    return clip.model.requires_grad_(False).eval(), noise


def drawn(visual: Any, count: int, depth: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(count, image_width(visual))] * depth
    return [(0.5 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]


def gradients(features: Tensor, prompts: list[Tensor]) -> tuple[Tensor, ...]:
    upper = torch.randn(features.shape, generator=torch.Generator().manual_seed(9)).to(features.dtype)
    return torch.autograd.grad((features * upper).sum(), prompts)


@in_one_item("name", TOWERS)
def test_features_and_gradients_equal_those_of_hooks_on_the_tower(name: str) -> None:
    model, images = built(name)
    prompts = drawn(model.visual, 2, 2)
    fast, slow = image_features(model.visual, images, prompts), reference.image_features(model, images, prompts)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    with torch.no_grad():  # one by one, as the hooks are
        single = torch.cat([image_features(model.visual, image[None], prompts) for image in images])
        assert torch.equal(single, reference.image_features(model, images, prompts))
    for own, other in zip(gradients(fast, prompts), gradients(slow, prompts), strict=True):
        assert own.abs().max() > 0
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    plain = model.visual(images)
    plain = plain[0] if isinstance(plain, tuple) else plain
    assert torch.equal(image_features(model.visual, images), plain)
    swapped = [each.flip(0) for each in prompts]  # they have no positions
    torch.testing.assert_close(image_features(model.visual, images, swapped), fast, rtol=0, atol=1e-5)
    assert (plain - fast).abs().max() > 1e-4
    assert len(image_blocks(model.visual)) == TOWERS[name]


@in_one_item("name", ["tiny", "Small-timm"])
def test_blocks_that_are_computed_again_give_the_same(name: str) -> None:
    model, images = built(name)
    prompts = drawn(model.visual, 2, 2)
    kept = image_features(model.visual, images, prompts)
    expected = gradients(kept, prompts)
    blocks = model.visual.trunk.blocks if hasattr(model.visual, "trunk") else model.visual.transformer.resblocks
    calls: list[int] = []
    blocks[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    set_gradient_checkpointing(model, True)
    again = image_features(model.visual, images, prompts)
    assert torch.equal(kept, again)
    for own, other in zip(gradients(again, prompts), expected, strict=True):
        assert torch.equal(own, other)
    assert len(calls) == 2


def test_gradients_are_those_of_finite_differences() -> None:
    model, images = built("tiny")
    visual, images = model.visual.double(), images.double()
    prompts = drawn(visual, 2, 2, torch.float64)
    found = gradients(image_features(visual, images, prompts), prompts)
    upper = torch.randn(2, 128, generator=torch.Generator().manual_seed(9)).double()
    for number, gradient in enumerate(found):
        way, step = torch.zeros_like(gradient).normal_(generator=torch.Generator().manual_seed(3)), 1e-6
        ends = []
        for sign in (1, -1):
            moved = [each + sign * step * way if place == number else each for place, each in enumerate(prompts)]
            ends.append((image_features(visual, images, moved) * upper).sum().item())
        assert float((gradient * way).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)
