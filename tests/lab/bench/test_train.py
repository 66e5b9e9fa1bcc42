import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from randlora_pl.lab.bench import METHODS, UnavailableError, adapted, chosen, counter, label, layers_of
from randlora_pl.lab.bench.steps import Setup, Training, library_of
from randlora_pl.models import ImageTower, load_clip, load_vit
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item, marked

NAMES = list(METHODS)


@pytest.fixture(scope="module")
def training() -> Training:
    return Training(Setup("test_vit", "timm", 2))


@pytest.mark.parametrize(("names",), marked([(NAMES[n::3],) for n in range(3)], lambda row: "full" in row[0]))
def test_every_method_trains_the_same_model_on_the_same_images(training: Training, names: list[str]) -> None:
    cases, missing = training.cases(names)
    assert {case.name for case in cases} | {one.name for one in missing} == set(names)
    assert len(cases) + len(missing) == len(names) and all(one.problem for one in missing)
    before = [parameter.clone() for parameter in training.base.parameters()]
    losses = [case.loss(case.model).item() for case in cases]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)  # every update starts at zero
    for case in cases:
        case.count()
        assert case.flops > 0 and case.saved > 0 and not case.problem
        assert case.loss(case.model).item() != losses[0]
    assert all(map(torch.equal, before, training.base.parameters()))


def test_full_fine_tuning_costs_three_forward_passes(training: Training) -> None:
    full = training.case("full")
    full.count()
    with counter() as operations, torch.no_grad():
        training.base(training.batch[0])
    forward = operations.get_total_flops()
    assert 2.8 * forward < full.flops < 3.1 * forward  # images need no gradient; attention has 2.5 times as much


def test_the_image_tower_of_a_clip_trains() -> None:
    training = Training(Setup("tiny", "open_clip", 2, "bf16"))
    case = training.case("randlora")
    case.count()
    assert training.words == "2 images of 32 pixels" and all(name.startswith("visual.") for name in training.layers)
    assert training.gemm().dtype == torch.bfloat16
    assert library_of("vit_base_patch32_224") == library_of("vit_small_patch16_224.dino") == "timm"
    assert library_of("ViT-B-32") == library_of("tiny") == "open_clip"
    assert case.trained == training.case("randlora-ternary").trained


def test_a_case_that_finds_no_memory_is_missing(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setitem(METHODS, "full", replace(METHODS["full"], adapt=full))
    cases, missing = training.cases(["full"])
    assert not cases and missing[0].problem == "out of memory"
    monkeypatch.setitem(METHODS, "full", replace(METHODS["full"], adapt=lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        training.cases(["full"])


SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 100}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_decoder_trains_with_its_own_ranks() -> None:
    setup = Setup("Qwen/Qwen2-0.5B-Instruct", "transformers", 2, tokens=12, overrides=SMALL, dropout=0.1)
    training = Training(setup)
    assert training.words == "2 samples of 12 tokens"
    assert [name.rpartition(".")[2] for name in training.layers] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "up_proj",
        "down_proj",
    ]
    names = ["full", "randlora", "peft-randlora", "lora", "peft-lora", "dora", "peft-dora"]
    cases, missing = training.cases(names)
    assert [case.label for case in cases][:3] == ["full fine-tuning", "RandLoRA-10", "PEFT RandLoRA-10"] and not missing
    trained = {case.name: case.trained for case in cases}
    assert all(trained[name] == trained[f"peft-{name}"] for name in ("randlora", "lora", "dora"))
    losses = [case.loss(case.model).item() for case in cases]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)
    for case in cases:
        case.count()
        assert not case.problem and case.loss(case.model).item() != losses[0]


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return load_vit("test_vit", "random").model


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_the_layers_are_the_linear_ones_of_the_blocks(vit: nn.Module) -> None:
    names = layers_of(vit)
    assert names[:3] == [f"blocks.0.{name}" for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    assert len(names) == 3 * len(vit.blocks)  # type: ignore[arg-type]
    assert len(layers_of(vit, ["all"])) == 4 * len(vit.blocks)  # type: ignore[arg-type]


PAIRS = [(name, method.peer) for name, method in METHODS.items() if method.peer]


@pytest.mark.parametrize(("targets",), marked([(None,), (["all"],), (["mlp"],)], lambda row: row == (None,)))
@in_one_item(("ours", "theirs"), PAIRS)
def test_peft_adapts_the_same_layers_with_as_many_parameters(
    vit: nn.Module, ours: str, theirs: str, targets: list[str] | None
) -> None:
    pytest.importorskip("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    mine, other = adapted(vit, ours, targets=targets), adapted(vit, theirs, targets=targets)
    wrapped = [name for name, module in other.named_modules() if isinstance(module, BaseTunerLayer)]
    layers = layers_of(vit, targets)
    assert wrapped == [row.layer for row in mine.adapter_report.rows] == layers  # type: ignore[union-attr]
    assert trained(mine) == trained(other)
    assert METHODS[ours].peer == theirs


def test_frozen_tensors_are_shared_and_full_fine_tuning_has_its_own(vit: nn.Module) -> None:
    own = {id(parameter) for parameter in vit.parameters()}
    light, full = adapted(vit, "lora"), adapted(vit, "full")
    frozen = [parameter for parameter in light.parameters() if not parameter.requires_grad]
    assert {id(parameter) for parameter in frozen} == own
    assert not own & {id(parameter) for parameter in full.parameters()}
    assert trained(full) == sum(parameter.numel() for parameter in vit.parameters())
    assert trained(light) == sum(p.numel() for name, p in light.named_parameters() if ".delta." in name)
    assert type(vit.get_submodule("blocks.0.attn.qkv")) is nn.Linear


def test_what_cannot_be_adapted_says_why(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    tower = ImageTower(load_clip("tiny", "random").model)
    assert "in_proj" in layers_of(tower)[0]
    with pytest.raises(UnavailableError, match="timm"):
        adapted(tower, "peft-lora")
    assert trained(adapted(tower, "randlora")) > 0
    base = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(UnavailableError, match="32"):
        adapted(base, "lora")
    assert adapted(base, "lora", 4)(torch.zeros(1, 16)).shape == (1, 16)
    monkeypatch.setattr(peft, "get_peft_model", lambda *_: None)
    with pytest.raises(UnavailableError, match="layers"):
        adapted(vit, "peft-lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    for _, theirs in PAIRS:
        with pytest.raises(UnavailableError, match="install"):
            adapted(vit, theirs)


def test_methods_are_chosen_by_name() -> None:
    assert chosen(()) == [name for name, method in METHODS.items() if method.default] != list(METHODS)
    assert chosen(["peft-lora", "full"]) == ["full", "peft-lora"]
    with pytest.raises(UserError, match="'randlora'"):
        chosen(["randlor"])
    assert label("lora") == "LoRA-32" and label("randlora-ternary", 4) == "RandLoRA-4, ternary"
