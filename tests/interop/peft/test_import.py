"""PEFT folders that cannot be carried over exactly, or are damaged: one clear line each, the model untouched."""

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, RandLoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from randlora_pl.adapters import LoRA, inject, load_adapter, merge_and_unload, save_adapter
from randlora_pl.interop.peft.import_ import import_peft
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import SelfAttention, assert_close
from tests.adapters.zoo import captions, images, small_clip, small_vit
from tests.support.products import in_one_item


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def peft_folder(config: Any, path: Path, base: nn.Module | None = None) -> Any:
    theirs = get_peft_model(copy.deepcopy(small_vit() if base is None else base), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(path)
    return theirs


def refused(path: Path, message: str, model: nn.Module | None = None) -> None:
    model = small_vit() if model is None else model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        import_peft(path, model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    change(config)
    (path / "adapter_config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


@in_one_item(
    ("config", "message"),
    [
        (IA3Config(target_modules=["qkv"], feedforward_modules=[]), "is a IA3 adapter; AdaLoRA, DoRA, HiRA, LoRA"),
        (LoraConfig(target_modules=["qkv"], lora_bias=True), "its config has lora_bias: True, which"),
        (LoraConfig(target_modules=["qkv"], bias="all"), "its config has bias: 'all'"),
        (LoraConfig(target_modules=["qkv"], init_lora_weights="pissa_niter_2"), "'pissa_niter_2' changes the base"),
        (LoraConfig(target_modules=["proj"], use_dora=True), "its target patch_embed.proj is a Conv2d"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    peft_folder(config, tmp_path)
    refused(tmp_path, message)


CHANGED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c.update(use_qalora=True), "use_qalora: True"),
    (lambda c: c.update(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    (lambda c: c.update(something_of_2030=0.5), "something_of_2030: 0.5, which changes the outputs"),
    (lambda c: c.pop("peft_type"), "has no peft_type"),
    (lambda c: c.update(r=None), "r is None in its config"),
    (lambda c: c.update(r=4), "lora_A of blocks.0.attn.qkv has 8 rows, r is 4"),
    (lambda c: c.update(lora_alpha="x"), "lora_alpha is 'x' in its config"),
    (lambda c: c.update(target_modules="("), r"target_modules is '\(' in its config"),
    (lambda c: c.update(target_modules=["qkv", "fc1"]), "2 layers that its config names have no tensors"),
    (lambda c: c.update(use_dora=True), "lora_magnitude_vector of blocks.0.attn.qkv is missing"),
]


@in_one_item(("change", "message"), CHANGED)
def test_a_changed_config(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    peft_folder(LoraConfig(r=8, target_modules=["qkv"]), tmp_path)
    edit(tmp_path, change)
    refused(tmp_path, message)


EXPONENTIAL = r"(((\w|\.)+)+)+!"


@in_one_item(
    "change", [{"target_modules": EXPONENTIAL}, {"rank_pattern": {EXPONENTIAL: 8}}, {"layers_pattern": [EXPONENTIAL]}]
)
def test_a_pattern_of_a_stranger_takes_no_forever(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("randlora_pl.interop.peft.import_.PATIENCE", 0.2)
    peft_folder(LoraConfig(r=8, target_modules=["qkv"]), tmp_path)
    edit(tmp_path, lambda config: config.update(change))
    refused(tmp_path, "regular expressions in its config take too long")


@in_one_item(
    "task",
    [
        {"arguments": [1]},
        {"arguments": {"seed": "x"}},
        {"arguments": {"img_size": "x"}},
        {"base_model": [1]},
        {"classnames": 5},
        {"task": ["x"]},
    ],
)
def test_nonsense_beside_an_adapter(task: dict[str, Any], tmp_path: Path) -> None:
    peft_folder(LoraConfig(target_modules=["qkv"]), tmp_path)
    (tmp_path / "task.json").write_text(json.dumps(task))
    refused(tmp_path, f"task.json: {next(iter(task))}.* is ")


BLOCK = "base_model.model.blocks.0.attn.qkv."
DAMAGED: list[tuple[Any, Callable[[dict[str, Tensor]], Any], str]] = [
    (LoraConfig(target_modules=["qkv"]), lambda t: t.pop(f"{BLOCK}lora_A.weight"), "lora_A of blocks.0.attn.qkv is"),
    (LoraConfig(target_modules=["qkv"]), lambda t: t.clear(), "has no tensors of LORA"),
    (
        LoraConfig(target_modules=["qkv"]),
        lambda t: t.update({f"{BLOCK}lora_B.weight": torch.zeros(71, 8)}),
        r"B of blocks.0.attn.qkv has shape \(71, 8\), this model needs \(72, 8\)",
    ),
    (
        LoraConfig(target_modules=["qkv"]),
        lambda t: t.update({"base_model.model.blocks.0.attn.qk.lora_A.weight": torch.zeros(8, 24)}),
        "its target blocks.0.attn.qk does not exist in this model",
    ),
    (
        LoraConfig(target_modules=["qkv"]),
        lambda t: t.update({f"{BLOCK}lora_embedding_A": torch.zeros(8, 24)}),
        "the tensor blocks.0.attn.qkv.lora_embedding_A does not belong to an update",
    ),
    (
        RandLoraConfig(r=5, target_modules=["qkv"]),
        lambda t: [t.pop(name) for name in list(t) if name.endswith("randlora_A")],
        "randlora_A is missing",
    ),
    (
        RandLoraConfig(r=5, target_modules=["qkv"]),
        lambda t: [t.pop(name) for name in list(t) if name.endswith(("randlora_A", "randlora_B"))],
        "its bases are missing, although save_projection",
    ),
    (
        RandLoraConfig(r=5, target_modules=["qkv"]),
        lambda t: t[f"{BLOCK}randlora_A"].mul_(2),
        "its copies of randlora_A differ",
    ),
    (
        RandLoraConfig(r=5, target_modules=["qkv"]),
        lambda t: t.update({f"{BLOCK}randlora_gamma": torch.zeros(6, 24)}),
        "blocks.0.attn.qkv has 6 bases; its size and r require 5",
    ),
    (VeraConfig(r=5, target_modules=["qkv"]), lambda t: t.pop("base_model.vera_B"), "vera_B is missing"),
    (
        VeraConfig(r=5, target_modules=["qkv"]),
        lambda t: t.update({"base_model.vera_B": torch.zeros(9, 5)}),
        "are too small",
    ),
]  # fmt: skip


@in_one_item(("config", "change", "message"), DAMAGED)
def test_damaged_tensors(config: Any, change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    peft_folder(config, tmp_path)
    edit_tensors(tmp_path, change)
    refused(tmp_path, message)


def test_files_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path, "is not a PEFT adapter: it has no adapter_config.json")
    peft_folder(LoraConfig(target_modules=["qkv"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    refused(tmp_path, "adapter_model.safetensors cannot be read")
    file.unlink()
    refused(tmp_path, "it has no adapter_model.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    refused(tmp_path, r"as a pickle \(adapter_model.bin\), which can run code")
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.bin").unlink()
    file.write_bytes(content)
    refused(tmp_path, "adapter_config.json cannot be read")
    save_adapter(import_peft(_plain(tmp_path / "plain"), small_vit()), tmp_path / "ours")
    refused(tmp_path / "ours", "It is an adapter of this program")


def test_models_and_folders_of_peft_are_refused_with_what_to_call(tmp_path: Path) -> None:
    theirs = peft_folder(LoraConfig(target_modules=["qkv"]), tmp_path / "theirs")
    with pytest.raises(UserError, match="adapters of PEFT"):
        inject(theirs, LoRA(rank=2))
    with pytest.raises(UserError, match="import_peft"):
        load_adapter(small_vit(), tmp_path / "theirs")
    assert inject(theirs.unload(), LoRA(rank=2)).trainable > 0


def _plain(path: Path) -> Path:
    peft_folder(LoraConfig(target_modules=["qkv"]), path)
    return path


def test_conv1d(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=12, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    gpt = GPT2Model(config).eval()
    targets = ["c_attn", "c_fc"]
    theirs = peft_folder(LoraConfig(target_modules=targets, fan_in_fan_out=True), tmp_path, gpt).get_base_model()
    ours: Any = import_peft(tmp_path, copy.deepcopy(gpt)).eval()
    words = torch.randint(20, (2, 5))
    with torch.no_grad():
        found, expected, plain = (model(words).last_hidden_state for model in (ours, theirs, gpt))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_convolutions_come_over_where_peft_s_are_plain(tmp_path: Path) -> None:
    plain = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3, stride=2, padding=1), flat=nn.Flatten()))
    theirs = peft_folder(LoraConfig(r=4, target_modules=["conv"]), tmp_path / "plain", plain).get_base_model()
    ours, x = import_peft(tmp_path / "plain", copy.deepcopy(plain)), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.allclose(plain(x), theirs(x), atol=1e-3)
    dilated = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3, dilation=2), flat=nn.Flatten()))
    peft_folder(LoraConfig(target_modules=["conv"]), tmp_path / "dilated", dilated)
    refused(tmp_path / "dilated", "its target conv is a Conv2d", dilated)


def test_attention_by_its_module_acts_twice(tmp_path: Path) -> None:
    base = SelfAttention(12)
    peft_folder(LoraConfig(target_modules=["attn"]), tmp_path, base)
    refused(tmp_path, r"(does not belong to an update|the output projection's part acts twice)", base)


def test_attention_by_its_parameter(tmp_path: Path) -> None:
    base = small_clip()
    config = LoraConfig(
        r=3, target_modules=["c_fc"], target_parameters=["attn.in_proj_weight"], rank_pattern={"c_fc": 2}
    )
    theirs = peft_folder(config, tmp_path, base).get_base_model()
    ours: Any = import_peft(tmp_path, copy.deepcopy(base))
    x, text = images(), captions()
    assert_close(ours.encode_image(x), theirs.encode_image(x), 1e-5)
    assert_close(ours.encode_text(text), theirs.encode_text(text), 1e-5)


@in_one_item(
    "more",
    [
        {"layers_to_transform": [1], "layers_pattern": ["blocks"], "target_modules": ["qkv", "fc1"]},
        {"layers_to_transform": 0, "layers_pattern": "blocks", "target_modules": ["fc1"]},
        {"target_modules": r".*\.(qkv|fc2)", "exclude_modules": ["blocks.0.attn.qkv"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["fc1"], "fan_in_fan_out": True},  # PEFT resets it for linear layers
        {"target_modules": ["blocks.1.mlp.fc1", "blocks.0.attn.proj"]},
    ],
)
def test_ways_to_name_targets(more: dict[str, Any], tmp_path: Path) -> None:
    base = small_vit()
    theirs = peft_folder(LoraConfig(r=2, **more), tmp_path, base)
    x = images()
    assert_close(import_peft(tmp_path, copy.deepcopy(base))(x), theirs(x), 1e-5)


def test_a_head_that_was_trained_as_a_whole(tmp_path: Path) -> None:
    base = small_vit()
    base.reset_classifier(3)  # type: ignore[operator]
    theirs = peft_folder(LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["head"]), tmp_path, base)
    x = images()
    ours: Any = import_peft(tmp_path, copy.deepcopy(base))
    assert_close(ours(x), theirs(x), 1e-5)
    save_adapter(ours, tmp_path / "ours")
    base.reset_classifier(3)  # type: ignore[operator]
    assert not torch.equal(base(x), ours(x))
    load_adapter(base, tmp_path / "ours")
    assert torch.equal(base(x), ours(x))
    merge_and_unload(base)
    bare: Any = import_peft(tmp_path, small_vit_like(base))  # without classifier it gives the features
    assert bare(x).shape == (2, 24)
    base.reset_classifier(4)  # type: ignore[operator]
    refused(tmp_path, r"head.\w+ has shape \(3.*\), in this model \(4", base)


def small_vit_like(base: nn.Module) -> nn.Module:
    model = copy.deepcopy(base)
    model.reset_classifier(0)  # type: ignore[operator]
    return model


def test_bases_drawn_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.randlora.model.is_bf16_available", lambda: False)
    base = small_vit()
    theirs = peft_folder(RandLoraConfig(r=5, target_modules=["qkv", "fc1"], save_projection=False), tmp_path, base)
    x = images()
    ours = import_peft(tmp_path, copy.deepcopy(base), bases_dtype=torch.float16)
    assert_close(ours(x), theirs(x), 1e-5)
    wrong = import_peft(tmp_path, copy.deepcopy(base))
    assert (wrong(x) - theirs(x)).abs().max() > 0.1
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(again.get_base_model()(x), ours(x), 1e-5)
