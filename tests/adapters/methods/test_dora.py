"""DoRA: the constant norm of its gradient; HiRA: its rank, and what its backward pass keeps. PEFT judges the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import (
    DoRA,
    HiRA,
    LoRA,
    RandLoRA,
    VeRA,
    delta_weights,
    inject,
    trainable_parameters,
)
from randlora_pl.adapters.random_bases import WeightShape
from tests.adapters.cases import One, adapted_one, assert_close, large_tensors_kept, randomise
from tests.adapters.layers.test_quantized import pair


@pytest.mark.parametrize("inner", [LoRA(rank=4, alpha=4.0), RandLoRA(rank=4), VeRA(rank=9, alpha=9.0)])
def test_the_norm_is_a_constant_for_the_gradient(inner: Any) -> None:
    model, delta = adapted_one(DoRA(inner), dtype=torch.float64)
    randomise(model)
    weight = model.fc.weight
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


# HiRA


def test_a_small_rank_gives_full_rank_and_zeros_stay_zero() -> None:
    model = One(24, 24)
    with torch.no_grad():
        model.fc.weight[3, 5:9] = 0
    report = inject(model, HiRA(rank=2, seed=3), ["fc"])
    assert report.trainable == HiRA(rank=2).count(WeightShape("fc", 24, 24)) == 2 * 48
    delta = model.fc.delta
    assert isinstance(delta, nn.Module) and delta.A.abs().max() <= 24**-0.5  # type: ignore[operator, union-attr]
    randomise(model)
    update = delta_weights(model)["fc"]
    assert torch.linalg.matrix_rank(update) == 24
    assert not update[3, 5:9].any() and update[3, 9:].all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_matrix_of_the_weight_s_size_is_kept(dropout: float) -> None:
    """Beside a plain frozen weight, and beside a packed one, which is unpacked again."""
    for model in pair(40, 30):
        before = large_tensors_kept(model)  # of a packed layer's own forward
        inject(model, HiRA(rank=2, dropout=dropout), ["fc"])
        randomise(model)
        assert large_tensors_kept(model.train()) == before


def test_dora_scales_the_rows_of_the_changed_weight() -> None:
    model, delta = adapted_one(DoRA(HiRA(rank=3)))
    weight = model.fc.weight.detach().clone()
    assert not delta_weights(model)["fc"].any()
    randomise(model)
    changed = weight + weight * (delta.inner.B @ delta.inner.A)
    expected = delta.magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
    x = torch.randn(4, 12)
    assert_close(model(x), x @ expected.T + model.fc.bias, 1e-5)
