"""``adapter import`` and ``adapter export --to peft``: to and from PEFT, and from official checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, RandLoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from randlora_pl.adapters import Adapter, LoRA, NoLA, RandLoRA, load_adapter, read_adapter
from randlora_pl.interop.peft_import import PeftAdapter, named_base
from randlora_pl.models import ImageTower, load_clip, load_vit
from randlora_pl.tasks import LinearHeadTask, Objective, TextHeadTask, VisionLanguageTask, load_task
from tests.fake_hub import Repo, fake_hub
from tests.interop.test_official import by_hand, checkpoint
from tests.support.cli import Refused, Run
from tests.support.products import in_one_item
from tests.tasks.small import shake

PEFT = ("adapter", "import", "peft", "--from", "peft", "--output", "ours")


VIT = "test_vit.r160_in1k"
"""timm's own small model for tests: one million numbers, 160 pixels."""


def adapter(kind: type[Objective], name: str, method: Adapter, path: Path, **options: Any) -> Path:
    """A task with random weights and values, saved."""
    task: Any = kind(name=name, pretrained="random", adapter=method, **options)  # type: ignore[call-arg]
    task.set_classes(["zero", "one", "two"], ["a {}"])
    task.adapt()
    shake(task, 0.1)
    return Path(task.save(path))


def trained_peft(config: Any, path: Path, classes: int = 0, zero_bias: bool = False) -> nn.Module:
    base: Any = load_vit(VIT, "random").model
    base.reset_classifier(classes)
    model: nn.Module = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
        if name.endswith("bias") and "modules_to_save" in name and zero_bias:
            nn.init.zeros_(parameter)
    model.save_pretrained(path)  # type: ignore[operator]
    return model


def test_a_bare_update(run: Run, tmp_path: Path) -> None:
    theirs = trained_peft(RandLoraConfig(r=6, target_modules=["fc1"], save_projection=False), tmp_path / "peft")
    result = run(*PEFT, "--model", VIT, "--pretrained", "random")
    assert result.code == 0, result.err
    assert "RandLoRA: " in result.out and "Largest difference to PEFT's outputs: " in result.out
    assert "Next: randlora-pl adapter merge ours --output FILE" in result.out
    model = load_vit(VIT, "random").model
    file = load_adapter(model, tmp_path / "ours")
    assert file.bases is not None
    assert file.config["base_model"]["name"] == VIT
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert "task" in run("predict", "--adapter", "ours", "--images", ".").err


@pytest.mark.parametrize("zero_bias", [True, False])
def test_a_head_makes_it_a_classifier(run: Run, tmp_path: Path, zero_bias: bool) -> None:
    config = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    theirs = trained_peft(config, tmp_path / "peft", 3, zero_bias)
    (tmp_path / "classes").write_text("cat\ndog\nowl\n", encoding="utf-8-sig")
    result = run(*PEFT, "--model", VIT, "--pretrained", "random", "--classnames", "classes")
    assert result.code == 0, result.err
    if not zero_bias:  # our linear head has none
        assert "The head has a bias, which LinearHeadTask does not support; kept as extra tensors" in result.out
        assert read_adapter(tmp_path / "ours").extra.keys() == {"head.weight", "head.bias"}
        return
    assert "a LinearHeadTask of 3 classes" in result.out
    task = load_task(tmp_path / "ours")
    assert task.classnames == ["cat", "dog", "owl"]
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(task.class_logits(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "method", "options"),
    [
        pytest.param(LinearHeadTask, VIT, RandLoRA(rank=6), {}, marks=pytest.mark.full),
        (LinearHeadTask, VIT, RandLoRA(rank=6), {"seed": 7, "img_size": 64}),
        pytest.param(LinearHeadTask, "tiny", LoRA(rank=2), {}, marks=pytest.mark.full),
        pytest.param(TextHeadTask, "tiny", RandLoRA(rank=6), {"targets": ["fc2"]}, marks=pytest.mark.full),
        (VisionLanguageTask, "tiny", LoRA(rank=2), {"caption": "a scan of {}", "targets": ["visual:mlp"]}),
    ],
)
def test_there_and_back(run: Run, tmp_path: Path, kind: Any, name: str, method: Any, options: dict[str, Any]) -> None:
    adapter(kind, name, method, tmp_path / "first", **options)
    assert run("adapter", "export", "first", "--to", "peft", "--output", "peft").code == 0
    result = run(*PEFT, "--model", name, "--pretrained", "random")
    assert result.code == 0, result.err
    one, two = load_task(tmp_path / "first"), load_task(tmp_path / "ours")
    assert type(one) is type(two) and one.classnames == two.classnames
    x = torch.randn(2, 3, one.image_spec.size, one.image_spec.size)
    torch.testing.assert_close(two.class_logits(x), one.class_logits(x), rtol=1e-5, atol=1e-5)


