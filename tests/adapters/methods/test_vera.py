"""VeRA: its start, its shared pair and its forms; PEFT judges the formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from randlora_pl.adapters import VeRA, inject
from randlora_pl.adapters.methods.vera import VeRADelta
from randlora_pl.adapters.random_bases import WeightShape
from tests.adapters.cases import One, randomise


def test_the_start() -> None:
    model = One(20, 12)
    inject(model, VeRA(rank=30, alpha=5.0, d_initial=0.25), ["fc"])
    delta = model.fc.delta
    assert isinstance(delta, VeRADelta)
    assert torch.equal(delta.b, torch.zeros(12))
    assert torch.equal(delta.d, torch.full((30,), 0.25))
    assert delta.scaling == 5.0 / 30


def test_layers_share_one_pair_and_slice_it() -> None:
    model = nn.ModuleDict({"tall": nn.Linear(6, 10), "wide": nn.Linear(30, 8)})
    inject(model, VeRA(rank={"tall": 4, "wide": 7}), [".*"])
    tall, wide = model["tall"].delta, model["wide"].delta
    assert isinstance(tall, VeRADelta)
    assert isinstance(wide, VeRADelta)
    assert tall.bases is wide.bases
    assert tall.bases.A.shape == (1, 7, 30)
    assert tall.bases.B.shape == (10, 1, 7)
    assert (tall.b.numel(), tall.d.numel(), wide.b.numel(), wide.d.numel()) == (10, 4, 8, 7)


def test_count() -> None:
    assert VeRA(rank=256).count(WeightShape("fc2", 768, 3072)) == 768 + 256


@pytest.mark.parametrize(("tokens", "r"), [(3, 4), (400, 4), (400, 60)])
def test_every_form_gives_the_gradients_of_the_plain_product(tokens: int, r: int) -> None:
    """Thin products for a small rank, one built weight for many tokens at a large one."""
    model = One(24, 40).double()
    inject(model, VeRA(rank=r, alpha=3.0), ["fc"])
    randomise(model, 0.5)
    delta = model.fc.delta
    assert isinstance(delta, VeRADelta)
    x = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    found = []
    for output in (model(x), F.linear(x, delta.effective_weight(model.fc.weight), model.fc.bias)):
        found.append((output, *torch.autograd.grad(output.square().sum(), [x, delta.b, delta.d])))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)
