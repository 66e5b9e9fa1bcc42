"""Leading columns of RandLoRA, and a LoRA that they absorb."""

import itertools
from typing import Any

import pytest
import torch

from randlora_pl.adapters import LoRA, RandLoRA, delta_weights, inject, trainable_parameters
from randlora_pl.adapters.methods.randlora import LedRandLoRADelta
from randlora_pl.utils.errors import UserError
from tests.adapters import reference
from tests.adapters.cases import One, assert_close, inputs, randomise
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
        ({"lead": 7}, "lead is 7, but fc has 6 bases. Lower the rank of RandLoRA, or keep the LoRA beside"),
        ({"lead": -1}, "lead is -1"),
        ({"lead": 2, "variant": "a"}, "variant a sums its bases, so it has no leading terms. Set variant to full"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            inject(One(24, 24), RandLoRA(rank=4, **options), ["fc"])
