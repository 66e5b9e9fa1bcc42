"""HiRA and OFT from and to PEFT: the sense of the rotation, convolutions, and files that mean something else."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, OFTConfig
from torch import nn

from randlora_pl.adapters import OFT, HiRA, inject, save_adapter
from randlora_pl.adapters.methods.oft import _adjusted, _common_size
from randlora_pl.interop.peft.export import export_peft
from randlora_pl.interop.peft.import_ import import_peft
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import assert_close, randomise
from tests.adapters.zoo import small_clip, small_vit
from tests.interop.peft.test_import import edit, edit_tensors, peft_folder, refused
from tests.support.products import in_one_item


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def test_convolutions(tmp_path: Path) -> None:
    plain = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3, stride=2, padding=1), flat=nn.Flatten()))
    theirs = peft_folder(HiraConfig(r=2, target_modules=["conv"]), tmp_path / "theirs", plain)
    x = torch.randn(2, 3, 8, 8)
    ours = import_peft(tmp_path / "theirs", copy.deepcopy(plain))
    assert_close(ours(x), theirs(x), 1e-5)
    assert (theirs(x) - plain(x)).abs().max() > 1e-2
    save_adapter(ours, tmp_path / "ours")
    assert export_peft(tmp_path / "ours", tmp_path / "again", model=plain).difference is not None
    peft_folder(OFTConfig(oft_block_size=3, target_modules=["conv"]), tmp_path / "turned", plain)
    refused(tmp_path / "turned", "its target conv is a Conv2d", plain)  # PEFT turns patches and adds them up
    turned = copy.deepcopy(plain)
    inject(turned, OFT(), ["c.nv"])
    save_adapter(turned, tmp_path / "own")
    with pytest.raises(UserError, match="conv is a convolution, which PEFT adapts so with LoRA and HiRA only"):
        export_peft(tmp_path / "own", tmp_path / "no", model=plain)


@in_one_item(
    ("change", "message"),
    [
        (lambda c: c.update(peft_version="0.17.1"), r"series of its rotations \(5 terms, peft_version 0.17.1\)"),
        (lambda c: c.pop("peft_version"), "peft_version None"),
        (lambda c: c.update(num_cayley_neumann_terms=2), r"\(2 terms"),
        (lambda c: c.update(coft=True), "its config has coft: True, which changes the outputs"),
        (lambda c: c.update(block_share=True), "its config has block_share: True"),
        (lambda c: c.update(r=-1), "r is -1 in its config"),
    ],
)
def test_configs_that_mean_something_else(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    peft_folder(OFTConfig(oft_block_size=8, target_modules=["qkv"]), tmp_path)
    edit(tmp_path, change)
    refused(tmp_path, message)


def test_tensors_that_do_not_fit_and_layers_that_peft_has_not(tmp_path: Path) -> None:
    peft_folder(OFTConfig(oft_block_size=8, target_modules=["qkv"]), tmp_path / "theirs")
    name = "base_model.model.blocks.0.attn.qkv.oft_R.weight"
    edit_tensors(tmp_path / "theirs", lambda tensors: tensors.update({name: torch.zeros(3, 27)}))
    refused(tmp_path / "theirs", r"oft_R of blocks.0.attn.qkv has shape \(3, 27\), which does not fit its 24 inputs")
    for number, method in enumerate((HiRA(rank=2), OFT())):
        base = small_clip()
        clip = copy.deepcopy(base)
        inject(clip, method, ["visual:qkv"])
        randomise(clip)
        save_adapter(clip, tmp_path / f"clip{number}")
        with pytest.raises(UserError, match=r"blocks.0.attn.in_proj is a weight of nn.MultiheadAttention"):
            export_peft(tmp_path / f"clip{number}", tmp_path / "peft", model=base)
    mixed = small_vit()
    inject(mixed, OFT(block={".*qkv": 2, ".*fc1": 24, ".*": 4}))
    save_adapter(mixed, tmp_path / "mixed")
    with pytest.raises(UserError, match="its layers have blocks of 2 and 4 and 24; PEFT finds others for one size"):
        export_peft(tmp_path / "mixed", tmp_path / "peft", model=small_vit())


def test_sizes_are_found_as_peft_finds_them() -> None:
    assert _common_size({(36, 36)}) == (0, 36)
    assert _common_size({(36, 18), (64, 32)}) == (0, 25)
    assert _common_size({(36, 12), (24, 8)}) == (3, 0)
    assert _common_size({(36, 18), (64, 16)}) == (0, 16)
    layer: Any = peft_layer()
    for side in (7, 24, 36, 60):
        layer.in_features = side
        divisors = [size for size in range(1, side + 1) if side % size == 0]
        for size in range(2, 70):
            theirs = size if side % size == 0 else layer.adjust_oft_parameters(side, size)
            assert _adjusted(divisors, size) == theirs


def peft_layer() -> Any:
    from peft.tuners.oft.layer import Linear

    return Linear(nn.Linear(8, 8), "default", OFTConfig(oft_block_size=4), r=0)
