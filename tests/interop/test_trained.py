"""Modules that trained whole beside an adapter, outside of this program."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from randlora_pl.adapters import LoRA, RandLoRA, inject, load_adapter, read_adapter, save_adapter, set_train_mode
from randlora_pl.commands.main import main
from randlora_pl.interop.peft.export import export_peft
from randlora_pl.interop.peft.import_ import import_peft
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import assert_close, randomise

VIT = "test_vit.r160_in1k"


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(6, 6), "norm": nn.BatchNorm1d(6), "head": nn.Linear(6, 2)}).eval()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers["head"](self.layers["norm"](self.layers["body"](x)))
        return out


def test_peft_takes_heads_and_statistics_and_gives_them_back(tmp_path: Path) -> None:
    base, x = Net().eval(), torch.randn(4, 6)
    ours = copy.deepcopy(base)
    inject(ours, LoRA(rank=2), ["body"], ["norm", "head"])
    randomise(ours)
    set_train_mode(ours)
    ours(3 + x)
    set_train_mode(ours, False)
    save_adapter(ours, tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "peft", model=base)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    assert_close(theirs(x), ours(x), 1e-5)
    back = import_peft(tmp_path / "peft", copy.deepcopy(base))
    save_adapter(back, tmp_path / "back")
    fresh = load_adapter(again := copy.deepcopy(base), tmp_path / "back")
    assert_close(again(x), ours(x), 1e-5)
    assert {"layers.norm.running_mean", "layers.norm.running_var"} <= set(fresh.kept)


def test_a_module_whose_name_peft_would_confuse(tmp_path: Path) -> None:
    base = nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4), *(nn.Identity() for _ in range(8)), nn.Linear(4, 4), nn.ReLU()
    )
    ours = copy.deepcopy(base)
    inject(ours, LoRA(rank=2), ["0"], ["1"])
    save_adapter(ours, tmp_path / "ours")
    with pytest.raises(UserError, match="11"):
        export_peft(tmp_path / "ours", tmp_path / "peft", model=base)


def saved(folder: Path, adapter: Any, seed: int) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(VIT, pretrained=False, num_classes=3).eval()
    state = timm_state()
    model.load_state_dict({**model.state_dict(), **state})
    inject(model, adapter, None, ["head"])
    torch.manual_seed(seed)
    randomise(model, 0.1)
    save_adapter(model, folder, base_model={"library": "timm", "name": VIT, "pretrained": "random", "seed": 0})
    return model


def timm_state() -> Any:
    from randlora_pl.models import load_vit

    return load_vit(VIT, "random").model.state_dict()


def test_merged_weights_of_a_timm_model_with_its_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = saved(tmp_path / "a", RandLoRA(rank=4), 1), saved(tmp_path / "b", LoRA(rank=2), 2)
    expected = {key: value.clone() for key, value in first.state_dict().items() if ".delta." not in key}
    for verb in (
        ["merge", str(tmp_path / "a")],
        ["merge", str(tmp_path / "a"), "--scale", "0.5"],
        ["add", str(tmp_path / "a"), str(tmp_path / "b")],
    ):
        output = tmp_path / f"{len(verb)}.safetensors"
        assert main(["adapter", *verb, "--output", str(output)]) == 0, capsys.readouterr().err
        merged = load_file(output)
        assert merged.keys() == expected.keys()
        assert torch.equal(merged["head.weight"], expected["head.weight"])
    assert main(["adapter", "info", str(tmp_path / "a")]) == 0
    assert "trained whole" in capsys.readouterr().out
    assert read_adapter(tmp_path / "b").trained == ["head"]
    assert not torch.equal(second.state_dict()["head.weight"], expected["head.weight"])
