import sys

import pytest
import torch
from torch import nn

from randlora_pl.lab.bench import METHODS, UnavailableError, adapted, chosen, label, layers_of
from randlora_pl.models import ImageTower, load_clip, load_vit
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item, marked


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


@pytest.mark.slow
@in_one_item("name", [name for name in METHODS if name != "full"])
def test_dropout_is_on_the_input_of_every_update(vit: nn.Module, name: str) -> None:
    if METHODS[name].foreign:
        pytest.importorskip("peft")
    model = adapted(vit, name, dropout=0.5).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 160, 160)
    torch.manual_seed(0)
    first = model(images)
    torch.manual_seed(1)
    assert not torch.allclose(first, model(images), rtol=1e-3)
    torch.manual_seed(0)
    torch.testing.assert_close(first, model(images))


@pytest.mark.parametrize("name", sorted({peer for _, peer in PAIRS}))
def test_without_peft_its_rows_say_so(vit: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnavailableError, match="install"):
        adapted(vit, name)


def test_peft_cannot_wrap_the_attention_of_open_clip() -> None:
    pytest.importorskip("peft")
    tower = ImageTower(load_clip("tiny", "random").model)
    assert "in_proj" in layers_of(tower)[0]
    with pytest.raises(UnavailableError, match="timm"):
        adapted(tower, "peft-lora")
    assert trained(adapted(tower, "randlora")) > 0


def test_peft_layers_are_compared(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(peft, "get_peft_model", lambda *_: None)
    with pytest.raises(UnavailableError, match="layers"):
        adapted(vit, "peft-lora")


def test_a_rank_that_is_too_large_is_told() -> None:
    base = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(UnavailableError, match="32"):
        adapted(base, "lora")
    assert adapted(base, "lora", 4)(torch.zeros(1, 16)).shape == (1, 16)


def test_methods_are_chosen_by_name() -> None:
    assert chosen(()) == [name for name, method in METHODS.items() if method.default] != list(METHODS)
    assert chosen(["peft-lora", "full"]) == ["full", "peft-lora"]
    with pytest.raises(UserError, match="'randlora'"):
        chosen(["randlor"])
    assert label("lora") == "LoRA-32" and label("randlora-ternary", 4) == "RandLoRA-4, ternary"
