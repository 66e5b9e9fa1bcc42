"""Whole CLIP models give open_clip's own logits, before the injection of an adapter and after it was merged."""

from collections.abc import Callable, Iterator
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from randlora_pl.adapters import LoRA, RandLoRA, merge_and_unload
from randlora_pl.models import clip
from randlora_pl.tasks import VisionLanguageTask
from randlora_pl.tasks.vision_language import logit_bias

TRUE = ("PE-Core-B-16", "PE-Core-L-14-336", "ViT-B-16-SigLIP2", "ViT-H-14-quickgelu")
"""The last one is DFN5B's, with 4 GB of weights."""
NAMES = ["Small-custom", *(pytest.param(name, marks=pytest.mark.slow) for name in TRUE)]
CLASSES = ["cat", "dog", "owl"]


def ids(config: dict[str, Any]) -> Callable[[list[str]], Tensor]:
    """A tokenizer without files: random words, and CLIP's end, which has the largest id."""
    text = config["text_cfg"]

    def tokenize(texts: list[str]) -> Tensor:
        rows = torch.zeros(len(texts), text.get("context_length", 77), dtype=torch.long)
        for row, each in zip(rows, texts, strict=True):
            generator = torch.Generator().manual_seed(len(each) + ord(each[-1]))
            row[:9] = torch.randint(1, text["vocab_size"] - 1, (9,), generator=generator)
            row[9] = text["vocab_size"] - 1
        return rows

    return tokenize


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name: str = request.param
    monkeypatch.setattr(clip, "load_tokenizer", lambda known: ids(open_clip.get_model_config(known)))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield name
    torch.set_num_threads(threads)


@torch.no_grad()
def test_logits_are_those_of_open_clip(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = RandLoRA(rank=8) if name.startswith("Small") else LoRA(rank=4, alpha=16)
    task = VisionLanguageTask(name, "random", adapter=adapter, caption="a {}", seed=3)
    task.set_classes(CLASSES, ["a {}"])
    task.backbone = model = task.build().eval()
    size = task.image_spec.size
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    tokens = task.tokenizer([f"a {each}" for each in CLASSES])

    def ours() -> Tensor:
        """The logits of a prediction, with the bias that cancels there."""
        task.forget()
        bias = logit_bias(task.model)
        return task.class_logits(images) + (0.0 if bias is None else bias)

    other = open_clip.create_model(name).eval()

    def theirs(state: dict[str, Tensor]) -> Tensor:
        other.load_state_dict(state, strict=True, assign=True)
        return other.get_logits(images, tokens)[0]  # type: ignore[operator, no-any-return]

    rounding = 1e-5 * float(task.scale())
    before = theirs(model.state_dict()).clone()
    torch.testing.assert_close(ours(), before, rtol=1e-5, atol=rounding)
    monkeypatch.setattr(task, "build", lambda: model)
    task.backbone = None
    task.adapt()
    task.eval()
    torch.testing.assert_close(ours(), before, rtol=1e-5, atol=rounding)
    generator = torch.Generator().manual_seed(2)
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    adapted = ours()
    assert (adapted - before).abs().max() > 100 * rounding
    task.prepare_evaluation()
    torch.testing.assert_close(ours(), adapted, rtol=1e-4, atol=10 * rounding)
    task.finish_evaluation()
    torch.testing.assert_close(theirs(merge_and_unload(model).state_dict()), adapted, rtol=1e-4, atol=10 * rounding)
