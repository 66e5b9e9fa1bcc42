"""OFT: rotations, the size of the blocks, the two forms of the product, and counts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from randlora_pl.adapters import OFT, DoRA, inject
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.adapters.select import match_budget
from randlora_pl.models import meta_clip
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One, adapted_one, assert_close, large_tensors_kept, randomise
from tests.adapters.zoo import small_vit
from tests.support.products import in_one_item


def adapted(**options: Any) -> One:
    model, _ = adapted_one(OFT(block=4, **options), dtype=torch.float64)
    randomise(model)
    return model


def test_inputs_are_rotated_and_singular_values_kept() -> None:
    model = adapted()
    delta: Any = model.fc.delta
    weight, rotation = model.fc.weight, torch.block_diag(*(delta.turn() + torch.eye(4).double()))
    assert_close(rotation @ rotation.T, torch.eye(12).double(), 1e-14)
    assert torch.linalg.det(rotation) > 0
    x = torch.randn(5, 12).double()
    assert_close(model(x), F.linear(x @ rotation, weight, model.fc.bias), 1e-14)
    changed = delta.effective_weight(weight)
    assert_close(changed, weight @ rotation.T, 1e-14)
    assert_close(torch.linalg.svdvals(changed), torch.linalg.svdvals(weight), 1e-13)
    assert (changed - weight).abs().max() > 0.1


def test_the_weight_is_not_kept() -> None:
    model, _ = adapted_one(OFT(block=8), 40, 30)
    assert large_tensors_kept(model) == 0


@in_one_item(
    ("side", "block", "found"),
    [(768, None, 32), (27, None, 27), (36, None, 18), (36, {"f.": 9}, 9), (36, {"other": 9}, 18)],
)
def test_blocks(side: int, block: Any, found: int) -> None:
    shape = WeightShape("fc", 20, side)
    assert OFT(block=block)._block_of(shape) == found
    assert OFT(block=block).count(shape) == side // found * (found * (found - 1) // 2)


def test_matched_blocks() -> None:
    report = inject(meta_clip("ViT-B-32"), OFT(match="lora:4"))
    assert (report.adapter.options()["block"], report.trainable) == (16, 691_200)
    with pytest.raises(UserError, match=r"no block of OFT comes near full .1,640 parameters.: .* are nearest"):
        match_budget(OFT(match="full"), [WeightShape("fc", 12, 12)], nn.Linear(40, 40))
    with pytest.raises(UserError, match="no block divides the inputs of all layers"):
        OFT().sizes([WeightShape("a", 4, 9), WeightShape("b", 4, 8)])


def test_an_alias_leaves_out_layers_whose_inputs_a_block_does_not_divide() -> None:
    model = small_vit()
    report = inject(model, OFT(block=48), ["all"])  # inputs of 24 and 96
    assert {row.layer for row in report.rows} == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
    assert "attn.qkv (no size fits it)" in report.coverage.line


def test_dora_around_rotations_starts_at_the_base() -> None:
    model = One(12, 20)
    x = torch.randn(5, 12)
    expected = model(x)
    inject(model, DoRA(OFT()), ["fc"])
    assert_close(model(x), expected, 1e-6)
    randomise(model)
    assert_close(model.fc.delta.effective_weight(model.fc.weight).norm(dim=1), model.fc.delta.magnitude.abs())  # type: ignore[operator, union-attr]
