"""Learning rates of the paper, and numbers that are refused."""

from typing import Any

import pytest

from randlora_pl.adapters import (
    OFT,
    PRANC,
    SVFT,
    AdaLoRA,
    Adapter,
    AutoLoRA,
    BitFit,
    DoRA,
    Fira,
    FullFineTuning,
    GaLore,
    HiRA,
    KRAdapter,
    LinearProbe,
    LoRA,
    NoLA,
    RandLoRA,
    SHiRA,
    Together,
    VeRA,
)
from randlora_pl.tasks import LinearHeadTask
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
    (SVFT(pattern="plain", off_diagonals=9), 5e-2, 5e-2),
    (SVFT(pattern="banded", off_diagonals=3), 5e-3, 5e-3),
    (GaLore(), 3e-5, 3e-5),
    (Fira(), 1e-4, 1e-4),
    (PRANC(coefficients=100), 1e-3, 1e-3),
    (AutoLoRA(), 3e-4, 3e-4),
    (HiRA(), 4.5e-3, 4.5e-3),
    (OFT(), 1e-4, 1e-4),
    (KRAdapter(), 1e-3, 1e-3),
    (SHiRA(rank=2), 3e-4, 3e-4),
    (AdaLoRA(), 1e-3, 1e-3),
    (BitFit(), 1e-3, 1e-3),
    (LinearProbe(), 1e-3, 1e-3),
]


@in_one_item(("adapter", "both", "image_only"), RATES)
def test_learning_rates_are_those_of_the_paper(adapter: Adapter, both: float, image_only: float) -> None:
    assert make("vision-language", adapter=adapter).learning_rate == both
    assert make("text head", adapter=adapter).learning_rate == image_only
    assert make("linear head", adapter=adapter).learning_rate == image_only


def test_a_typed_learning_rate_wins() -> None:
    task = make("linear head", learning_rate=0.5, head_learning_rate=0.25)
    assert isinstance(task, LinearHeadTask)
    assert (task.learning_rate, task.head_learning_rate) == (0.5, 0.25)


@in_one_item(
    ("option", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("head_learning_rate", 0.0),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("final_lr_fraction", 1.5),
        ("final_lr_fraction", -0.1),
        ("max_grad_norm", -1.0),
    ],
)
def test_impossible_numbers_are_refused_by_name_and_value(option: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{option} is {value}\. Set .*number"):
        make("linear head", **{option: value})
