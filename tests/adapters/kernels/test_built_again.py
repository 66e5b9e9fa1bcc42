"""Weights that the backward pass builds again: no matrix of their size is kept."""

import gc
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters.kernels.common import built_again
from tests.adapters.cases import assert_close
from tests.support.products import in_one_item


@in_one_item(("bias", "x_trains"), [(True, True), (False, True), (True, False)])
def test_gradients_are_the_same_and_no_weight_is_kept(bias: bool, x_trains: bool) -> None:
    scale = torch.randn(30, 1, dtype=torch.float64, requires_grad=True)
    weight, x = torch.randn(30, 20, dtype=torch.float64), torch.randn(2, 5, 20, dtype=torch.float64)
    offset = torch.randn(30, dtype=torch.float64, requires_grad=True) if bias else None
    built: list[weakref.ref[Tensor]] = []

    def build() -> Tensor:
        made = weight * (1 + scale)
        built.append(weakref.ref(made))
        return made

    outputs = built_again(x.requires_grad_(x_trains), build, offset)
    gc.collect()
    assert [made() for made in built] == [None]
    expected = F.linear(x, weight * (1 + scale), offset)
    assert_close(outputs, expected, 1e-12)
    inputs = [each for each in (scale, x, offset) if each is not None and each.requires_grad]
    gradient = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(each, inputs, gradient) for each in (outputs, expected)), strict=True)
    for first, second in pairs:
        assert_close(first, second, 1e-12)
    assert len(built) == 2