def test_a_pulled_adapter_of_peft_becomes_ours(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapter(TextHeadTask, "tiny", LoRA(rank=2), tmp_path / "first")
    assert run("adapter", "export", "first", "--to", "peft", "--output", "peft").code == 0
    refusals = {
        "google/vit-base-patch16-224": "Its config has 'google/vit-base-patch16-224'",
        "/home/ann/weights": "Its config has '/home/ann/weights'",
        "local-dir:here": "Its config has 'local-dir:here'",
    }
    with fake_hub(monkeypatch) as hub:
        for name in ("ann/digits", "ann/theirs"):
            hub.repos[name] = Repo(False)
            there = hub.repos[name].branches["main"]
            there |= {file.name: file.read_bytes() for file in Path("peft").iterdir()} | {"evil.bin": b"code"}
        result = run("adapter", "pull", "ann/digits", "--output", "ours")
        assert result.code == 0, result.err
        assert "Largest difference to PEFT's outputs: " in result.out and "converted from PEFT, commit " in result.out
        assert "Next: randlora-pl predict --adapter ours --images" in result.out
        del there["task.json"]
        config = json.loads(there["adapter_config.json"])
        for base, message in refusals.items():
            there["adapter_config.json"] = json.dumps(config | {"base_model_name_or_path": base}).encode()
            bad = run("adapter", "pull", "ann/theirs", "--output", "bad")
            assert bad.code == 2 and message in bad.err and len(bad.err.splitlines()) <= 2
        there["adapter_model.bin"] = there.pop("adapter_model.safetensors")
        assert "pickle" in run("adapter", "pull", "ann/theirs", "--output", "bad").err
        assert not Path("bad").exists() and not any("evil" in request or ".bin" in request for request in hub.requests)
    one, two = load_task(tmp_path / "first"), load_task(tmp_path / "ours")
    x = torch.randn(2, 3, one.image_spec.size, one.image_spec.size)
    torch.testing.assert_close(two.class_logits(x), one.class_logits(x), rtol=1e-5, atol=1e-5)


@in_one_item(
    ("name", "kind", "base"),
    [
        ("timm/vit_tiny_patch16_224.augreg", None, ("vit_tiny_patch16_224.augreg", "timm")),
        ("Qwen/Qwen2-0.5B", "CAUSAL_LM", ("Qwen/Qwen2-0.5B", None)),
        ("../model", "CAUSAL_LM", None),
        ("models/x", "CAUSAL_LM", None),  # a folder here is no base model of a stranger
        (["gpt2"], None, None),
        (None, None, None),
    ],
)
def test_base_models_that_configs_of_peft_name(
    name: Any, kind: str | None, base: tuple[str, str | None] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "x").mkdir(parents=True)
    config = {"base_model_name_or_path": name, "task_type": kind} if name else {}
    assert named_base(PeftAdapter(config, {})) == base
    assert named_base(PeftAdapter({}, {}, task={"base_model": {"name": "models/x", "pretrained": "models/x"}})) is None


@pytest.mark.usefixtures("deep")
def test_the_base_model_must_be_that_of_the_export(run: Run, refused: Refused, tmp_path: Path) -> None:
    adapter(TextHeadTask, "tiny", RandLoRA(rank=6), tmp_path / "first", targets=["fc2"])
    assert run("adapter", "export", "first", "--to", "peft", "--output", "peft").code == 0
    message = refused(*PEFT, "--model", "tiny")
    assert "trained" in message and "Use its own base model" in message


@pytest.mark.usefixtures("deep")
def test_official(run: Run, tmp_path: Path) -> None:
    weights = {f"visual.transformer.resblocks.{i}.mlp.c_fc.": (768, 192) for i in range(4)}
    state = checkpoint(weights, 6)
    torch.save(state, tmp_path / "official.pt")
    (tmp_path / "classes").write_text("zero\none\n")
    words = ("--from", "official", "--model", "tiny", "--output", "ours.safetensors", "--classnames", "classes")
    result = run("adapter", "import", "official.pt", *words)
    assert result.code == 0, result.err
    assert "Not compared: the official code is not available. Scaled by 1 / r." in result.out
    assert "a TextHeadTask of 2 classes" in result.out
    tower = ImageTower(load_clip("tiny").model)
    before: Any = tower.visual.transformer.resblocks[1].mlp.c_fc.weight.detach().clone()
    load_adapter(tower, tmp_path / "ours.safetensors")
    layer = tower.visual.transformer.resblocks[1].mlp.c_fc
    expected = before + by_hand(state, "visual.transformer.resblocks.1.mlp.c_fc.", 768, 192, 6)
    torch.testing.assert_close(layer.delta.effective_weight(before), expected, rtol=1e-4, atol=1e-5)
    assert run("adapter", "import", "official.pt", *words, "--overwrite", "--alpha", "6").code == 0
    other = ImageTower(load_clip("tiny").model)
    load_adapter(other, tmp_path / "ours.safetensors")
    delta = other.visual.transformer.resblocks[1].mlp.c_fc.delta.change(torch.empty(0))
    torch.testing.assert_close(delta, 6 * (expected - before), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("deep")
def test_bad_input(refused: Refused, tmp_path: Path) -> None:
    trained_peft(LoraConfig(r=2, target_modules=["fc1"]), tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "timm/some_vit"}))
    assert "--model" in refused(*PEFT)
    assert "nothing" in refused("adapter", "import", "nothing", "--from", "peft", "--output", "x")
    assert "--alpha" in refused(*PEFT, "--alpha", "3")
    assert "adapter_config.json" in refused(*PEFT[:2], ".", *PEFT[3:], "--model", VIT, "--pretrained", "random")
    message = refused(*PEFT, "--model", "tiny")
    assert "blocks.0.mlp.fc1" in message
    vit = ("--model", VIT, "--pretrained", "random")
    assert "--task" in refused(*PEFT, *vit, "--task", "TextHeadTask")
    assert "--task" in refused(*PEFT, *vit, "--task", "LinearHeadTask")
    assert "--classnames" in refused(*PEFT, *vit, "--classnames", "no")
    (tmp_path / "one").write_text("cat\n\n")
    assert "--classnames" in refused(*PEFT, *vit, "--classnames", "one")
    (tmp_path / "ours").mkdir()
    assert "--overwrite" in refused(*PEFT, *vit)


