"""LoRA+: B of LoRA and its relatives trains at a multiple of A's learning rate, and nothing else changes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import (
    Adapter,
    DoRA,
    HiRA,
    HydraLoRA,
    LoRA,
    PiSSA,
    RandLoRA,
    Together,
    inject,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from randlora_pl.adapters.base import Part
from randlora_pl.adapters.operations import parameter_groups, rates_of
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One, SelfAttention, randomise
from tests.support.products import in_one_item

RATE, RATIO = 1e-2, 16.0
ADAPTERS: dict[str, Adapter] = {
    "lora": LoRA(rank=3, rate_ratio=RATIO),
    "lora that starts with A at zero": LoRA(rank=3, init="official", rate_ratio=RATIO),
    "lora of q, k and v": LoRA(rank=3, qkv="split", rate_ratio=RATIO),
    "dora": DoRA(LoRA(rank=3, rate_ratio=RATIO)),
    "a part of a sum": Together([LoRA(rank=3, rate_ratio=RATIO), RandLoRA(rank=4)]),
    "pissa": PiSSA(rank=3, rate_ratio=RATIO),
    "hira": HiRA(rank=3, rate_ratio=RATIO),
    "hydralora": HydraLoRA(rank=3, heads=2, rate_ratio=RATIO),
}


def adapted(adapter: Adapter) -> nn.Module:
    """A model with an update that is not zero, and gradients of every trained tensor."""
    torch.manual_seed(0)
    model: nn.Module = SelfAttention(12) if adapter.qkv == "split" else One(12, 20)
    inject(model, adapter, ["qkv"] if adapter.qkv == "split" else None)
    randomise(model)
    model(torch.randn(2, 5, 12)).square().mean().backward()
    return model


@in_one_item("name", ADAPTERS)
def test_a_step_of_sgd_moves_b_by_the_ratio(name: str) -> None:
    model = adapted(ADAPTERS[name])
    trained = trainable_parameters(model)
    before: dict[str, Tensor] = {each: value.detach().clone() for each, value in trained.items()}
    torch.optim.SGD(parameter_groups(model, RATE)).step()
    larger = [each for each in trained if each.endswith(".B")]
    assert 0 < len(larger) < len(trained)
    for each, value in trained.items():
        assert value.grad is not None and value.grad.any()
        rate = RATE * RATIO if each in larger else RATE
        torch.testing.assert_close(value.detach(), before[each] - rate * value.grad, rtol=1e-6, atol=1e-7)


def test_a_ratio_of_one_is_a_run_without_the_option() -> None:
    for usual, plain in ((LoRA(rank=3, rate_ratio=1), LoRA(rank=3)), (HiRA(rank=3, rate_ratio=1.0), HiRA(rank=3))):
        assert usual.describe() == plain.describe() and rates_of(adapted(usual)) == {}
        groups, others = parameter_groups(adapted(usual), RATE), parameter_groups(adapted(plain), RATE)
        assert len(groups) == len(others) == 1 and str(groups) == str(others)  # all values of all tensors


def test_the_ratio_affects_training_alone(tmp_path: Path) -> None:
    adapter = LoRA(rank=3, alpha=2.0, rate_ratio=RATIO)
    assert adapter.identity() == LoRA(rank=3, alpha=2.0).identity() != adapter.describe()
    assert DoRA(adapter).identity() == DoRA(LoRA(rank=3, alpha=2.0)).identity()
    for one, other in ((PiSSA(rate_ratio=2), PiSSA()), (HydraLoRA(rate_ratio=2), HydraLoRA())):
        assert one.identity() == other.identity()
    model, again = adapted(adapter), One(12, 20)
    torch.manual_seed(0)
    again.load_state_dict(One(12, 20).state_dict())
    save_adapter(model, tmp_path / "adapter")
    assert load_adapter(again, tmp_path / "adapter").adapter.describe() == adapter.describe()
    assert torch.equal(again(torch.ones(3, 12)), model(torch.ones(3, 12)))
    part = Part(WeightShape("fc", 20, 12), "fc", None, False, {"A": torch.ones(3, 12), "B": torch.ones(20, 3)})
    assert str(adapter.to_peft([part], None)) == str(LoRA(rank=3, alpha=2.0).to_peft([part], None))


def test_ratios_that_are_refused() -> None:
    with pytest.raises(UserError, match=r"PiSSA: B is frozen with start minor, .* Remove rate_ratio"):
        PiSSA(start="minor", rate_ratio=16)
    assert PiSSA(start="minor", rate_ratio=1).rate_ratio == 1
    for ratio in (0, -2, float("nan"), "16"):
        with pytest.raises(UserError, match=r"rate_ratio is .* Set a positive number"):
            LoRA(rate_ratio=ratio)  # type: ignore[arg-type]
