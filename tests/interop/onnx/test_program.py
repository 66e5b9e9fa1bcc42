"""The plain module against the task that it was made from, with its adapter in place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters import BitFit, DoRA, LoRA, RandLoRA, inject, read_adapter, save_adapter
from randlora_pl.adapters.layers import AdaptedLayer
from randlora_pl.data.unlabelled import frame_of
from randlora_pl.interop.onnx.program import load_program, make_program
from randlora_pl.models import load_clip
from randlora_pl.run.options.adapter_config import adapter_config
from randlora_pl.tasks import LinearHeadTask, TextHeadTask, VisionLanguageTask
from randlora_pl.tasks.base import AdaptationTask
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from tests.tasks.small import two_blocks

NAMES, PROMPTS = ["cat", "dog", "cow"], ["a photo of a {}.", "art of a {}."]
TASKS: dict[str, Any] = {
    "both towers": lambda **more: VisionLanguageTask(adapter=RandLoRA(rank=6), **more),
    "text head": lambda **more: TextHeadTask(adapter=DoRA(inner=LoRA(rank=2)), **more),
    "linear head, CLIP": lambda **more: LinearHeadTask(name="tiny", adapter=BitFit(), **more),
    "linear head, timm": lambda **more: LinearHeadTask(name="test_vit", img_size=32, adapter=LoRA(rank=2), **more),
}


@pytest.fixture(autouse=True, scope="module")
def _shallow() -> Iterator[None]:
    with two_blocks():
        yield


def trained(kind: str, **options: Any) -> AdaptationTask:
    """A task whose adapter and head have some other values than at the start."""
    task: AdaptationTask = TASKS[kind](**({"pretrained": "random"} | options))
    task.set_classes(NAMES, PROMPTS)
    task.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return task.eval()


def normalised(pixels: Tensor, spec: Any) -> Tensor:
    return torch.stack([(pixels[:, c] - spec.mean[c]) / spec.std[c] for c in range(3)], 1)


@pytest.mark.parametrize("kind", TASKS)
def test_classifier_and_features_are_those_of_the_task(kind: str) -> None:
    task = trained(kind)
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        logits = task.class_logits(normalised(pixels, task.image_spec))
    head = task.head_tensors().get("head")
    program = make_program(task)
    got, shares = program.module(pixels)
    torch.testing.assert_close(got, logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(shares, logits.softmax(1), atol=1e-5, rtol=0)
    assert program.outputs == ("logits", "probabilities") and program.facts["classnames"] == NAMES
    assert not any(isinstance(module, AdaptedLayer) for module in program.module.modules())
    assert not any(parameter.requires_grad for parameter in program.module.parameters())
    assert program.examples(2, 0).shape == (2, 3, 32, 32)
    features = make_program(trained(kind), "image").module(pixels)
    if kind != "linear head, timm":
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    if head is not None:
        torch.testing.assert_close(features @ head.T, logits, atol=1e-4, rtol=1e-5)


def test_text_tower() -> None:
    """The trained one of both towers; behind a frozen head, the one that the head was made with."""
    task = trained("both towers")
    assert isinstance(task, VisionLanguageTask)
    tokens = task.tokenizer(["a photo of a cat.", "dog"])
    with torch.no_grad():
        expected = F.normalize(task.model.encode_text(tokens), dim=-1)  # type: ignore[operator]
        plain = F.normalize(load_clip("tiny", "random").model.eval().encode_text(tokens), dim=-1)  # type: ignore[operator]
    program = make_program(task, "text")
    torch.testing.assert_close(program.module(tokens), expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(make_program(trained("text head"), "text").module(tokens), plain, atol=1e-6, rtol=0)
    assert program.input == "tokens" and program.examples(4, 1).shape == (4, 16)
    assert not any("visual" in name for name in program.module.state_dict())
    with pytest.raises(UserError, match="LinearHeadTask"):
        make_program(trained("linear head, timm"), "text")


def test_facts(tmp_path: Path) -> None:
    task = trained("both towers", eval_prompts="ensemble")
    frame = ImageSpec(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    task.save(tmp_path / "adapter", {"frame": frame.__dict__})
    program = load_program(tmp_path / "adapter")
    facts = json.loads(json.dumps(program.facts))
    assert facts["prompts"] == PROMPTS and facts["mean"] == [0.1, 0.2, 0.3] and facts["interpolation"] == "bilinear"
    assert facts["base_model"]["name"] == "tiny" and facts["adapter"]["method"] == "RandLoRA"
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():  # the mean of the training counts, not the backbone's own
        expected = task.class_logits(normalised(pixels, frame))
    torch.testing.assert_close(program.module(pixels)[0], expected, atol=1e-4, rtol=1e-5)
    assert make_program(trained("both towers")).facts["prompts"] == ["An image of {}"]
    assert make_program(trained("linear head, timm")).facts["prompts"] == []


def test_padding_travels_with_the_adapter(tmp_path: Path) -> None:
    task = trained("text head")
    frame = ImageSpec(32, interpolation="bilinear", resize="longest", crop_pct=0.9, fill=(9, 9, 0))
    task.save(tmp_path / "adapter", {"frame": frame.__dict__})
    facts = load_program(tmp_path / "adapter").facts
    assert (facts["resize"], facts["crop_pct"], facts["fill"]) == ("longest", 0.9, [9, 9, 0])
    assert facts["format_version"] == 2
    assert "longer side to 35" in facts["preprocessing"] and "the color 9, 9, 0" in facts["preprocessing"]
    file = read_adapter(tmp_path / "adapter")
    assert frame_of(file.metadata, task.image_spec) == frame
    saved = adapter_config(tmp_path / "adapter")["data"]
    assert (saved["resize"], saved["interpolation"]) == ("longest:0.9", "bilinear")  # what `test --adapter` takes


def test_places_of_weights_are_not_told(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(load_clip("tiny", "random").model.state_dict(), weights)
    facts = make_program(trained("text head", pretrained=str(weights))).facts
    assert facts["base_model"]["pretrained"] == "weights.pt" and str(tmp_path) not in json.dumps(facts)


def test_an_adapter_without_a_task(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    inject(model, LoRA(rank=2), ["0"])
    nothing = {"task": "TextHeadTask", "arguments": {}, "classnames": [], "templates": []}
    for number, metadata in enumerate(({}, nothing)):
        folder = save_adapter(model, tmp_path / str(number), metadata=metadata)
        with pytest.raises(UserError, match="class"):
            load_program(folder)
    trained("linear head, timm").save(tmp_path / "linear")
    with pytest.raises(UserError, match="trained"):
        load_program(tmp_path / "linear", "text")
