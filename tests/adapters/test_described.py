"""Adapters inside adapters: every option that takes an adapter, or a list of them, works everywhere."""

import json
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, DoRA, LoRA, RandLoRA, inject, load_adapter, save_adapter
from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.random_bases import Bases, WeightShape
from randlora_pl.adapters.save_load import make_adapter
from randlora_pl.adapters.select import count_parameters, match_budget
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.own_classes import METHODS, path_of
from tests.adapters.cases import One, randomise
from tests.support.products import in_one_item


class Sum(Adapter):
    """The sum of the updates of several methods without bases."""

    parts: list[Adapter] = field(default_factory=list, kw_only=False)
    last: Adapter = field(default_factory=lambda: LoRA(rank=1), kw_only=False)

    def count(self, shape: WeightShape) -> int:
        return sum(part.count(shape) for part in (*self.parts, self.last))

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "SumDelta":
        return SumDelta([part.delta_weight(shape, weight, bases) for part in (*self.parts, self.last)])


class SumDelta(DeltaWeight):
    def __init__(self, parts: list[DeltaWeight]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def change(self, weight: Tensor) -> Tensor:
        return torch.stack([part.change(weight) for part in self.parts]).sum(0)  # type: ignore[operator]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Sum`` is a method like the others."""
    monkeypatch.setitem(METHODS._classes, path_of(Sum), Sum)


NESTED = Sum([LoRA(rank={"fc": 2}, alpha=3.0), DoRA(LoRA(rank=3))], RandLoRA(rank=5, memory="low"))


def test_annotations_say_which_options_take_adapters() -> None:
    assert Sum.nested_options() == ["parts", "last"]
    assert DoRA.nested_options() == ["inner"]
    assert LoRA.nested_options() == []
    assert [each.method() for each in NESTED.leaves()] == ["LoRA", "LoRA", "RandLoRA"]
    assert repr(Sum([LoRA(rank=2)])).startswith("Sum(parts=[LoRA(rank=2, alpha=1.0")


def test_descriptions_make_the_same_adapter_again() -> None:
    described = json.loads(json.dumps(NESTED.describe()))
    assert described["options"]["parts"][1]["options"]["inner"]["options"]["rank"] == 3
    again = make_adapter(described["method"], described["options"], "a file")
    assert again.describe() == NESTED.describe()
    assert again.identity() == NESTED.identity() == Sum(NESTED.parts, RandLoRA(rank=5, memory="fast")).identity()
    assert again.identity() != NESTED.replace(last=RandLoRA(rank=6)).identity()


@in_one_item(
    ("options", "message"),
    [
        ({"parts": [{"method": "Evil", "options": {}}]}, "method 'Evil' is unknown"),
        ({"parts": [{"method": "LoRA", "options": {"rnk": 1}}]}, "LoRA does not take these options"),
        ({"parts": [7]}, "7 describes nothing that this version has"),
        ({"last": None}, "None describes nothing that this version has"),
    ],
)
def test_other_descriptions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_adapter(path_of(Sum), options, "a file")


def test_patterns_are_checked_at_any_depth() -> None:
    for adapter in (Sum([LoRA(rank=2), LoRA(alpha={"fd": 2.0}, rank=2)]), Sum([DoRA(LoRA(rank=2, alpha={"fd": 2.0}))])):
        with pytest.raises(UserError, match="LoRA: alpha pattern 'fd' matches none of the 1 adapted layers"):
            inject(One(12, 20), adapter)


def test_the_part_with_match_gets_the_rest_of_the_budget() -> None:
    shapes = [WeightShape("fc", 20, 12)]
    chosen, notes = match_budget(Sum([LoRA(rank=2), DoRA(LoRA(match="lora:10"))], LoRA(rank=1)), shapes, One(12, 20))
    assert [each.rank for each in chosen.leaves()] == [2, 6, 1]
    assert count_parameters(chosen, shapes) == 9 * 32 + 20
    assert notes == ["matched to lora:10: rank 6 has 308 parameters, lora:10 320 (-3.7 %)"]
    with pytest.raises(UserError, match="LoRA and RandLoRA have match"):
        match_budget(Sum([LoRA(match="lora:2"), RandLoRA(match="lora:2")]), shapes, One(12, 20))


def test_files_keep_the_parts(tmp_path: Path) -> None:
    model, again, x = One(12, 20), One(12, 20), torch.randn(3, 12)
    again.load_state_dict(model.state_dict())
    inject(model, Sum([LoRA(rank=2), LoRA(rank=3)]))
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(x), model(x))
