"""Methods that PEFT has under other names: the same outputs and gradients both ways, with PEFT as the judge."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, OFTConfig, PeftModel, ShiraConfig
from torch import Tensor

from randlora_pl.adapters import OFT, Adapter, HiRA, SHiRA, inject, save_adapter, trainable_parameters
from randlora_pl.interop.peft.export import export_peft
from randlora_pl.interop.peft.import_ import import_peft
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import assert_close, randomise
from tests.adapters.zoo import images, small_vit
from tests.interop.peft.test_import import edit, edit_tensors, peft_folder, refused
from tests.support.products import in_one_item

QKV = "base_model.model.blocks.0.attn.qkv."


def every_other(layer: Any, r: int, **options: Any) -> Tensor:
    """A mask of one's own."""
    mask = torch.zeros_like(layer.weight).flatten()
    mask[: 2 * r * sum(layer.weight.shape) : 2] = 1
    return mask.view_as(layer.weight)


def with_mask(config: ShiraConfig) -> ShiraConfig:
    config.mask_fn = every_other
    return config


EXPORTED: dict[str, tuple[Adapter, str, bool]] = {  # adapter, a part of PEFT's names, and if its file trains further
    "hira": (HiRA(rank=3, dropout=0.1), "hira_", True),
    "hira, ranks": (HiRA(rank={r".*0\..*": 2, ".*": 5}), "hira_", False),  # filled up with zeros
    "oft": (OFT(block=8), "oft_R", True),
    "oft, default": (OFT(), "oft_R", True),
    "oft, one number": (OFT(block={".*qkv": 3, ".*fc1": 3, ".*": 12}), "oft_R", True),
    "oft, series": (OFT(block=4, neumann_terms=6), "oft_R", True),
    "shira": (SHiRA(rank=3, dropout=0.1), "shira_weight", True),
    "shira, top": (SHiRA(rank=2, places="top"), "shira_weight", True),
}
IMPORTED: dict[str, Callable[[], Any]] = {
    "hira": lambda: HiraConfig(r=3, target_modules=["qkv", "fc1"], rank_pattern={"fc1": 5}, hira_dropout=0.1),
    "oft": lambda: OFTConfig(oft_block_size=7, target_modules=["qkv", "fc2"], module_dropout=0.1),
    "oft, exact": lambda: OFTConfig(r=3, oft_block_size=0, target_modules=["qkv"], use_cayley_neumann=False),
    "oft, 3 terms": lambda: OFTConfig(oft_block_size=8, target_modules=["qkv"], num_cayley_neumann_terms=3),
    "shira": lambda: ShiraConfig(r=3, target_modules=["qkv", "fc1"], random_seed=5),
    "shira, own mask": lambda: with_mask(ShiraConfig(r=2, mask_type="own", target_modules=["qkv"])),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@in_one_item("name", EXPORTED)
def test_peft_loads_what_we_export(name: str, tmp_path: Path) -> None:
    adapter, part, trains = EXPORTED[name]
    base = small_vit()
    ours = copy.deepcopy(base)
    inject(ours, adapter)
    randomise(ours, 0.3)
    save_adapter(ours.eval(), tmp_path / "ours")
    found = export_peft(tmp_path / "ours", tmp_path / "peft", model=base).difference
    assert found is not None and found.change > 1e-2
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft", is_trainable=True).eval()
    x = images().double()
    outputs = [theirs.double().get_base_model()(x), ours.double()(x)]
    assert_close(*outputs, 2e-6)
    if trains:
        own = [value for key, value in theirs.named_parameters() if part in key]
        sums = [
            sum(float(each.square().sum()) for each in torch.autograd.grad(output.square().sum(), values))
            for output, values in zip(outputs, (own, list(trainable_parameters(ours).values())), strict=True)
        ]
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    again = import_peft(tmp_path / "peft", copy.deepcopy(base)).eval()
    assert_close(again.double()(x), outputs[1], 2e-6)


@in_one_item("name", IMPORTED)
def test_what_peft_saved_comes_back(name: str, tmp_path: Path) -> None:
    base = small_vit()
    theirs = peft_folder(IMPORTED[name](), tmp_path / "peft", base)
    ours = import_peft(tmp_path / "peft", copy.deepcopy(base)).eval()
    x = images().double()
    assert_close(ours.double()(x), theirs.double()(x), 2e-6)
    save_adapter(ours, tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "again", model=base)
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    assert_close(back.double().get_base_model()(x), theirs(x), 2e-6)


@in_one_item(
    ("change", "message"),
    [
        (lambda i: i[:, [0, *range(len(i[0]) - 1)]], "are not distinct places in 72 x 24"),
        (lambda i: i + torch.tensor([[0], [24]]), "are not distinct places in 72 x 24"),
        (lambda i: i[:, 1:], "one for each value"),
        (lambda i: i[0], "shira_indices of blocks.0.attn.qkv are not distinct"),
    ],
)
def test_damaged_places_are_refused(change: Callable[[Tensor], Tensor], message: str, tmp_path: Path) -> None:
    peft_folder(ShiraConfig(r=3, target_modules=["qkv"]), tmp_path)
    name = f"{QKV}shira_indices"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: change(tensors[name]).int().contiguous()}))
    refused(tmp_path, message)


def test_other_ranks_and_sizes_are_refused(tmp_path: Path) -> None:
    ours = small_vit()
    inject(ours, SHiRA(rank={".*qkv": 2, ".*": 3}))
    save_adapter(ours, tmp_path / "ours")
    with pytest.raises(UserError, match="its layers have ranks 2 and 3; PEFT's SHiRA has one rank"):
        export_peft(tmp_path / "ours", tmp_path / "peft", model=small_vit())
    peft_folder(ShiraConfig(r=3, target_modules=["qkv"]), tmp_path / "theirs")
    edit_tensors(tmp_path / "theirs", lambda tensors: tensors.pop(f"{QKV}shira_indices"))
    refused(tmp_path / "theirs", "shira_indices of blocks.0.attn.qkv is missing")
    peft_folder(HiraConfig(r=3, target_modules=["qkv"]), tmp_path / "hira")
    edit(tmp_path / "hira", lambda config: config.update(hira_dropout="x"))
    refused(tmp_path / "hira", "hira: hira_dropout is 'x' in its config")
