"""OFT: rotations, the size of the blocks, the two forms of the product, and counts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from randlora_pl.adapters import OFT, DoRA, inject
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.models import meta_clip
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One, assert_close, randomise
from tests.adapters.methods.test_hira import large_tensors_kept
from tests.adapters.zoo import small_vit
from tests.support.products import in_one_item


def adapted(**options: Any) -> One:
    model = One(12, 20).double()
    inject(model, OFT(block=4, **options), ["fc"])
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


def test_the_series_approaches_the_inverse() -> None:
    exact: Any = adapted().fc.delta
    errors = []
    for terms in (5, 40):
        series: Any = adapted(neumann_terms=terms).fc.delta
        with torch.no_grad():
            series.Q.copy_(0.3 * exact.Q)
            errors.append((series.turn() - _scaled(exact, 0.3)).abs().max())
    assert errors[0] > 1e-4 and errors[1] < 1e-8
    for terms in (3, "x"):
        with pytest.raises(UserError, match=rf"neumann_terms is {terms!r}. Set a whole number of at least 4"):
            OFT(neumann_terms=terms)  # type: ignore[arg-type]


def _scaled(delta: Any, factor: float) -> torch.Tensor:
    before = delta.Q.clone()
    delta.Q.mul_(factor)
    turn: torch.Tensor = delta.turn()
    delta.Q.copy_(before)
    return turn


def test_both_forms_agree_and_neither_keeps_the_weight() -> None:
    model = adapted()
    delta: Any = model.fc.delta
    for tokens in (3, 500):  # thin, built
        x = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
        results = []
        for keep in (None, False):
            delta.keep = keep
            results.append(torch.autograd.grad(model(x).square().sum(), [x, delta.Q]))
        for first, second in zip(*results, strict=True):
            assert_close(first, second, 1e-12)
    wide = One(40, 30)
    inject(wide, OFT(block=8), ["fc"])
    assert large_tensors_kept(wide) == 0


@in_one_item(
    ("side", "block", "found"),
    [
        (768, None, 32),
        (27, None, 27),
        (36, None, 18),
        (37, None, "the 37 inputs of fc have no divisor from 2 to 32. Set block 37"),
        (36, 5, "block 5 does not divide the 36 inputs of fc into parts of 2 or more. Set block 4 or 6"),
        (36, 50, "Set block 36"),
        (36, 1, "block 1 does not divide the 36 inputs"),
        (36, True, "block is True. Set a positive whole number or a mapping"),
        (36, {"f.": 9}, 9),
        (36, {"other": 9}, 18),
        (1, None, "Leave it out of the targets"),
    ],
)
def test_blocks(side: int, block: Any, found: int | str) -> None:
    shape = WeightShape("fc", 20, side)
    if isinstance(found, int):
        assert OFT(block=block).block_of(shape) == found
        assert OFT(block=block).count(shape) == side // found * (found * (found - 1) // 2)
        return
    with pytest.raises(UserError, match=found):
        OFT(block=block).count(shape)


def test_counts_and_matched_blocks() -> None:
    model = meta_clip("ViT-B-32")
    assert inject(model, OFT(block=32)).trainable == 1_428_480
    report = inject(meta_clip("ViT-B-32"), OFT(match="lora:4"))
    assert (report.adapter.options()["block"], report.trainable) == (16, 691_200)
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
