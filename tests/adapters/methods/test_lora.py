"""LoRA: its start and its scaling; PEFT judges the formula."""

import math

import pytest
import torch
from torch import nn

from randlora_pl.adapters import LoRA, inject
from randlora_pl.adapters.methods.lora import LoRADelta
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One


def test_the_start_is_kaiming_uniform_and_zero() -> None:
    model = One(300, 200)
    inject(model, LoRA(rank=50), ["fc"])
    delta = model.fc.delta
    assert isinstance(delta, LoRADelta)
    assert not delta.B.any()
    bound = 1 / math.sqrt(300)
    assert delta.A.abs().max() <= bound
    assert delta.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_the_start_of_the_papers_code() -> None:
    """The zero factor is on the input side and the bound is 1 / sqrt(r out); packed attention has both exchanged."""
    model = nn.ModuleDict({"fc": nn.Linear(300, 200), "attn": nn.MultiheadAttention(120, 2)})
    inject(model, LoRA(rank=50, init="official"), ["fc", "attn.in_proj"])
    plain, packed = model.fc.delta, model.attn.delta
    assert isinstance(plain, LoRADelta) and isinstance(packed, LoRADelta)
    assert not plain.A.any() and not packed.B.any()
    for random, bound in ((plain.B, 1 / math.sqrt(50 * 200)), (packed.A, 1 / math.sqrt(50 * 120))):
        assert random.abs().max() <= bound
        assert random.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    alone = nn.MultiheadAttention(120, 2)  # its layer is called in_proj
    inject(alone, LoRA(rank=50, init="official"), ["in_proj"])
    assert not alone.delta.B.any() and alone.delta.A.any()  # type: ignore[union-attr,operator]
    model.fc(torch.randn(3, 300)).square().sum().backward()  # type: ignore[operator]
    assert plain.A.grad is not None and plain.A.grad.any() and plain.B.grad is not None and not plain.B.grad.any()
    with pytest.raises(UserError, match=r"init is 'zero'. Set kaiming or official"):
        LoRA(init="zero")  # type: ignore[arg-type]


def test_the_start_depends_on_seed_and_layer_name_alone() -> None:
    def start(seed: int, **sizes: int) -> dict[str, torch.Tensor]:
        model = nn.ModuleDict({name: nn.Linear(8, size) for name, size in sizes.items()})
        inject(model, LoRA(rank=2, seed=seed), [".*"])
        return {name: layer.delta.A.detach() for name, layer in model.items()}  # type: ignore[union-attr,operator,misc]

    both, alone = start(0, one=8, two=8), start(0, two=20)
    assert torch.equal(both["two"], alone["two"])
    assert not torch.equal(both["one"], both["two"])
    assert not torch.equal(start(1, two=8)["two"], both["two"])


@pytest.mark.parametrize(("rslora", "expected"), [(False, 3.0 / 9), (True, 3.0 / 3)])
def test_scaling(rslora: bool, expected: float) -> None:
    model = One(20, 12)
    inject(model, LoRA(rank=9, alpha=3.0, rslora=rslora), ["fc"])
    assert model.fc.delta.scaling == expected  # type: ignore[union-attr]


def test_count() -> None:
    assert LoRA(rank=32).count(WeightShape("qkv", 2304, 768)) == 32 * (2304 + 768)
