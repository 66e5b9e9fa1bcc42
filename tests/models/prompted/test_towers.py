"""Towers that take learned tokens, and the messages about those that do not."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from torch import nn

from randlora_pl.adapters import LoRA
from randlora_pl.models import encode_prompts, load_clip
from randlora_pl.models.clip import load_tokenizer, meta_clip
from randlora_pl.models.text import embed_dim, encode_rows, image_width, is_causal, text_tower
from randlora_pl.prompts import CoOp, DeepPrompts, Fixed, MaPLe
from randlora_pl.tasks import PromptTask
from randlora_pl.utils.errors import UserError
from tests.prompts import reference
from tests.support.products import in_one_item, marked

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
    with pytest.raises(UserError, match=rf"learned prompts need CLIP's causal .* this {why}\. Use .* Fixed"):
        text_tower(model)
    with pytest.raises(UserError, match=rf"learned prompts need CLIP's causal .* this {why}\. Use .* Fixed"):
        CoOp().build(model, lambda texts: None, CLASSES, 0)


def test_visual_tokens_need_a_vision_transformer() -> None:
    with pytest.raises(UserError, match=r"the image tower is ModifiedResNet\. Prompts of the text tower work"):
        image_width(load_clip("Small-resnet").model.visual)
    rotary: Any = meta_clip("EVA02-B-16")  # of timm
    tokenizer = load_tokenizer("EVA02-B-16")
    for learner in (MaPLe(), DeepPrompts()):
        with pytest.raises(UserError, match=r"the image tower is Eva\. Prompts of the text tower work") as caught:
            learner.build(rotary, tokenizer, CLASSES, 0)
        assert "\n" not in str(caught.value)
    for learner, count in ((CoOp(), 4 * 512), (DeepPrompts(vision_length=0), 36 * 512)):
        assert sum(value.numel() for value in learner.build(rotary, tokenizer, CLASSES, 0).parameters()) == count


def test_prompts_of_a_convolutional_tower_are_refused_by_the_command_line(refused: Callable[..., str]) -> None:
    words = ("fit", "--model", "PromptTask", "--model.name", "Small-resnet", "--model.pretrained", "random")
    data = ("--data.dataset", "digits", "--data.steps", "1", "--trainer.accelerator", "cpu")
    for learner in ("MaPLe", "DeepPrompts"):
        message = refused(*words, *data, "--model.prompts", learner, "--model.prompts.depth", "1")
        assert "visual prompts need a vision transformer" in message and "image tower is ModifiedResNet" in message
