"""PiSSA, OLoRA and LoRA-XS from and to PEFT: the same outputs, with factors that follow from the base model."""

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from randlora_pl.adapters import Adapter, LoRA, LoRAXS, PiSSA, derived, inject, load_adapter, save_adapter
from randlora_pl.interop.peft.export import export_peft
from randlora_pl.interop.peft.import_ import import_peft
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import SelfAttention, assert_close, randomise
from tests.adapters.zoo import images, small_vit
from tests.support.products import in_one_item

TARGETS = ["qkv", "fc1"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def folder_of_peft(path: Path, base: nn.Module, **options: Any) -> Any:
    config = LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": TARGETS} | options))
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(path)
    return theirs


IMPORTED: dict[str, dict[str, Any]] = {
    "pissa": {},
    "pissa, rs": {"use_rslora": True, "lora_dropout": 0.1},
    "pissa, ranks": {"rank_pattern": {"fc1": 5}, "alpha_pattern": {"qkv": 2}, "use_rslora": True},
    "olora": {},
    "olora, alpha": {"lora_alpha": 3},
    "mica": {"lora_alpha": 3},
}


@in_one_item("name", IMPORTED)
def test_import(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, start = small_vit(), name.partition(",")[0]
    theirs = folder_of_peft(tmp_path / "peft", base, init_lora_weights=start, **IMPORTED[name])
    calls: list[Any] = []
    whole = derived.factors
    monkeypatch.setattr(derived, "factors", lambda *given: calls.append(given) or whole(*given))
    ours = import_peft(tmp_path / "peft", copy.deepcopy(base)).eval()
    adapter: Any = ours.adapter_report.adapter
    assert type(adapter) is (LoRA if start == "mica" else PiSSA)
    assert len(calls) == (0 if start == "mica" else len(adapter_layers(ours)))
    x = images()
    assert_close(ours(x), theirs(x), 2e-5)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()  # repeats the decomposition
    assert_close(ours(x), again(x), 2e-5)
    save_adapter(ours, tmp_path / "ours")
    back = copy.deepcopy(base).eval()
    load_adapter(back, tmp_path / "ours")
    assert torch.equal(back(x), ours(x))


def adapter_layers(model: nn.Module) -> list[str]:
    return [row.layer for row in model.adapter_report.rows]  # type: ignore[union-attr]


def test_what_cannot_be_repeated_is_refused(tmp_path: Path) -> None:
    base = small_vit()
    folder_of_peft(tmp_path / "peft", base, init_lora_weights="pissa")
    config = tmp_path / "peft" / "adapter_config.json"
    plain = json.loads(config.read_text())
    for change, message in (
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4' changes the base weights. Write it as a plain LoRA"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "'pissa' changes the base weights"),
    ):
        config.write_text(json.dumps(plain | change))
        with pytest.raises(UserError, match=message):
            import_peft(tmp_path / "peft", copy.deepcopy(base))


def test_transposed_weights(tmp_path: Path) -> None:
    """PEFT transposes them for PiSSA and not for OLoRA, which gives wrong factors of a square weight."""
    base, x = nn.Sequential(OrderedDict(fc=Conv1D(12, 12))), torch.randn(3, 12)
    for start in ("pissa", "olora"):
        theirs = folder_of_peft(
            tmp_path / start, base, init_lora_weights=start, target_modules=["fc"], fan_in_fan_out=True
        )
        if start == "pissa":
            assert_close(import_peft(tmp_path / start, copy.deepcopy(base))(x), theirs(x))
            continue
        with pytest.raises(UserError, match="PEFT's olora of fc does not start at this weight"):
            import_peft(tmp_path / start, copy.deepcopy(base))


EXPORTED: dict[str, Adapter] = {
    "pissa": PiSSA(rank=3),
    "pissa, alpha": PiSSA(rank=3, alpha=6.0, dropout=0.1),
    "pissa, ranks": PiSSA(rank={r".*fc1": 2, ".*": 4}, qkv="split"),
    "olora": PiSSA(rank=3, start="olora", keep_derived=True),
    "minor": PiSSA(rank=3, start="minor"),
    "loraxs": LoRAXS(rank=5, alpha=16.0),
    "loraxs, both": LoRAXS(rank=5, balance="both", qkv="split"),
}


@in_one_item("name", EXPORTED)
def test_export(name: str, tmp_path: Path) -> None:
    base, adapter = small_vit(), EXPORTED[name]
    ours = copy.deepcopy(base)
    inject(ours, adapter)
    randomise(ours)
    save_adapter(ours, tmp_path / "ours")
    assert export_peft(tmp_path / "ours", tmp_path / "peft", model=base).difference is not None
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["lora_dropout"] == adapter.dropout
    if not isinstance(adapter.rank, dict) and adapter.qkv == "packed":
        twice = isinstance(adapter, PiSSA) and adapter.start != "minor"
        assert config["r"] == config["lora_alpha"] == adapter.rank * (2 if twice else 1)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    x = images()
    assert_close(theirs(x), ours.eval()(x), 2e-5)


def test_export_of_packed_attention_and_without_a_base(tmp_path: Path) -> None:
    base = SelfAttention(12).eval()
    for adapter in (PiSSA(rank=3), LoRAXS(rank=3, qkv="split")):
        ours = copy.deepcopy(base)
        inject(ours, adapter, ["qkv"])
        randomise(ours)
        save_adapter(ours, tmp_path / "ours")
        export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
        theirs, x = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval(), torch.randn(2, 5, 12)
        assert_close(theirs.base_model.model(x), ours.eval()(x))
    with pytest.raises(UserError, match=r"does not name its base model.*export_peft\(ADAPTER, DIR, model=model\)"):
        export_peft(tmp_path / "ours", tmp_path / "none")
