"""DoRA: magnitudes and the constant norm of its gradient; PEFT judges the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_pl.adapters import (
    AutoLoRA,
    BitFit,
    DoRA,
    HydraLoRA,
    LoRA,
    RandLoRA,
    VeRA,
    delta_weights,
    inject,
    trainable_parameters,
)
from randlora_pl.adapters.methods.dora import DoRADelta
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One, adapt, assert_close, randomise


def test_magnitudes_start_at_the_row_norms_and_become_them() -> None:
    model = One(12, 20)
    inject(model, DoRA(LoRA(rank=4, alpha=4.0)), ["fc"])
    delta = model.fc.delta
    assert isinstance(delta, DoRADelta)
    assert_close(delta.magnitude, model.fc.weight.norm(dim=1))
    randomise(model)
    assert_close(delta.effective_weight(model.fc.weight).norm(dim=1), delta.magnitude.abs())
    # The report's update is all that changes, the inner one is before the rows are scaled.
    assert_close(delta_weights(model)["fc"], delta.effective_weight(model.fc.weight) - model.fc.weight)
    assert not torch.equal(delta.change(model.fc.weight), delta.inner.change(model.fc.weight))


@pytest.mark.parametrize("inner", [LoRA(rank=4, alpha=4.0), RandLoRA(rank=4), VeRA(rank=9, alpha=9.0)])
def test_the_norm_is_a_constant_for_the_gradient(inner: Any) -> None:
    model = One(12, 20).double()
    inject(model, DoRA(inner), ["fc"])
    randomise(model)
    delta, weight = model.fc.delta, model.fc.weight
    assert isinstance(delta, DoRADelta)
    norm = (weight + delta.inner.change(torch.empty(0))).norm(dim=1, keepdim=True).detach()

    def by_hand(x: Tensor) -> Tensor:
        return x @ (delta.magnitude[:, None] * (weight + delta.inner.change(torch.empty(0))) / norm).T + model.fc.bias

    x = torch.randn(9, 12, dtype=torch.float64)
    values = list(trainable_parameters(model).values())
    gradients = [torch.autograd.grad(run(x).square().sum(), values) for run in (model, by_hand)]
    for first, second in zip(*gradients, strict=True):
        assert_close(first, second, 1e-10)


def test_a_row_of_zeros_stays_one() -> None:
    model = One(12, 20)
    with torch.no_grad():
        model.fc.weight[3] = 0
    x = torch.randn(5, 12)
    expected = model(x)
    inject(model, DoRA(LoRA(rank=4, alpha=4.0)), ["fc"])
    assert torch.equal(model(x), expected)
    model(x).square().sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in trainable_parameters(model).values())
    randomise(model)
    assert model(x).isfinite().all()


def test_nothing_changes_at_the_start_in_low_precision() -> None:
    model = One(64, 64)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        inject(model, DoRA(RandLoRA(rank=6)), ["fc"])
        assert torch.equal(model(x), expected)


def test_options_come_from_the_inner_method() -> None:
    adapter = DoRA(RandLoRA(rank=5, qkv="split", match="lora:2", seed=3))
    assert (adapter.qkv, adapter.match, adapter.key, adapter.rank) == ("split", "lora:2", 3, 5)
    assert adapter.replace(rank=7, match=None).describe() == DoRA(RandLoRA(rank=7, qkv="split", seed=3)).describe()
    assert adapter.replace(inner=LoRA(rank=2)).describe() == DoRA(LoRA(rank=2)).describe()
    assert DoRA().describe() == DoRA(LoRA()).describe()
    assert DoRA(LoRA(rank=4)).count(WeightShape("fc", 20, 12)) == 4 * 32 + 20


@pytest.mark.parametrize("inner", [BitFit(), DoRA()])
def test_an_inner_method_must_add_an_update(inner: Any) -> None:
    for each in (inner, HydraLoRA(), AutoLoRA()):  # AutoLoRA's search needs data that know of it
        with pytest.raises(UserError, match=f"^DoRA: inner is {each.method()}. Choose"):
            DoRA(each)


def test_split_weights_have_magnitudes_of_their_own() -> None:
    from tests.adapters.cases import SelfAttention

    model = SelfAttention(12)
    adapt(model, "dora", "mha-split")
    names = trainable_parameters(model)
    assert {name for name in names if name.endswith("magnitude")} == {f"attn.delta.{b}.magnitude" for b in "qkv"}
    assert all(names[f"attn.delta.{b}.magnitude"].shape == (12,) for b in "qkv")
