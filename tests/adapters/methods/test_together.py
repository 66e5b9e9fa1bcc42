"""Together: each part is what it is alone, with random tensors, a learning rate and a budget of its own."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from randlora_pl.adapters import (
    PRANC,
    AdaLoRA,
    Adapter,
    DoRA,
    HiRA,
    HydraLoRA,
    LoRA,
    LoRAXS,
    PiSSA,
    RandLoRA,
    Together,
    VeRA,
    delta_weights,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from randlora_pl.adapters.methods.adalora import Pruning
from randlora_pl.adapters.methods.nested import TogetherDelta
from randlora_pl.adapters.operations import parameter_groups
from randlora_pl.models import meta_clip
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One, assert_close, bases_of, randomise
from tests.support.products import in_one_item


def adapted(adapter: Adapter, base: nn.Module | None = None) -> Any:
    model = One(12, 20)
    model.load_state_dict((base or One(12, 20)).state_dict())
    inject(model, adapter)
    return model


def parts_of(model: Any) -> list[Any]:
    assert isinstance(model.fc.delta, TogetherDelta)
    return list(model.fc.delta.parts)


def test_parts_of_one_method_have_random_tensors_of_their_own(tmp_path: Path) -> None:
    for seed in (None, 5):
        first, second, given = parts_of(
            adapted(Together([LoRA(rank=4), LoRA(rank=4), LoRA(rank=4, seed=9)], seed=seed))
        )
        for one, other in combinations((first, second, given), 2):
            assert not torch.isin(one.A, other.A).any()
        assert torch.equal(first.A, adapted(LoRA(rank=4, seed=seed)).fc.delta.A)  # as a LoRA alone begins
        assert torch.equal(given.A, adapted(LoRA(rank=4, seed=9)).fc.delta.A)
    # Bases that the methods name alike: each of A and B is another one, also from a file.
    adapter = Together(
        [RandLoRA(rank=4), VeRA(rank=6), RandLoRA(rank=5), PRANC(coefficients=30, form="dense"), LoRA(rank=2)], seed=3
    )
    base = One(12, 20)
    model, again = adapted(adapter, base), One(12, 20)
    holders = bases_of(model)
    for one, other in combinations(holders, 2):
        assert not torch.isin(one.A, other.A).any() and not torch.isin(one.B, other.B).any()
    assert model.adapter_report.fingerprint == "".join(each.fingerprint for each in holders) and len(holders) == 3
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    again.load_state_dict(base.state_dict())
    file = load_adapter(again, tmp_path / "adapter")
    assert file.adapter.describe() == adapter.describe()
    assert torch.equal(again(torch.ones(3, 12)), model(torch.ones(3, 12)))


SUMS: dict[str, Callable[[], list[Adapter]]] = {
    "derived from W0": lambda: [PiSSA(rank=3), RandLoRA(rank=4), LoRAXS(rank=2, balance="both")],
    "two of one method": lambda: [RandLoRA(rank=4), RandLoRA(rank=6, basis="hadamard")],
    "not additive": lambda: [DoRA(LoRA(rank=3, alpha=3.0)), HiRA(rank=2), LoRA(rank=2, alpha=2.0)],
    "own dropout": lambda: [
        LoRA(rank=3, alpha=3.0, dropout=0.5),
        RandLoRA(rank=4, dropout=0.2),
        LoRA(rank=2, alpha=2.0),
    ],
}


@in_one_item("name", SUMS)
def test_the_update_is_the_sum_of_the_parts_updates(name: str) -> None:
    torch.manual_seed(0)
    model, x = adapted(Together(SUMS[name]())), torch.randn(7, 12)
    weight, delta = model.fc.base_weight, model.fc.delta
    plain = torch.nn.functional.linear(x, weight, model.fc.bias)
    assert_close(model(x), plain, 1e-6)
    randomise(model)
    total = sum((part.change(weight) for part in parts_of(model.eval())), torch.zeros(()))
    assert all(bool(part.change(weight).abs().max() > 1e-2) for part in parts_of(model))
    assert_close(delta_weights(model)["fc"], total)
    for outputs in (model(x), plain + delta.contribution(x, lambda: weight)):
        assert_close(outputs, plain + x @ total.T)
    if name == "own dropout":
        means = torch.stack([model.train()(x) for _ in range(1000)])
        assert not torch.equal(means[0], means[1])
        assert_close(means.mean(0), plain + x @ total.T, 0.15)
    merge(model)
    assert_close(torch.nn.functional.linear(x, model.fc.weight, model.fc.bias), plain + x @ total.T)


def test_other_methods_around_and_inside_a_sum() -> None:
    """HydraLoRA makes the sum depend on the input, AdaLoRA brings its procedure, and DoRA takes a sum as its update."""
    x = torch.randn(7, 12)
    model = adapted(Together([HydraLoRA(rank=3), RandLoRA(rank=4)]))
    randomise(model)
    parts = sum(part.contribution(x, lambda: model.fc.weight) for part in parts_of(model))
    assert_close(model(x), torch.nn.functional.linear(x, model.fc.weight, model.fc.bias) + parts)
    with pytest.raises(UserError, match="HydraLoRA: the update depends on the input"):
        model.fc.delta.change(torch.empty(0))
    report = inject(One(12, 20), Together([RandLoRA(rank=4), AdaLoRA(rank=3)]))
    assert isinstance(report.procedure, Pruning)
    outer = adapted(DoRA(Together([LoRA(rank=3), RandLoRA(rank=4)])))
    randomise(outer)
    assert_close(outer.fc.delta.effective_weight(outer.fc.weight).norm(dim=1), outer.fc.delta.magnitude.abs())
    assert Together().replace(seed=4).describe() == DoRA(Together()).replace(seed=4).inner.describe()


def test_rates_budgets_and_products() -> None:
    model = adapted(Together([LoRA(rank=3), RandLoRA(rank=4)], rates=[10, 0.5]))
    first, second = parts_of(model)
    groups = {id(each): group["lr"] for group in parameter_groups(model, 1e-3) for each in group["params"]}
    rates = [(first.A, 1e-2), (first.B, 1e-2), (second.lambdas, 5e-4), (second.gammas, 5e-4)]
    assert {id(each): pytest.approx(rate) for each, rate in rates} == groups
    assert Together(rates=[1, 2]).identity() == Together().identity() != Together(seed=1).identity()

    # At the budget of LoRA-32 on CLIP ViT-B/32, RandLoRA has the rest (methods of 6.9 million parameters).
    for adapter in (Together(), Together([LoRA(rank=8), RandLoRA(match="lora:32")])):
        report = inject(meta_clip("ViT-B-32"), adapter)
        assert report.trainable == 6_890_640 and report.adapter.parts[1].rank == 6

    # Beside RandLoRA's products there are LoRA's two thin ones alone: no matrix of LoRA's is built.
    def flops(adapter: Adapter, train: bool) -> int:
        layer, x = nn.Sequential(nn.Linear(96, 160)), torch.randn(400, 96, requires_grad=train)
        inject(layer, adapter, ["0"])
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
            output = layer(x)
            output.sum().backward() if train else None
        return counter.get_total_flops()

    for train, passes in ((False, 1), (True, 3)):
        for order in ([LoRA(rank=4), RandLoRA(rank=6)], [RandLoRA(rank=6), LoRA(rank=4)]):
            more = flops(Together(order), train) - flops(RandLoRA(rank=6), train)
            assert more == 2 * passes * 400 * 4 * (96 + 160)


@in_one_item(
    ("parts", "message"),
    [
        ([LoRA(match="lora:2"), VeRA(match="lora:2")], "LoRA and VeRA have match"),
        (
            [LoRA(rank=9), VeRA(match="lora:2")],
            r"no rank of VeRA in Together comes near lora:2 .* is nearest\. .* or make the other parts smaller\.",
        ),
    ],
)
def test_budgets_that_are_refused(parts: list[Adapter], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inject(One(12, 20), Together(parts))
