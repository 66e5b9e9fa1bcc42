"""Learning rates of the paper, and numbers that are refused."""

from typing import Any

import pytest

from randlora_pl.adapters import (
    Adapter,
    DoRA,
    FullFineTuning,
    LoRA,
    NoLA,
    RandLoRA,
    Together,
    VeRA,
)
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item

from .small import make

# (method, both towers: Table 8, image tower alone: section C.3)
RATES: list[tuple[Adapter, float, float]] = [
    (FullFineTuning(), 1e-5, 1e-5),
    (LoRA(), 1e-3, 1e-2),
    (NoLA(), 1e-3, 1e-3),
    (VeRA(), 1e-2, 1e-2),
    (RandLoRA(), 1e-3, 1e-2),
    (DoRA(LoRA()), 1e-3, 1e-2),
    (DoRA(VeRA()), 1e-2, 1e-2),
    (Together(), 1e-3, 1e-2),
    (Together([VeRA(), NoLA()]), 1e-3, 1e-3),
]


@in_one_item(("adapter", "both", "image_only"), RATES)
def test_learning_rates_are_those_of_the_paper(adapter: Adapter, both: float, image_only: float) -> None:
    assert make("vision-language", adapter=adapter).learning_rate == both
    assert make("text head", adapter=adapter).learning_rate == image_only
    assert make("linear head", adapter=adapter).learning_rate == image_only


@in_one_item(
    ("option", "value"),
    [
        ("learning_rate", 0.0),
        ("weight_decay", -0.1),
        ("final_lr_fraction", 1.5),
    ],
)
def test_impossible_numbers_are_refused_by_name_and_value(option: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{option} is {value}\. Set .*number"):
        make("linear head", **{option: value})
