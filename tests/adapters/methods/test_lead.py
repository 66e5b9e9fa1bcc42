"""Leading columns of RandLoRA, a LoRA that they absorb, and stages that start where a LoRA has ended."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from randlora_pl.adapters import (
    LoRA,
    RandLoRA,
    Together,
    delta_weights,
    inject,
    load_adapter,
    refine,
    save_adapter,
    trainable_parameters,
)
from randlora_pl.adapters.methods.randlora import LedRandLoRADelta
from randlora_pl.utils.errors import UserError
from tests.adapters import reference
from tests.adapters.cases import KINDS, One, assert_close, inputs, randomise
from tests.support.products import in_one_item

OPTIONS: list[dict[str, Any]] = [
    {},
    {"basis": "hadamard"},
    {"basis": "ternary", "sparsity": 3, "a_basis": "same"},  # A has zeros
    {"init": "lambda", "pairing": "peft", "basis": "normal"},
    {"variant": "b", "memory": "low"},
]


@in_one_item(("sides", "options"), itertools.product([(12, 40), (40, 12), (24, 24)], OPTIONS))
def test_absorbs_a_lora_exactly_and_trains_to_full_rank(sides: tuple[int, int], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain, lora, model = (One(*sides).double() for _ in range(3))
    for other in (lora, model):
        other.load_state_dict(plain.state_dict())
    inject(lora, LoRA(rank=2, alpha=3.0), ["fc"])
    randomise(lora, 0.5)
    report = inject(model, RandLoRA(rank=4, lead=2, **options), ["fc"])
    assert report.trainable == inject(plain, RandLoRA(rank=4, **options), ["fc"]).trainable
    delta: Any = model.fc.delta
    assert isinstance(delta, LedRandLoRADelta) and not delta.change(torch.empty(0)).any()
    delta.absorb(*lora.fc.delta.factors())  # type: ignore[operator, union-attr]
    assert_close(delta_weights(model)["fc"], delta_weights(lora)["fc"], 1e-12)
    x = inputs(model, dtype=torch.float64)
    assert_close(model(x), lora(x), 1e-12)
    assert torch.equal(delta.lambdas[:2], torch.eye(4)[[0, 0]].double())

    model(x).square().mean().backward()
    assert all(bool(each.grad.any()) for each in (delta.lambdas, delta.gammas))
    assert bool(delta.lambdas.grad[:2].all())  # of the absorbed bases, also where lambda is zero
    if options.get("init") != "lambda":
        assert bool(delta.gammas.grad.all(1).all())
    randomise(model, 0.1)
    weight = torch.zeros_like(model.fc.weight)
    assert_close(delta_weights(model)["fc"], reference.adapted_weight(delta, weight), 1e-12)
    full = min(*sides, delta.lambdas.numel())
    if options.get("a_basis") != "same":
        assert torch.linalg.matrix_rank(delta_weights(model)["fc"]) == full


def test_lead_by_pattern_and_impossible_leads() -> None:
    model = torch.nn.ModuleDict({"one": One(8, 8), "two": One(8, 8)})
    inject(model, RandLoRA(rank=2, lead={"one.fc": 3}), ["fc"])
    assert model["one"].fc.delta.lead.shape == (8, 3)  # type: ignore[union-attr]
    assert set(trainable_parameters(model["two"])) == {"fc.delta.lambdas", "fc.delta.gammas"}
    assert not isinstance(model["two"].fc.delta, LedRandLoRADelta)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lead": 7}, "lead is 7, but fc has 6 bases. Lower the rank of RandLoRA, or keep the LoRA as it is"),
        ({"lead": -1}, "lead is -1"),
        ({"lead": 2, "variant": "a"}, "variant a sums its bases, so it has no leading terms. Set variant to full"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            inject(One(24, 24), RandLoRA(rank=4, **options), ["fc"])


# Stages that start where a LoRA has ended


@in_one_item(("kind", "form"), zip(KINDS, itertools.cycle(("beside", "absorbed"))))
def test_starts_with_the_outputs_of_the_lora_on_every_kind_of_layer(kind: str, form: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = KINDS[kind]
    base = case.build()
    model, other, plain = (case.build() for _ in range(3))
    for each in (model, other, plain):
        each.load_state_dict(base.state_dict())
    inject(base, LoRA(rank={".*": 2}, alpha=4.0, rslora=True, qkv=case.qkv), case.targets)
    randomise(base)
    x = inputs(base)
    save_adapter(base, tmp_path / "lora")
    adapter = RandLoRA(rank=3, qkv=case.qkv, seed=4)
    report = refine(model, tmp_path / "lora", adapter, form)
    assert_close(model(x), base(x), 1e-6)
    assert (model(x) - plain(x)).abs().max() > 1e-2
    alone = inject(plain, adapter, case.targets).trainable
    assert report.trainable == alone + (base.adapter_report.trainable if form == "beside" else 0)  # type: ignore[union-attr, operator]
    randomise(model)
    save_adapter(model, tmp_path / "next")
    load_adapter(other, tmp_path / "next")
    assert torch.equal(other(x), model(x))


def test_ranks_by_layer_and_what_does_not_fit(tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"one": torch.nn.Linear(8, 8), "two": torch.nn.Linear(8, 8)})

    base = make()
    inject(base, LoRA(rank={"one": 1, "two": 3}, alpha=4.0), ["one", "two"])
    randomise(base)
    save_adapter(base, tmp_path / "lora")
    model = make()
    report = refine(model, tmp_path / "lora", RandLoRA(rank=2), "absorbed")
    assert model["one"].delta.lead.shape == (8, 1) and model["two"].delta.lead.shape == (8, 3)
    assert report.adapter.lead == {"^one": 1, "^two": 3}  # type: ignore[attr-defined]
    x = torch.randn(5, 8)
    assert_close(model["two"](x), base["two"](x), 1e-6)

    both = Together([LoRA(rank={"one": 1, "two": 3}, alpha=4.0, rate_ratio=4), RandLoRA(rank=2)], rates=[0.1, 1])
    report = refine(rated := make(), tmp_path / "lora", both)
    assert report.adapter is both
    assert_close(rated["two"](x), base["two"](x), 1e-6)
    whole = make()
    inject(whole, LoRA(rank=1), ["one"], trained=["two"])
    save_adapter(whole, tmp_path / "whole")
    inject(hira := make(), RandLoRA(rank=2), ["one"])
    save_adapter(hira, tmp_path / "randlora")
    other = Together([LoRA(rank=4), RandLoRA(rank=2)])
    for lora, adapter, form, message in (
        ("lora", other, "beside", "rank 4, not .*3.* and alpha 1.0, not 4.0, as"),
        ("whole", RandLoRA(rank=2), "beside", "also changes the model's own two"),
        ("randlora", RandLoRA(rank=2), "beside", "is RandLoRA, and a stage can only start from LoRA"),
        ("lora", LoRA(rank=2), "absorbed", "LoRA cannot absorb a LoRA"),
        ("lora", RandLoRA(rank=2), "absorb", "form is 'absorb': choose beside or absorbed"),
        ("lora", RandLoRA(rank=4), "absorbed", "lead is 3, but two has 2 bases"),
    ):
        with pytest.raises(UserError, match=message):
            refine(make(), tmp_path / lora, adapter, form)  # type: ignore[arg-type]
    changed = make()
    torch.nn.init.zeros_(changed["two"].weight)
    with pytest.raises(UserError, match=r"trained on different weights .* Remove --model.name"):
        refine(changed, tmp_path / "lora", RandLoRA(rank=2))
