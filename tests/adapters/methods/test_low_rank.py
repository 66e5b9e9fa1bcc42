"""LoRA, VeRA and NoLA: their starts, scalings and counts; PEFT and the contract judge the formulas."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from randlora_pl.adapters import LoRA, NoLA, VeRA, delta_weights, inject
from randlora_pl.adapters.random_bases import WeightShape
from tests.adapters.cases import adapted_one


def assert_uniform(values: torch.Tensor, bound: float) -> None:
    assert values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_the_starts_of_lora_and_vera() -> None:
    _, delta = adapted_one(LoRA(rank=50), 300, 200)
    assert not delta.B.any()
    assert_uniform(delta.A, 1 / math.sqrt(300))
    _, delta = adapted_one(VeRA(rank=30, d_initial=0.25))
    assert torch.equal(delta.b, torch.zeros(20))
    assert torch.equal(delta.d, torch.full((30,), 0.25))


def test_the_start_of_the_papers_code() -> None:
    """The zero factor is on the input side and the bound is 1 / sqrt(r out); packed attention has both exchanged."""
    model = nn.ModuleDict({"fc": nn.Linear(300, 200), "attn": nn.MultiheadAttention(120, 2)})
    inject(model, LoRA(rank=50, init="official"), ["fc", "attn.in_proj"])
    plain: Any = model.fc.delta
    packed: Any = model.attn.delta
    assert not plain.A.any() and not packed.B.any()
    assert_uniform(plain.B, 1 / math.sqrt(50 * 200))
    assert_uniform(packed.A, 1 / math.sqrt(50 * 120))
    alone = nn.MultiheadAttention(120, 2)  # its layer is called in_proj
    inject(alone, LoRA(rank=50, init="official"), ["in_proj"])
    assert not alone.delta.B.any() and alone.delta.A.any()  # type: ignore[union-attr,operator]
    model.fc(torch.randn(3, 300)).square().sum().backward()  # type: ignore[operator]
    assert plain.A.grad.any() and not plain.B.grad.any()


def test_the_start_depends_on_seed_and_layer_name_alone() -> None:
    def start(seed: int, **sizes: int) -> dict[str, torch.Tensor]:
        model = nn.ModuleDict({name: nn.Linear(8, size) for name, size in sizes.items()})
        inject(model, LoRA(rank=2, seed=seed), [".*"])
        return {name: layer.delta.A.detach() for name, layer in model.items()}  # type: ignore[union-attr,operator,misc]

    both, alone = start(0, one=8, two=8), start(0, two=20)
    assert torch.equal(both["two"], alone["two"])
    assert not torch.equal(both["one"], both["two"])
    assert not torch.equal(start(1, two=8)["two"], both["two"])


@pytest.mark.parametrize(("init", "beta"), [("zero", 0.0), ("official", 1 / 64)])
def test_the_start_of_nola(init: Any, beta: float) -> None:
    model, delta = adapted_one(NoLA(num_bases=64, init=init))
    assert torch.equal(delta.alphas, torch.full((64,), 1 / 64))
    assert torch.equal(delta.betas, torch.full((64,), beta))
    assert bool(delta_weights(model)["fc"].any()) == (init == "official")


def test_scalings_and_counts() -> None:
    for adapter, scaling in (
        (LoRA(rank=9, alpha=3.0), 3 / 9),
        (LoRA(rank=9, alpha=3.0, rslora=True), 3 / 3),
        (NoLA(rank=4, alpha=6.0), 6 / 4),
        (VeRA(rank=30, alpha=5.0), 5 / 30),
    ):
        assert adapted_one(adapter)[1].scaling == scaling
    shape = WeightShape("fc2", 768, 3072)
    assert [each.count(shape) for each in (LoRA(rank=32), NoLA(), VeRA(rank=256))] == [32 * 3840, 2048, 768 + 256]
