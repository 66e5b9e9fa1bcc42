"""Learners at their start, which equals a template's or another learner's, and the options that they refuse."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.models import encode_prompts, load_clip
from randlora_pl.models.clip import load_tokenizer, meta_clip
from randlora_pl.models.text import encode_rows, image_features, text_tower
from randlora_pl.prompts import CoCoOp, CoOp, DeepPrompts, Fixed, MaPLe, PromptLearner, Prompts
from randlora_pl.utils.errors import UserError
from tests.prompts import reference
from tests.support.products import in_one_item

NAMES = ["zebra", "cat", "a very old dog"]


@cache
def tiny() -> tuple[Any, Any]:
    """A model, which no learner changes, and its tokenizer."""
    clip = load_clip("tiny")
    return clip.model.requires_grad_(False).eval(), clip.tokenizer


def made(learner: PromptLearner, names: Sequence[str] = NAMES, seed: int = 0) -> Any:
    return learner.build(*tiny(), names, seed)


def texts(prompts: Prompts, names: Sequence[str] = NAMES) -> Tensor:
    return encode_rows(text_tower(tiny()[0]), prompts.rows(names, 20), prompts.context(), prompts.deep())


def images(prompts: Prompts) -> Tensor:
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return image_features(tiny()[0].visual, noise, prompts.vision())


def gradients(features: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    upper = torch.randn(features.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((F.normalize(features, dim=1) * upper).sum(), tensors, retain_graph=True)


@in_one_item(
    ("learner", "template"),
    [
        (Fixed(), "a photo of a {}."),
        (CoOp(), "a photo of a {}."),
        (CoOp(class_specific=True), "a photo of a {}."),
        (CoOp(position="middle"), "a photo {} of a."),
        (CoOp(position="front"), "{} a photo of a."),
        (CoCoOp(), "a photo of a {}."),  # with no image
        (MaPLe(depth=1), "a photo of a {}."),
        (DeepPrompts(depth=1), "a photo of a {}."),
        (DeepPrompts(length=0, depth=1), "a photo of a {}."),
        (DeepPrompts(length=0, depth=1, words=""), "{}."),
    ],
)
def test_words_are_their_template_before_training(learner: PromptLearner, template: str) -> None:
    with torch.no_grad():
        found = F.normalize(texts(made(learner)), dim=1)
        expected = encode_prompts(*tiny(), NAMES, [template], "cpu")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        pixels = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
        assert torch.equal((pixels @ found.T).argmax(1), (pixels @ expected.T).argmax(1))


def test_maple_without_its_images_is_two_learned_words() -> None:
    maple, deep = made(MaPLe(depth=1)), made(DeepPrompts(length=2, vision_length=0, depth=1))
    rows = [reference.row(tiny()[1], name, "a photo of a", 2) for name in NAMES]
    own, other = texts(maple), texts(deep)
    slow = reference.text_features(tiny()[0], rows, maple.tokens)
    assert torch.equal(own, other)
    torch.testing.assert_close(own, slow, rtol=0, atol=1e-5)
    (one,), (two,), (three,) = (
        gradients(own, maple.tokens), gradients(other, deep.tokens), gradients(slow, maple.tokens)
    )  # fmt: skip
    assert torch.equal(one, two)
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)


def test_maples_images_are_functions_of_its_texts() -> None:
    for learner in (MaPLe(depth=3), MaPLe(depth=3, equal_start=False), MaPLe(depth=3, coupling="low_rank", rank=2)):
        maple = made(learner)
        starts = [next(function.parameters()) for function in maple.projections]
        assert torch.equal(starts[1], starts[2]) == learner.equal_start and not torch.equal(starts[0], starts[1])
        trained = dict(maple.named_parameters())
        found = gradients(images(maple), *trained.values())
        assert all(gradient.abs().max() > 0 for gradient in found), learner
        by_hand = maple.texts[0] @ starts[1].T if learner.coupling == "linear" else None
        if by_hand is not None:
            torch.testing.assert_close(maple.vision()[1], by_hand + maple.projections[1].bias)
    none = made(MaPLe(depth=3, coupling="none"))
    assert torch.equal(none.images[1], made(DeepPrompts(length=2, vision_length=2, depth=3)).images[1])


def test_one_block_of_texts_alone_is_coop() -> None:
    deep, coop = made(DeepPrompts(vision_length=0, depth=1)), made(CoOp())
    own, other = texts(deep), texts(coop)
    assert torch.equal(own, other)
    assert torch.equal(*gradients(own, deep.tokens), *gradients(other, coop.tokens))
    assert torch.equal(
        images(deep), tiny()[0].encode_image(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    )


def test_random_tokens_depend_on_seed_and_name_alone() -> None:
    learner = DeepPrompts(length=2, vision_length=3, depth=3)
    one, same, other = made(learner), made(learner, NAMES[:2]), made(learner, seed=1)
    for name, value in one.named_parameters():
        assert torch.equal(value, same.get_parameter(name))
        assert torch.equal(value, other.get_parameter(name)) == (name == "tokens")  # words
    drawn = [*one.texts, *one.images]
    assert len({each.flatten()[0].item() for each in drawn}) == 5
    assert all(0.015 < float(each.std()) < 0.025 for each in drawn)
    assert made(CoOp(length=4, words=None)).tokens.std() < 0.03
    assert not torch.equal(made(CoOp(length=4, words=None)).tokens, made(CoOp(length=4, words=None), seed=1).tokens)


LONG = "an exceedingly long and winding name of a class"


@in_one_item(
    ("learner", "message"),
    [
        (
            CoOp(length=3),
            r"the words 'a photo of a' are 4 tokens for this model, length is 3\. Leave length out, or set",
        ),
        (CoOp(words="zebra", length=1), "are 3 tokens for this model, length is 1"),
        (CoOp(words=None), "random tokens need a number: give --model.prompts.length"),
        (CoCoOp(length=5), "are 4 tokens for this model, length is 5"),
        (DeepPrompts(length=6), r"are 4 tokens for this model, length is 6\. Give more words \(--model"),
        (MaPLe(length=5), r"length is 5\. Give more words"),
        (
            DeepPrompts(depth=7),
            r"depth is 7: the text tower has 4 blocks and the image tower has 6 blocks\. Give 4 or less",
        ),
        (DeepPrompts(length=0, depth=7), r"depth is 7: the image tower has 6 blocks\. Give 6 or less \(--model"),
        (MaPLe(depth=5), "depth is 5: the text tower has 4 blocks"),
    ],
)
def test_options_that_do_not_fit_the_model_are_one_line(learner: PromptLearner, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        made(learner)
    assert "\n" not in str(caught.value)


def test_a_name_beyond_the_towers_room_is_named() -> None:
    for learner in (Fixed(), CoOp(), CoOp(class_specific=True), CoCoOp(), MaPLe(depth=1), DeepPrompts(depth=1)):
        names = ["cat", LONG, "a dog"]
        with pytest.raises(
            UserError, match=f"the prompt of class '{LONG}' has .. tokens, the text tower has room for 16"
        ):
            made(learner, names).rows(names, 4096)
    room = made(CoOp(length=11, words=None))  # 16 tokens with the name, three marks and 11 learned ones
    assert room.rows(["ox"], 99).ids.shape[1] <= 16
    with pytest.raises(UserError, match="class 'zebra' has 17 tokens"):
        room.rows(["cat", "zebra"], 99)
    tokenizer, model = load_tokenizer("ViT-B-32"), meta_clip("ViT-B-32")  # 77 positions, three marks
    for learner, most in ((Fixed(), 70), (CoOp(), 70), (CoOp(length=16, words=None), 58), (MaPLe(), 70)):
        prompts = learner.build(model, tokenizer, NAMES, 0)
        assert prompts.rows([" ".join(["cat"] * most)], 4096).ids.shape == (1, 77)
        with pytest.raises(UserError, match="cat cat' has 78 tokens, the text tower has room for 77"):
            prompts.rows(["dog", " ".join(["cat"] * (most + 1))], 4096)


def test_impossible_numbers_and_other_classes_are_refused() -> None:
    for make in (lambda: CoOp(length=0), lambda: MaPLe(depth=0), lambda: MaPLe(rank=0), lambda: DeepPrompts(depth=0)):
        with pytest.raises(UserError, match=r"is 0\. Set a positive whole number"):
            make()
    with pytest.raises(UserError, match=r"nothing is learned\. Use --model\.prompts Fixed"):
        DeepPrompts(length=0, vision_length=0)
    with pytest.raises(UserError, match=r"it needs \{\} for the name"):
        Fixed(template="a photo")
    prompts = made(CoOp(class_specific=True))
    assert prompts.tokens.shape == (3, 4, 128)
    with pytest.raises(UserError, match=r"learned for 3 classes, these are 2\. Train with .*class_specific false"):
        prompts.rows(NAMES[:2], 4096)
    assert len(made(CoOp()).rows(NAMES[:2], 4096)) == 2
