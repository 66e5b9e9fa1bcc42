"""``adapter export --to peft``: what it writes, what it says, what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from randlora_pl.adapters import Adapter, LoRA, NoLA, RandLoRA
from randlora_pl.models import load_clip, load_vit
from randlora_pl.tasks import AdaptationTask, LinearHeadTask, TextHeadTask, load_task
from tests.support.cli import Run

VIT = "test_vit.r160_in1k"
"""timm's own small model for tests: one million numbers, 160 pixels."""


def adapter(kind: type[AdaptationTask], name: str, method: Adapter, path: Path, **options: Any) -> Path:
    """A task with random weights and values, saved."""
    task: Any = kind(name=name, pretrained="random", adapter=method, **options)  # type: ignore[call-arg]
    task.set_classes(["zero", "one", "two"], ["a {}"])
    task.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    saved: Path = task.save(path)
    return saved


def test_a_vit_with_its_head(run: Run, tmp_path: Path) -> None:
    adapter(LinearHeadTask, VIT, RandLoRA(rank=6), tmp_path / "ours")
    result = run("adapter", "export", "ours", "--to", "peft", "--output", "peft")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert "largest difference to PEFT's outputs" in lines[0]
    gap, change = (float(word.strip(",")) for word in lines[0].split() if "e-0" in word or "e+0" in word)
    assert gap < 1e-5 < change
    assert lines[1].startswith("PEFT warns of missing keys")
    assert lines[2] == "The head is the model's own classifier (head), its classes are in task.json."
    assert lines[3] == "Its base model has random weights (seed 0), which no other program builds."
    assert json.loads((tmp_path / "peft" / "task.json").read_text())["classnames"] == ["zero", "one", "two"]
    base: Any = load_vit(VIT, "random").model
    base.reset_classifier(3)
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    task = load_task(tmp_path / "ours")
    x = torch.randn(2, 3, task.image_spec.size, task.image_spec.size)
    torch.testing.assert_close(theirs(x), task.class_logits(x), rtol=1e-5, atol=1e-5)


def test_a_clip_model_keeps_its_head_beside(run: Run, tmp_path: Path) -> None:
    adapter(TextHeadTask, "tiny", LoRA(rank=2), tmp_path / "ours", targets=["mlp"])
    result = run("adapter", "export", "ours", "--to", "peft", "--output", "peft")
    assert result.code == 0, result.err
    assert "PEFT cannot store the head. It is in peft/head.safetensors" in result.out
    task: Any = load_task(tmp_path / "ours")
    head = load_file(tmp_path / "peft" / "head.safetensors")["head"]
    assert torch.equal(head, task.head)
    theirs: Any = PeftModel.from_pretrained(load_clip("tiny", "random").model.eval(), tmp_path / "peft")
    x = torch.randn(2, 3, 32, 32)
    features = torch.nn.functional.normalize(theirs.get_base_model().encode_image(x), dim=-1)
    torch.testing.assert_close(features @ head.T, task.class_logits(x), rtol=1e-5, atol=1e-5)


def test_the_code_that_loads_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from randlora_pl.commands.adapter.export import _code
    from randlora_pl.models import ModelIdentity

    classes = tmp_path / "task.json"
    classes.write_text('{"classnames": ["a", "b"]}')
    tag = ModelIdentity("timm", "vit_tiny_patch16_224.augreg_in21k", "augreg_in21k", 224)
    assert _code(tag, classes) == (
        'timm.create_model("vit_tiny_patch16_224.augreg_in21k", pretrained=True, num_classes=2)'
    )
    other = ModelIdentity("timm", "vit_small_patch14_dinov2.lvd142m", "/w.pt", 224, sha256="00")
    assert _code(other, None) == (
        'timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=True, num_classes=0, img_size=224, '
        'pretrained_cfg_overlay={"file": "/w.pt"})'
    )
    file = ModelIdentity("open_clip", "ViT-B-32", "/w.pt", 224, sha256="00")
    assert _code(file, None) == 'open_clip.create_model("ViT-B-32", pretrained="/w.pt")'


def test_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    adapter(TextHeadTask, "tiny", RandLoRA(rank=6), tmp_path / "ours")
    message = refused("adapter", "export", "ours", "--to", "peft", "--output", "peft")
    assert "nn.MultiheadAttention" in message
    adapter(TextHeadTask, "tiny", NoLA(rank=2, num_bases=4), tmp_path / "nola", targets=["mlp"])
    message = refused("adapter", "export", "nola", "--to", "peft", "--output", "peft")
    assert "(NoLA)" in message
    (tmp_path / "peft").mkdir()
    assert "--output" in refused("adapter", "export", "ours", "--to", "peft", "--output", "peft")
