"""Learned tokens in image towers, against hooks on the unchanged tower, and the towers that take them or refuse."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from randlora_pl.adapters import LoRA
from randlora_pl.models import encode_prompts, load_clip, set_gradient_checkpointing
from randlora_pl.models.clip import load_tokenizer, meta_clip
from randlora_pl.models.text import (
    embed_dim,
    encode_rows,
    image_blocks,
    image_features,
    image_width,
    is_causal,
    text_tower,
)
from randlora_pl.prompts import CoOp, DeepPrompts, Fixed, MaPLe
from randlora_pl.tasks import PromptTask
from randlora_pl.utils.errors import UserError
from tests.prompts import reference
from tests.support.products import in_one_item, marked

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


# Towers that take learned tokens, and the messages about those that do not


TARGETS = [r"(text\.|transformer).*mlp.*"]
CLASSES = ["zebra", "cat"]


@in_one_item("name", ["Small", "Small-custom", "Small-timm", "Small-resnet"])
def test_causal_text_towers_take_learned_tokens_beside_any_image_tower(name: str) -> None:
    clip = load_clip(name)
    model: Any = clip.model.eval()
    tokenizer: Any = clip.tokenizer
    context = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    deep = [torch.randn(4, 32, generator=torch.Generator().manual_seed(1))]
    rows = CoOp(words="a photo of a").build(model, tokenizer, CLASSES, 0).rows(CLASSES, 4096)
    slow = [reference.row(tokenizer, each, "a photo of a", 4) for each in CLASSES]
    with torch.no_grad():
        found = encode_rows(text_tower(model), rows, context, deep)
        torch.testing.assert_close(found, reference.text_features(model, slow, context, deep), rtol=0, atol=1e-5)
    assert found.shape == (2, embed_dim(model)) == (2, 24)


@pytest.mark.parametrize(
    ("name",),
    marked(
        zip(["Small-bidirectional", "Small-eos", "Small-coca", "Small-timm", "Small-resnet"]),
        lambda row: row[0] in ("Small-bidirectional", "Small-timm"),
    ),
)
def test_words_alone_do_with_any_towers(name: str) -> None:
    task = PromptTask(name, "random", prompts=Fixed(), adapter=LoRA(rank=2), targets=TARGETS, text_chunk_tokens=1)
    task.set_classes(CLASSES, ["{}"])
    task.adapt()
    clip = load_clip(name)
    with torch.no_grad():
        expected = encode_prompts(clip.model, clip.tokenizer, CLASSES, ["a photo of a {}."], "cpu")
        torch.testing.assert_close(task.eval().class_features(), expected, rtol=0, atol=1e-5)
    size, label = clip.image.size, torch.tensor([0, 1])
    batch = {"image": torch.randn(2, 3, size, size), "label": label, "micro_batch": 0, "micro_batches": 1}
    task.train().sample_losses(batch)[0].sum().backward()
    trained = [value for value in task.model.parameters() if value.requires_grad]
    assert trained and all(value.grad is not None for value in trained)
    if name in ("Small-bidirectional", "Small-eos", "Small-coca"):
        long = "an exceedingly long and winding name of a class"
        with pytest.raises(UserError, match=f"class '{long}' is longer than the 12 tokens that the text tower has"):
            task.set_classes(["cat", long, "a dog"], ["{}"])
        with pytest.raises(UserError, match="learned prompts need"):
            other = PromptTask(name, "random", prompts=CoOp())
            other.set_classes(CLASSES, ["{}"])
            other.adapt()


def text_of_hugging_face() -> nn.Module:
    """A small text tower of open_clip's class for these."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.RobertaConfig(vocab_size=40, **sizes)
    tower: nn.Module = HFTextEncoder("roberta", 24, config, "mean_pooler", "linear", pretrained=False)
    return tower


@in_one_item(
    ("name", "why"),
    [
        ("Small-coca", "tower ends with a class token"),
        ("Small-bidirectional", "tower's words see later words"),
        ("Small-eos", r"tower is read otherwise \(pool type eos\)"),
        ("", "one is HFTextEncoder"),
    ],
)
def test_other_text_towers_are_refused(name: str, why: str) -> None:
    model: Any = load_clip(name).model if name else SimpleNamespace(text=text_of_hugging_face())
    assert not is_causal(model)
    for call in (lambda: text_tower(model), lambda: CoOp().build(model, lambda texts: None, CLASSES, 0)):
        with pytest.raises(UserError, match=rf"learned prompts need CLIP's causal .* this {why}\. Use .* Fixed"):
            call()


def test_visual_tokens_need_a_vision_transformer() -> None:
    message = r"visual prompts need a vision transformer.*the image tower is ModifiedResNet\. Prompts of the text tower"
    with pytest.raises(UserError, match=message):
        image_width(load_clip("Small-resnet").model.visual)
    rotary: Any = meta_clip("EVA02-B-16")  # of timm
    tokenizer = load_tokenizer("EVA02-B-16")
    for learner in (MaPLe(), DeepPrompts()):
        with pytest.raises(UserError, match=r"the image tower is Eva\. Prompts of the text tower work") as caught:
            learner.build(rotary, tokenizer, CLASSES, 0)
        assert "\n" not in str(caught.value)
    for learner, count in ((CoOp(), 4 * 512), (DeepPrompts(vision_length=0), 36 * 512)):
        assert sum(value.numel() for value in learner.build(rotary, tokenizer, CLASSES, 0).parameters()) == count
