"""PEFT folders come over with the same outputs, or with one clear line and the model untouched."""

import copy
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    HiraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    RandLoraConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)  # fmt: skip
from peft.tuners.oft.layer import Linear as OFTLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

from randlora_pl.adapters import AdaLoRA, LoRA, PiSSA, derived, inject, load_adapter, merge_and_unload, save_adapter
from randlora_pl.adapters.base import PeftContent
from randlora_pl.adapters.methods.multiplied import _common_size, _nearest_divisor
from randlora_pl.interop.peft_export import export_peft
from randlora_pl.interop.peft_import import PeftAdapter, check_config, import_peft
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import SelfAttention, assert_close, randomise
from tests.adapters.zoo import captions, images, small_clip, small_vit
from tests.support.products import in_one_item, in_two_items, marked

Copied = Callable[[Path, Any], None]


def peft_folder(config: Any, path: Path, base: nn.Module | None = None) -> Any:
    theirs = get_peft_model(copy.deepcopy(small_vit() if base is None else base), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(path)
    return theirs


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Copied:
    """Copies what `peft_folder` writes once for each config."""
    places: dict[int, Path] = {}

    def copy_to(path: Path, config: Any) -> None:
        if id(config) not in places:
            peft_folder(config, places.setdefault(id(config), tmp_path_factory.mktemp("peft")))
        shutil.copytree(places[id(config)], path, dirs_exist_ok=True)

    return copy_to


def refused(path: Path, message: str, model: nn.Module | None = None) -> None:
    model = small_vit() if model is None else model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        import_peft(path, model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def edit(path: Path, change: dict[str, Any]) -> None:
    """Values of a config are others, or gone where they are an ellipsis."""
    config = json.loads((path / "adapter_config.json").read_text()) | change
    left = {name: value for name, value in config.items() if value is not ...}
    (path / "adapter_config.json").write_text(json.dumps(left))


def with_mask(config: ShiraConfig) -> ShiraConfig:
    config.mask_fn = every_other
    return config


def every_other(layer: Any, r: int, **options: Any) -> Tensor:
    """A mask of one's own."""
    mask = torch.zeros_like(layer.weight).flatten()
    mask[: 2 * r * sum(layer.weight.shape) : 2] = 1
    return mask.view_as(layer.weight)


TARGETS = ["qkv", "fc1"]
IMPORTED: dict[str, Callable[[], Any]] = {
    "hira": lambda: HiraConfig(r=3, target_modules=TARGETS, rank_pattern={"fc1": 5}, hira_dropout=0.1),
    "oft": lambda: OFTConfig(oft_block_size=7, target_modules=["qkv", "fc2"], module_dropout=0.1),
    "oft, exact": lambda: OFTConfig(r=3, oft_block_size=0, target_modules=["qkv"], use_cayley_neumann=False),
    "oft, 3 terms": lambda: OFTConfig(oft_block_size=8, target_modules=["qkv"], num_cayley_neumann_terms=3),
    "shira": lambda: ShiraConfig(r=3, target_modules=TARGETS, random_seed=5),
    "shira, own mask": lambda: with_mask(ShiraConfig(r=2, mask_type="own", target_modules=["qkv"])),
    "pissa, rs": lambda: started("pissa", use_rslora=True, lora_dropout=0.1),
    "pissa, ranks": lambda: started("pissa", rank_pattern={"fc1": 5}, alpha_pattern={"qkv": 2}, use_rslora=True),
    "olora, alpha": lambda: started("olora", lora_alpha=3),
    "mica": lambda: started("mica", lora_alpha=3),
}


def started(how: Any, **options: Any) -> LoraConfig:
    """A LoRA whose start follows from the base model."""
    return LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": how} | options))


@in_two_items("name", marked(zip(IMPORTED), lambda row: row[0] not in ("pissa, rs", "oft, 3 terms")))
def test_what_peft_saved_comes_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, config = small_vit(), IMPORTED[name]()
    theirs = peft_folder(config, tmp_path / "peft", base)
    calls: list[Any] = []
    whole = derived.factors
    monkeypatch.setattr(derived, "factors", lambda *given: calls.append(given) or whole(*given))
    ours: Any = import_peft(tmp_path / "peft", copy.deepcopy(base)).eval()
    report, starts = ours.adapter_report, name.startswith(("pissa", "olora"))
    assert len(calls) == starts * len(report.rows) and isinstance(report.adapter, PiSSA) == starts
    save_adapter(ours, tmp_path / "ours")
    load_adapter(back := copy.deepcopy(base), tmp_path / "ours")
    x = images()
    assert torch.equal(back(x), ours(x))
    export_peft(tmp_path / "ours", tmp_path / "again", model=base)
    outputs = [ours.double()(x.double())]
    for folder in ("peft", "again"):  # the first repeats the decomposition
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        outputs.append(loaded.double().get_base_model()(x.double()))
    for found in outputs:
        assert_close(found, theirs.double()(x.double()), 2e-5 if isinstance(config, LoraConfig) else 2e-6)


EXPONENTIAL = r"(((\w|\.)+)+)+!"


@in_one_item(
    "change", [{"target_modules": EXPONENTIAL}, {"rank_pattern": {EXPONENTIAL: 8}}, {"layers_pattern": [EXPONENTIAL]}]
)
def test_a_pattern_of_a_stranger_takes_no_forever(
    change: dict[str, Any], copied: Copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("randlora_pl.interop.peft_import.PATIENCE", 0.2)
    copied(tmp_path, LORA)
    edit(tmp_path, change)
    refused(tmp_path, "regular expressions in its config take too long")


LORA, ROTATION = LoraConfig(r=8, target_modules=["qkv"]), OFTConfig(oft_block_size=8, target_modules=["qkv"])
CHANGED: list[tuple[Any, dict[str, Any], str]] = [
    (IA3Config(target_modules=["qkv"], feedforward_modules=[]), {}, "is a IA3 adapter; AdaLoRA, DoRA, HiRA, LoRA"),
    (LoraConfig(target_modules=["qkv"], lora_bias=True), {}, "its config has lora_bias: True, which"),
    (LoraConfig(target_modules=["qkv"], bias="all"), {}, "its config has bias: 'all'"),
    (LoraConfig(target_modules=["proj"], use_dora=True), {}, "its target patch_embed.proj is a Conv2d"),
    (
        started("pissa"),
        {"init_lora_weights": "pissa_niter_4"},
        "pissa_niter_4' changes the base weights. Write it as a plain LoRA",
    ),
    (started("pissa"), {"use_dora": True}, "'pissa' changes the base weights"),
    (LORA, {"use_qalora": True}, "use_qalora: True"),
    (LORA, {"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    (LORA, {"something_of_2030": 0.5}, "something_of_2030: 0.5, which changes the outputs"),
    (LORA, {"peft_type": ...}, "has no peft_type"),
    (LORA, {"r": None}, "r is None in its config"),
    (LORA, {"r": 4}, "lora_A of blocks.0.attn.qkv has 8 rows, r is 4"),
    (LORA, {"lora_alpha": "x"}, "lora_alpha is 'x' in its config"),
    (LORA, {"target_modules": "("}, r"target_modules is '\(' in its config"),
    (LORA, {"target_modules": ["qkv", "fc1"]}, "2 layers in its config have no tensors"),
    (LORA, {"use_dora": True}, "lora_magnitude_vector of blocks.0.attn.qkv is missing"),
    (HiraConfig(r=3, target_modules=["qkv"]), {"hira_dropout": "x"}, "hira_dropout is 'x' in its config"),
    (ROTATION, {"peft_version": "0.17.1"}, r"series of its rotations \(5 terms, peft_version 0.17.1\)"),
    (ROTATION, {"peft_version": ...}, "peft_version None"),
    (ROTATION, {"num_cayley_neumann_terms": 2}, r"\(2 terms"),
    (ROTATION, {"coft": True}, "its config has coft: True, which changes the outputs"),
    (ROTATION, {"block_share": True}, "its config has block_share: True"),
    (ROTATION, {"r": -1}, "r is -1 in its config"),
]


@in_one_item(("config", "change", "message"), CHANGED)
def test_configs_that_mean_something_else(
    config: Any, change: dict[str, Any], message: str, copied: Copied, tmp_path: Path
) -> None:
    copied(tmp_path, config)
    edit(tmp_path, change)
    refused(tmp_path, message)


@in_one_item(
    "change",
    [
        *({"rank_pattern": each} for each in (-1, {"a": 0}, {"a": True}, {"(": 2}, {"a": 10**400})),
        *({"alpha_pattern": each} for each in ("x", {"[": 1.0})),
        *({"modules_to_save": each} for each in ("[", [1])),
        *({"r": each} for each in (True, "4")),
        {"target_modules": 3},
        {"target_parameters": {}},
    ],
)
def test_nonsense_in_a_config(change: dict[str, Any]) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "rank_pattern": {}}
    assert check_config(PeftAdapter(config, {}, path=Path("peft"))) is LoRA
    with pytest.raises(UserError, match=f"peft: .*{next(iter(change))}|regular expression"):
        check_config(PeftAdapter(json.loads(json.dumps(config | change)), {}, path=Path("peft")))


@in_one_item("value", [10**400, "x", "nan", [1]])
def test_numbers_that_are_none(value: Any) -> None:
    with pytest.raises(UserError, match="lora_alpha"):
        PeftContent("peft", {"lora_alpha": value}, {}, {}, {}).number("lora_alpha", 8.0)


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
def test_nonsense_beside_an_adapter(task: dict[str, Any], copied: Copied, tmp_path: Path) -> None:
    copied(tmp_path, LORA)
    (tmp_path / "task.json").write_text(json.dumps(task))
    refused(tmp_path, f"task.json: {next(iter(task))}.* is ")


BLOCK = "base_model.model.blocks.0.attn.qkv."
RANDLORA, VERA = (kind(r=5, target_modules=["qkv"]) for kind in (RandLoraConfig, VeraConfig))
SHIRA = ShiraConfig(r=3, target_modules=["qkv"])
DAMAGED: list[tuple[Any, str, Any, str]] = [  # a tensor, or all whose names end so, and what replaces it
    (LORA, f"{BLOCK}lora_A.weight", None, "lora_A of blocks.0.attn.qkv is"),
    (LORA, "", None, "has no tensors of LORA"),
    (
        LORA,
        f"{BLOCK}lora_B.weight",
        torch.zeros(71, 8),
        r"B of blocks.0.attn.qkv has shape \(71, 8\), this model needs \(72, 8\)",
    ),
    (
        LORA,
        "base_model.model.blocks.0.attn.qk.lora_A.weight",
        torch.zeros(8, 24),
        "its target blocks.0.attn.qk does not exist in this model",
    ),
    (
        LORA,
        f"{BLOCK}lora_embedding_A",
        torch.zeros(8, 24),
        "the tensor blocks.0.attn.qkv.lora_embedding_A does not belong to an update",
    ),
    (RANDLORA, "randlora_A", None, "randlora_A is missing"),
    (RANDLORA, ("randlora_A", "randlora_B"), None, "its bases are missing, although save_projection"),
    (RANDLORA, f"{BLOCK}randlora_A", lambda a: 2 * a, "its copies of randlora_A differ"),
    (
        RANDLORA,
        f"{BLOCK}randlora_gamma",
        torch.zeros(6, 24),
        "blocks.0.attn.qkv has 6 bases; its size and r require 5",
    ),
    (VERA, "base_model.vera_B", None, "vera_B is missing"),
    (VERA, "base_model.vera_B", torch.zeros(9, 5), "are too small"),
    (SHIRA, f"{BLOCK}shira_indices", None, "shira_indices of blocks.0.attn.qkv is missing"),
    (SHIRA, f"{BLOCK}shira_indices", lambda i: i[:, [0, *range(len(i[0]) - 1)]], "are not distinct places in 72 x 24"),
    (SHIRA, f"{BLOCK}shira_indices", lambda i: i + torch.tensor([[0], [24]]), "are not distinct places in 72 x 24"),
    (SHIRA, f"{BLOCK}shira_indices", lambda i: i[:, 1:], "one for each value"),
    (SHIRA, f"{BLOCK}shira_indices", lambda i: i[0], "shira_indices of blocks.0.attn.qkv are not distinct"),
    (
        ROTATION,
        f"{BLOCK}oft_R.weight",
        torch.zeros(3, 27),
        r"oft_R of blocks.0.attn.qkv has shape \(3, 27\), which does not fit its 24 inputs",
    ),
]


@in_one_item(("config", "name", "value", "message"), DAMAGED)
def test_damaged_tensors(config: Any, name: Any, value: Any, message: str, copied: Copied, tmp_path: Path) -> None:
    copied(tmp_path, config)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    if value is None:
        tensors = {each: tensor for each, tensor in tensors.items() if not each.endswith(name)}
    else:
        tensors[name] = value(tensors[name]).to(tensors[name].dtype).contiguous() if callable(value) else value
    save_file(tensors, file)
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
    peft_folder(LORA, tmp_path / "plain")
    save_adapter(import_peft(tmp_path / "plain", small_vit()), tmp_path / "ours")
    refused(tmp_path / "ours", "It is an adapter of this program")


def test_models_and_folders_of_peft_are_refused_with_what_to_call(tmp_path: Path) -> None:
    theirs = peft_folder(LoraConfig(target_modules=["qkv"]), tmp_path / "theirs")
    with pytest.raises(UserError, match="adapters of PEFT"):
        inject(theirs, LoRA(rank=2))
    with pytest.raises(UserError, match="import_peft"):
        load_adapter(small_vit(), tmp_path / "theirs")
    assert inject(theirs.unload(), LoRA(rank=2)).trainable > 0


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
    x = torch.randn(2, 3, 8, 8)
    for config in (LoraConfig(r=4, target_modules=["conv"]), HiraConfig(r=2, target_modules=["conv"])):
        theirs = peft_folder(config, tmp_path / "plain", plain).get_base_model()
        assert_close(import_peft(tmp_path / "plain", copy.deepcopy(plain))(x), theirs(x), 1e-5)
        assert not torch.allclose(plain(x), theirs(x), atol=1e-3)
    dilated = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3, dilation=2), flat=nn.Flatten()))
    turned = OFTConfig(oft_block_size=3, target_modules=["conv"])  # PEFT turns patches and adds them up
    for config, base in ((LoraConfig(target_modules=["conv"]), dilated), (turned, plain)):
        peft_folder(config, tmp_path / "other", base)
        refused(tmp_path / "other", "its target conv is a Conv2d", base)


def test_transposed_weights(tmp_path: Path) -> None:
    """PEFT transposes them for PiSSA and not for OLoRA, which gives wrong factors of a square weight."""
    base, x = nn.Sequential(OrderedDict(fc=Conv1D(12, 12))), torch.randn(3, 12)
    theirs, _ = (
        peft_folder(started(how, target_modules=["fc"], fan_in_fan_out=True), tmp_path / how, base)
        for how in ("pissa", "olora")
    )
    assert_close(import_peft(tmp_path / "pissa", copy.deepcopy(base))(x), theirs(x))
    with pytest.raises(UserError, match="PEFT's olora of fc does not start at this weight"):
        import_peft(tmp_path / "olora", copy.deepcopy(base))


def test_the_flag_of_the_series_turns_the_rotation_round(tmp_path: Path) -> None:
    """Of one and the same file: hence the sign of Q in ours."""
    base = nn.Sequential(OrderedDict(fc=nn.Linear(8, 6)))
    x = torch.randn(4, 8)
    outputs = []
    for series in (True, False):
        config = OFTConfig(oft_block_size=4, target_modules=["fc"], use_cayley_neumann=series)
        theirs = peft_folder(config, tmp_path / str(series), base)
        with torch.no_grad():
            theirs.base_model.model.fc.oft_R["default"].weight.copy_(0.001 * torch.arange(12.0).view(2, 6))
        theirs.save_pretrained(tmp_path / str(series))
        ours: Any = import_peft(tmp_path / str(series), copy.deepcopy(base))
        assert_close(ours(x), theirs(x), 1e-6)
        outputs.append((ours(x) - base(x), ours.fc.delta.Q.sum()))
    assert outputs[0][1] == -outputs[1][1]
    assert_close(outputs[0][0], -outputs[1][0], 0.05)  # to first order


def test_sizes_of_blocks_are_found_as_peft_finds_them() -> None:
    assert _common_size({(36, 36)}) == (0, 36)
    assert _common_size({(36, 18), (64, 32)}) == (0, 25)
    assert _common_size({(36, 12), (24, 8)}) == (3, 0)
    assert _common_size({(36, 18), (64, 16)}) == (0, 16)
    layer: Any = OFTLinear(nn.Linear(8, 8), "default", OFTConfig(oft_block_size=4), r=0)
    for side in (7, 24, 36, 60):
        layer.in_features = side
        divisors = [size for size in range(1, side + 1) if side % size == 0]
        for size in range(2, 70):
            theirs = size if side % size == 0 else layer.adjust_oft_parameters(side, size)
            assert _nearest_divisor(divisors, size) == theirs


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
    (bare := copy.deepcopy(base)).reset_classifier(0)  # type: ignore[operator]
    bare = import_peft(tmp_path, bare)  # without classifier it gives the features
    assert bare(x).shape == (2, 24)
    base.reset_classifier(4)  # type: ignore[operator]
    refused(tmp_path, r"head.\w+ has shape \(3.*\), in this model \(4", base)


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


def pruned(base: nn.Module, adapter: AdaLoRA, path: Path) -> nn.Module:
    """An adapter whose ranks are pruned at random: the first layer has none, the last block has all."""
    model = copy.deepcopy(base)
    report: Any = inject(model, adapter)
    randomise(model, 0.3)
    updates = report.procedure.updates
    for number, update in enumerate(updates):
        update.mask.copy_(torch.rand(len(update.E)) < 0.5)
        update.mask[:1] = True
        if number in (0, len(updates) - 1):
            update.mask.fill_(number > 0)
        with torch.no_grad():
            update.E.mul_(update.mask)
    report.procedure.ran = True
    save_adapter(model.eval(), path)
    return model


PRUNED = AdaLoraConfig(init_r=6, target_r=2, total_step=6, target_modules=["qkv", "fc1"])
FORMS: dict[str, AdaLoRA] = {
    "lora": AdaLoRA(rank=6, alpha=30, dropout=0.1),
    "lora, q k v apart": AdaLoRA(rank=6, alpha=30, qkv="split"),
    "lora, ranks by layer": AdaLoRA(rank={".*mlp.*": 3, ".*": 6}, alpha={".*fc1": 10.0, ".*": 24.0}),
}


@in_one_item("name", FORMS)
def test_adalora_goes_to_peft_as_lora(name: str, tmp_path: Path) -> None:
    base = small_vit()
    ours = pruned(base, FORMS[name], tmp_path / "ours")
    found = export_peft(tmp_path / "ours", tmp_path / "peft", model=base).difference
    assert found is not None and found.change > 1e-2
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    x = images().double()
    expected = ours.double()(x)
    assert_close(theirs.double().get_base_model()(x), expected, 2e-6)
    again: Any = import_peft(tmp_path / "peft", copy.deepcopy(base)).eval()
    assert isinstance(again.adapter_report.adapter, LoRA)
    assert_close(again.double()(x), expected, 2e-6)
    whole = {update.layer for update in ours.adapter_report.procedure.updates}  # type: ignore[union-attr]
    paths = {row.layer for row in again.adapter_report.rows}
    assert name == "lora, q k v apart" or len(paths) == len(whole) - 1, "a layer without ranks is left out"


@in_one_item(("steps", "start"), [(0, "pissa"), (6, True)])
def test_an_adalora_of_peft_comes_back(steps: int, start: Any, tmp_path: Path) -> None:
    """Before the first step, and after a training that has pruned."""
    base = small_vit()
    options = {"target_modules": ["qkv", "fc1"], "init_lora_weights": start}  # the latter has no effect in AdaLoRA
    config = AdaLoraConfig(init_r=5, target_r=2, lora_alpha=40, total_step=6, tfinal=2, lora_dropout=0.1, **options)
    theirs: Any = get_peft_model(copy.deepcopy(base), config).eval()
    optimizer = torch.optim.AdamW([p for n, p in theirs.named_parameters() if "lora_" in n], lr=0.05)
    x = images()
    for step in range(steps):
        optimizer.zero_grad()
        (theirs(x) - x.mean()).square().mean().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    theirs.save_pretrained(tmp_path / "peft")
    ours: Any = import_peft(tmp_path / "peft", copy.deepcopy(base)).eval()
    assert_close(ours.double()(x.double()), theirs.double()(x.double()), 2e-6)
    assert ours.adapter_report.adapter.target_rank == 2
    save_adapter(ours.float(), tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "again", model=base)
    back: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    assert_close(back.double()(x.double()), theirs(x.double()), 2e-6)


@in_one_item(
    ("change", "message"),
    [
        ({"init_r": 7}, "lora_E of blocks.0.attn.qkv has shape .* and its config keeps . of 7 ranks"),
        ({"init_r": "5"}, "init_r is '5'"),
        ({"rank_pattern": {"blocks.0.attn.qkv.lora_E": [1, 2]}}, "rank_pattern"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\] in its config"),
        ({"rank_pattern": {"blocks.0.attn.qkv.lora_E": [True] * 5 + [False]}}, "its config keeps 5 of 6 ranks"),
        ({"use_rslora": True}, "use_rslora"),
    ],
)
def test_damaged_files_of_adalora_are_refused(
    change: dict[str, Any], message: str, copied: Copied, tmp_path: Path
) -> None:
    copied(tmp_path, PRUNED)
    edit(tmp_path, change)
    refused(tmp_path, message)
