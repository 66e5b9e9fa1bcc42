"""NoLA: both starts, rank, and sharing; its formula is tested by the contract."""

from typing import Any

import pytest
import torch
from torch import nn

from randlora_pl.adapters import NoLA, delta_weights, inject
from randlora_pl.adapters.methods.nola import NoLADelta
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One, randomise


def adapted(in_features: int, out_features: int, **options: Any) -> tuple[One, NoLADelta]:
    model = One(in_features, out_features).double()
    inject(model, NoLA(**options), ["fc"])
    assert isinstance(model.fc.delta, NoLADelta)
    return model, model.fc.delta


@pytest.mark.parametrize(("init", "beta"), [("zero", 0.0), ("official", 1 / 64)])
def test_the_start(init: Any, beta: float) -> None:
    model, delta = adapted(12, 20, num_bases=64, init=init)
    assert torch.equal(delta.alphas, torch.full((64,), 1 / 64).double())
    assert torch.equal(delta.betas, torch.full((64,), beta).double())
    assert bool(delta_weights(model)["fc"].any()) == (init == "official")


@pytest.mark.parametrize("rank", [1, 3])
def test_the_update_has_the_rank_of_its_factors(rank: int) -> None:
    model, _ = adapted(12, 20, rank=rank, num_bases=50)
    randomise(model)
    assert torch.linalg.matrix_rank(delta_weights(model)["fc"]) == rank


def test_alpha_over_rank_scales_the_update() -> None:
    assert adapted(12, 20, rank=4, alpha=6.0)[1].scaling == 6.0 / 4


def test_layers_share_one_set_of_factors() -> None:
    model = nn.ModuleDict({"tall": nn.Linear(6, 10), "wide": nn.Linear(30, 8)})
    report = inject(model, NoLA(rank=2, num_bases=5), [".*"])
    tall = model["tall"].delta
    assert isinstance(tall, NoLADelta)
    assert tall.bases is model["wide"].delta.bases  # type: ignore[union-attr]
    assert tall.bases.A.shape == (5, 2, 30)
    assert tall.bases.B.shape == (10, 5, 2)
    assert report.trainable == 2 * 2 * 5


def test_count_and_errors() -> None:
    assert NoLA().count(WeightShape("fc2", 768, 3072)) == 2048
    with pytest.raises(UserError, match="num_bases"):
        NoLA(num_bases=0)
    with pytest.raises(UserError, match="'ones'"):
        NoLA(init="ones")  # type: ignore[arg-type]
