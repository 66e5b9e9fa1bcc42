"""Numbers that train, on models without data: table 3.10 of the design, and the formulas behind it."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from randlora_pl.adapters import LoRA, RandLoRA, inject
from randlora_pl.models.clip import load_tokenizer, meta_clip
from randlora_pl.prompts import CoCoOp, CoOp, DeepPrompts, Fixed, MaPLe, PromptLearner
from randlora_pl.tasks import DePT, TipAdapter
from randlora_pl.tasks.prompt.parts import Cache
from tests.support.products import in_one_item

CLASSES = ["cat", "dog", "zebra"]
SIXTEEN = CoOp(length=16, words=None)
COUNTS: list[tuple[str, PromptLearner, int]] = [
    ("ViT-B-32", Fixed(), 0),
    ("ViT-B-32", CoOp(), 2_048),
    ("ViT-B-32", SIXTEEN, 8_192),
    ("ViT-B-32", SIXTEEN.replace(class_specific=True), 3 * 8_192),
    ("ViT-B-32", CoOp(class_specific=True), 3 * 2_048),
    ("ViT-B-32", CoCoOp(), 35_360),
    ("ViT-B-32", DeepPrompts(), 46_080),
    ("ViT-B-32", DeepPrompts(vision_length=0), 18_432),
    ("ViT-B-32", DeepPrompts(length=0), 27_648),
    ("ViT-B-32", MaPLe(), 3_555_072),
    ("ViT-B-32", MaPLe(depth=3), 1_185_024),
    ("ViT-B-32", MaPLe(coupling="low_rank"), 9_216 + 184_320),
    ("ViT-B-32", MaPLe(coupling="none"), 9 * 2 * (512 + 768)),
    ("ViT-B-16", MaPLe(), 3_555_072),
    ("ViT-L-14", CoOp(), 4 * 768),
    ("ViT-L-14", DeepPrompts(), 9 * 4 * (768 + 1024)),
    ("ViT-L-14", MaPLe(), 7_100_928),
    ("ViT-H-14", MaPLe(), 11_826_432),
    ("tiny", MaPLe(depth=4), 100_096),
    ("tiny", CoCoOp(), 4 * 128 + 129 * 8 + 9 * 128),
]


@cache
def on_meta(name: str) -> tuple[Any, Any]:
    """A model, which no learner changes, and its tokenizer."""
    return meta_clip(name), load_tokenizer(name)


def counted(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@in_one_item(("name", "learner", "count"), COUNTS)
def test_learners_train_as_many_numbers_as_the_table_says(name: str, learner: PromptLearner, count: int) -> None:
    prompts = learner.build(*on_meta(name), CLASSES, 0)
    assert counted(prompts) == count
    assert all(parameter.dtype == torch.float32 and parameter.is_meta for parameter in prompts.parameters())


def test_a_weight_update_alone_and_beside_prompts() -> None:
    for name in ("ViT-B-32", "ViT-B-16"):
        model: Any = meta_clip(name)
        inject(model, LoRA(rank=2, alpha=1, rslora=True, dropout=0.25, qkv="split"), ["q", "k", "v"])
        assert counted(model) == 184_320  # CLIP-LoRA
    both, tokenizer = meta_clip("ViT-B-32"), on_meta("ViT-B-32")[1]
    prompts = DeepPrompts().build(both, tokenizer, CLASSES, 0)
    inject(both, RandLoRA(rank=10))
    assert (counted(both), counted(both) + counted(prompts)) == (3_133_800, 3_179_880)
    from_words = CoOp().build(both, tokenizer, CLASSES, 0)
    assert counted(both) + counted(from_words) == 3_135_848


MAPLE_DEPT = {
    10: 3_562_250, 37: 3_576_101, 47: 3_581_231, 100: 3_608_420, 101: 3_608_933, 102: 3_609_446, 196: 3_657_668,
    397: 3_760_781, 1_000: 4_070_120,
}  # fmt: skip
"""Numbers that train on the eleven datasets, by number of classes."""


def test_second_heads_beside_maple_and_keys_of_training_images() -> None:
    maple = counted(MaPLe().build(*on_meta("ViT-B-32"), CLASSES, 0))
    for classes, expected in MAPLE_DEPT.items():
        task: Any = SimpleNamespace(own_classes=range(classes), seed=0)
        second = counted(DePT().build(task, 512))
        assert second == 2_048 + 513 * classes and maple + second == expected
    for classes, shots in ((10, 16), (47, 16), (100, 4)):
        labels = torch.arange(classes).repeat_interleave(shots)
        assert counted(Cache(TipAdapter(), labels, 512, classes)) == 512 * shots * classes
        assert shots != 16 or 512 * shots * classes == 8_192 * classes