def test_head_and_class_names_must_agree(refused: Refused, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    trained_peft(config, tmp_path / "peft", 3, True)
    (tmp_path / "classes").write_text("cat\ndog\n")
    message = refused(*PEFT, "--model", VIT, "--pretrained", "random", "--classnames", "classes")
    assert "classes" in message
    trained_peft(LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["norm"]), tmp_path / "peft")
    message = refused(*PEFT, "--model", VIT, "--pretrained", "random")
    assert "norm." in message and "trained" in message


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
    assert "The head is in peft/head.safetensors, which PEFT does not read" in result.out
    task: Any = load_task(tmp_path / "ours")
    head = load_file(tmp_path / "peft" / "head.safetensors")["head"]
    assert torch.equal(head, task.head)
    theirs: Any = PeftModel.from_pretrained(load_clip("tiny", "random").model.eval(), tmp_path / "peft")
    x = torch.randn(2, 3, 32, 32)
    features = torch.nn.functional.normalize(theirs.get_base_model().encode_image(x), dim=-1)
    torch.testing.assert_close(features @ head.T, task.class_logits(x), rtol=1e-5, atol=1e-5)


def test_the_code_that_loads_it(tmp_path: Path) -> None:
    from randlora_pl.commands.adapter.export import _code
    from randlora_pl.models import ModelIdentity

    classes = tmp_path / "task.json"
    classes.write_text('{"classnames": ["a", "b"]}')
    vit, dino = "vit_tiny_patch16_224.augreg_in21k", "vit_small_patch14_dinov2.lvd142m"
    overlay = """pretrained_cfg_overlay={"file": "/w.pt"}"""
    for base, names, code in (
        (("timm", vit, "augreg_in21k"), classes, f'timm.create_model("{vit}", pretrained=True, num_classes=2)'),
        (("timm", dino, "/w.pt"), None, f'("{dino}", pretrained=True, num_classes=0, img_size=224, {overlay})'),
        (("open_clip", "ViT-B-32", "/w.pt"), None, 'open_clip.create_model("ViT-B-32", pretrained="/w.pt")'),
    ):
        identity = ModelIdentity(*base, 224, sha256="00" if base[2] == "/w.pt" else None)
        assert _code(identity, names).endswith(code)


def test_refused(refused: Refused, tmp_path: Path) -> None:
    adapter(TextHeadTask, "tiny", RandLoRA(rank=6), tmp_path / "ours")
    message = refused("adapter", "export", "ours", "--to", "peft", "--output", "peft")
    assert "nn.MultiheadAttention" in message
    adapter(TextHeadTask, "tiny", NoLA(rank=2, num_bases=4), tmp_path / "nola", targets=["mlp"])
    message = refused("adapter", "export", "nola", "--to", "peft", "--output", "peft")
    assert "(NoLA)" in message
    (tmp_path / "peft").mkdir()
    assert "--output" in refused("adapter", "export", "ours", "--to", "peft", "--output", "peft")
