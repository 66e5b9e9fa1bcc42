"""KRAdapter: its start, its rank and its backward pass; the formula is tested by the contract."""

import math

import pytest
import torch

from randlora_pl.adapters import KRAdapter
from randlora_pl.adapters.methods.kradapter import KRAdapterDelta
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.adapters.select import match_budget
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One, adapted_one, randomise
from tests.support.products import in_one_item

SHAPES = [(64, 64), (64, 100), (100, 64), (16, 4096), (1, 7), (7, 1), (3, 3), (48, 49)]


def update(out_features: int, in_features: int, **options: float) -> KRAdapterDelta:
    model, delta = adapted_one(KRAdapter(**options), in_features, out_features, torch.float64)
    randomise(model, 1.0)
    return delta


@in_one_item(("out_features", "in_features"), SHAPES)
def test_the_update_has_full_rank_with_few_parameters(out_features: int, in_features: int) -> None:
    delta = update(out_features, in_features)
    assert torch.linalg.matrix_rank(delta.change(torch.empty(0))) == min(out_features, in_features)
    small, large = sorted((out_features, in_features))
    count = KRAdapter().count(WeightShape("fc", out_features, in_features))
    assert count == delta.U.numel() + delta.V.numel()
    assert delta.U.shape[1] * delta.V.shape[1] >= large
    assert delta.V.shape[1] - 1 < max(delta.U.shape[1], large / delta.U.shape[1])
    assert delta.U.shape == (small, math.isqrt(small))


def test_the_start_is_the_official_one() -> None:
    _, delta = adapted_one(KRAdapter(seed=3), 600, 300)
    assert not delta.change(torch.empty(0)).any()
    assert delta.V.shape == (300, 36) and delta.U.shape == (300, 17)
    bound = math.sqrt(6 / (26 * 36))  # kaiming_uniform_(V, a=5)
    assert 0.99 * bound < delta.V.abs().max() <= bound
    assert delta.V.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_there_is_nothing_to_match() -> None:
    with pytest.raises(UserError, match="KRAdapter has no rank to match to lora:2"):
        match_budget(KRAdapter(match="lora:2"), [WeightShape("fc", 20, 12)], One(12, 20))
