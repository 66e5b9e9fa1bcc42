"""Configs that PEFT never writes, and what a comparison says where float64 decides."""

import json
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.adapters import LoRA
from randlora_pl.adapters.base import PeftContent
from randlora_pl.interop.peft.export import Difference
from randlora_pl.interop.peft.files import PeftAdapter
from randlora_pl.interop.peft.import_ import check_config
from randlora_pl.utils.errors import UserError


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": -1},
        {"rank_pattern": {"a": 0}},
        {"rank_pattern": {"a": True}},
        {"rank_pattern": {"(": 2}},
        {"rank_pattern": {"a": 10**400}},
        {"alpha_pattern": "x"},
        {"alpha_pattern": {"[": 1.0}},
        {"modules_to_save": "["},
        {"modules_to_save": [1]},
        {"target_modules": 3},
        {"target_parameters": {}},
        {"r": True},
        {"r": "4"},
    ],
)
def test_nonsense_in_a_config(change: dict[str, Any]) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "rank_pattern": {}}
    assert check_config(PeftAdapter(config, {}, path=Path("peft"))) is LoRA
    with pytest.raises(UserError, match=f"peft: .*{next(iter(change))}|regular expression"):
        check_config(PeftAdapter(json.loads(json.dumps(config | change)), {}, path=Path("peft")))


@pytest.mark.parametrize("value", [10**400, "x", "nan", [1]])
def test_numbers_that_are_none(value: Any) -> None:
    with pytest.raises(UserError, match="lora_alpha"):
        PeftContent("peft", {"lora_alpha": value}, {}, {}, {}).number("lora_alpha", 8.0)


def test_a_comparison_says_which_difference_counts() -> None:
    assert "float64" not in Difference(1e-7, 0.5, 1.0).summary()
    words = Difference(1.7, 0.5, 1.0, exact=1.6e-9).summary()
    assert words.startswith("1.6e-09 in float64") and "1.7e+00 in float32" in words
