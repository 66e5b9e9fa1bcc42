"""What adapters share: options, patterns, dropout and dtypes."""

import itertools
import json
from dataclasses import field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from randlora_pl.adapters import OFT, Adapter, BitFit, DoRA, LoRA, LoRAXS, NoLA, RandLoRA, Together, VeRA, base, inject
from randlora_pl.adapters.base import DeltaWeight, FactoredDelta, Rank, builds
from randlora_pl.adapters.kernels.common import dropped
from randlora_pl.adapters.random_bases import WeightShape, matches, trainable
from randlora_pl.adapters.save_load import make_adapter
from randlora_pl.adapters.select import count_parameters, match_budget
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import (
    METHODS,
    WHOLE,
    One,
    adapted_one,
    adapter_of,
    assert_close,
    large_tensors_kept,
    randomise,
)
from tests.support.products import in_one_item

SHAPE = WeightShape("visual.blocks.3.mlp.fc1", 12, 8)


class Own(LoRA):
    """Options whose defaults are no attributes of the class."""

    size: Rank
    rank: Rank = field(default_factory=lambda: 7)


def test_patterns_fit_a_whole_name_or_all_of_it_behind_a_dot() -> None:
    fitting = ["fc1", "mlp.fc1", r"mlp\.fc\d", ".*mlp.*", "visual.blocks.3.mlp.fc1", "fc2|fc1"]
    assert [pattern for pattern in (*fitting, "fc", "c1", "mlp", "text.*") if matches(pattern, SHAPE.layer)] == fitting


def test_options_by_pattern_take_the_first_that_fits_or_the_default() -> None:
    adapter = RandLoRA()
    assert adapter.replace(rank=5).value("rank", SHAPE) == 5
    assert adapter.replace(rank={"attn.*": 2, ".*mlp.*": 4, "fc1": 8}).value("rank", SHAPE) == 4
    assert adapter.replace(rank={"attn.*": 2}).value("rank", SHAPE) == 6
    assert Own(size={"fc1": 3}, rank={"attn.*": 2}).value("rank", SHAPE) == 7
    with pytest.raises(UserError, match=rf"^Own: no pattern of size matches {SHAPE.layer}\.$"):
        Own(size={"attn.*": 2}).value("size", SHAPE)
    model = nn.ModuleDict({"one": nn.Linear(8, 12), "two": nn.Linear(12, 8)})
    report = inject(model, LoRA(rank={"one": 2, "two": 3}, alpha={"two": 6.0}), [".*"])
    assert [row.trainable for row in report.rows] == [2 * 20, 3 * 20]
    assert model["one"].delta.scaling == 1 / 2  # type: ignore[union-attr]
    assert model["two"].delta.scaling == 6 / 3  # type: ignore[union-attr]


@in_one_item("method", METHODS)
def test_a_description_makes_the_same_adapter_again(method: str) -> None:
    adapter = adapter_of(method, "linear-square")
    description = adapter.describe()
    assert description["method"] == type(adapter).__name__
    assert adapter.replace().describe() == description
    if method not in WHOLE:
        changed = adapter.replace(seed=5)
        assert (changed.key, adapter.key) == (5, 0)
        assert changed.describe() != description
        assert type(changed) is type(adapter)


def test_an_impossible_dropout_is_refused() -> None:
    for adapter, dropout in itertools.product((LoRA, VeRA, NoLA, RandLoRA), (-0.5, 1, 7)):
        with pytest.raises(UserError, match="from 0 to below 1"):
            adapter(dropout=dropout)


@in_one_item("adapter", [LoRA, VeRA, NoLA, RandLoRA])
@in_one_item("rank", [0, -3, 1.5, True, {"fc1": 0}])
def test_an_impossible_rank_leaves_the_model_as_it_was(adapter: type[LoRA], rank: Any) -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(8, 12)})
    with pytest.raises(UserError, match="positive"):
        inject(model, adapter(rank=rank), ["fc1"])
    assert type(model["fc1"]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


DROPPING: list[Adapter] = [
    RandLoRA(rank=4, dropout=0.4),
    RandLoRA(rank=4, variant="a", dropout=0.4),
    LoRA(rank=4, alpha=4.0, dropout=0.4),
    VeRA(rank=40, alpha=40.0, dropout=0.4),
    NoLA(rank=2, num_bases=8, dropout=0.4),
    DoRA(LoRA(rank=4, alpha=4.0, dropout=0.4)),
]


@pytest.mark.parametrize("adapter", DROPPING, ids=lambda adapter: adapter.method())
def test_dropout_acts_on_the_path_of_the_adapter_only(adapter: Adapter) -> None:
    model, _ = adapted_one(adapter)
    randomise(model)
    delta, weight, bias = model.fc.delta, model.fc.weight, model.fc.bias
    x = torch.randn(50, 12)
    torch.manual_seed(3)
    actual = model(x)
    torch.manual_seed(3)
    expected = F.linear(x, weight, bias) + F.linear(dropped(x, 0.4), delta.change(weight))
    assert_close(actual, expected)
    assert (actual - F.linear(x, delta.effective_weight(weight), bias)).abs().max() > 0.01
    model.eval()
    assert_close(model(x), F.linear(x, delta.effective_weight(weight), bias))


def test_trainable_tensors_are_float32_unless_the_model_is_float64() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight, expected = torch.zeros(2, dtype=dtype), torch.promote_types(dtype, torch.float32)
        assert trainable(weight, 3, 4).dtype == trainable(weight, 3, 4, fill=1.0).dtype == expected
        assert trainable(weight, 3, 4, fill=1.0).shape == (3, 4)


def test_abstract_methods_say_so() -> None:
    delta = DeltaWeight()
    with pytest.raises(UserError, match=r"^DeltaWeight does not define change\(weight\), the matrix that is added"):
        delta.change(torch.empty(0))
    delta.fixed = False
    with pytest.raises(UserError, match=r"^DeltaWeight does not define contribution\(x, weight\)"):
        delta.add(torch.empty(1, 2), torch.empty(3, 2), None)
    with pytest.raises(UserError, match=r"^FactoredDelta does not define factors\(\)"):
        FactoredDelta().change(torch.empty(0))
    with pytest.raises(TypeError, match="abstract methods count, delta_weight"):
        Adapter()  # type: ignore[abstract]
    assert LoRA().bases([SHAPE], torch.device("cpu")) is None


def test_methods_print_their_options_and_updates_their_tensors() -> None:
    assert repr(LoRA(rank=2, seed=5)).startswith("LoRA(rank=2, alpha=1.0, ")
    assert "seed=5" in repr(LoRA(rank=2, seed=5))
    assert repr(DoRA(LoRA(rank=2, seed=5))).count("LoRA(rank=2, ") == 1
    assert BitFit().options() == {}
    model, _ = adapted_one(RandLoRA(rank=4))
    assert "lambdas=(3, 4), gammas=(3, 12)" in repr(model)
    assert "A=(1, 4, 12), B=(20, 3, 4), fingerprint=" in repr(model)


# Factored updates


def test_thin_products_are_taken_where_they_cost_less() -> None:
    square, wide = torch.empty(768, 768, device="meta"), torch.empty(3072, 768, device="meta")
    for weight in (square, wide):
        assert not builds(3200, 32, weight, trains=True)  # LoRA
        assert builds(3200, 32, weight, trains=False)  # no gradient of the weight's size
        assert builds(3200, 256, weight, trains=True)  # VeRA
        assert not builds(100, 256, weight, trains=True)
        assert not builds(100, 256, weight, trains=False)


@in_one_item(
    "adapter",
    [LoRA(rank=12), NoLA(rank=12), RandLoRA(rank=12, variant="a"), VeRA(rank=60), LoRAXS(rank=12), OFT(block=4)],
)
def test_both_forms_of_a_factored_update_agree(adapter: Adapter) -> None:
    model, _ = adapted_one(adapter, dtype=torch.float64)
    randomise(model)
    delta: Any = model.fc.delta
    for tokens in (3, 500):  # of which many build the weight if they may
        x = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
        results = []
        for keep in (None, False):
            delta.keep = keep
            output = model(x)
            results.append((output, *torch.autograd.grad(output.square().sum(), [x, *delta.parameters()])))
        for first, second in zip(*results, strict=True):
            assert_close(first, second, 1e-10)


def test_a_layer_that_may_not_keep_its_weight_takes_the_thin_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model, delta = adapted_one(LoRA(rank=4), 40, 30)
    monkeypatch.setattr(base, "builds", lambda *_: True)
    for keep in (None, False):
        delta.keep = keep
        assert bool(large_tensors_kept(model)) == (keep is None)


# Adapters inside adapters, at any depth


PARTS = [LoRA(rank={"fc": 2}, alpha=3.0), DoRA(LoRA(rank=3))]
NESTED = Together([*PARTS, RandLoRA(rank=5, memory="low")])


def test_annotations_name_nested_options_and_descriptions_make_the_same_adapter_again() -> None:
    assert Together.nested_options() == ["parts"]
    assert DoRA.nested_options() == ["inner"]
    assert LoRA.nested_options() == []
    assert [each.method() for each in NESTED.leaves()] == ["LoRA", "LoRA", "RandLoRA"]
    assert repr(Together([LoRA(rank=2), LoRA()])).startswith("Together(parts=[LoRA(rank=2, alpha=1.0")
    described = json.loads(json.dumps(NESTED.describe()))
    assert described["options"]["parts"][1]["options"]["inner"]["options"]["rank"] == 3
    again = make_adapter(described["method"], described["options"], "a file")
    assert again.describe() == NESTED.describe()
    fast = Together([*PARTS, RandLoRA(rank=5, memory="fast")])  # which changes no update
    assert again.identity() == NESTED.identity() == fast.identity()
    assert again.identity() != Together([*PARTS, RandLoRA(rank=6, memory="low")]).identity()


@in_one_item(
    ("method", "options", "message"),
    [
        ("Together", {"parts": [{"method": "Evil", "options": {}}]}, "method 'Evil' is unknown"),
        ("Together", {"parts": [{"method": "LoRA", "options": {"rnk": 1}}]}, "LoRA does not accept these options"),
        ("Together", {"parts": [7]}, "7 describes nothing that this version has"),
        ("DoRA", {"inner": None}, "None describes nothing that this version has"),
    ],
)
def test_other_descriptions_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_adapter(method, options, "a file")


def test_patterns_are_checked_at_any_depth() -> None:
    wrong = LoRA(alpha={"fd": 2.0}, rank=2)
    for adapter in (Together([LoRA(rank=2), wrong]), Together([LoRA(rank=2), DoRA(wrong)])):
        with pytest.raises(UserError, match="LoRA: alpha pattern 'fd' matches none of the 1 adapted layers"):
            inject(One(12, 20), adapter)


def test_the_part_with_match_gets_the_rest_of_the_budget() -> None:
    shapes = [WeightShape("fc", 20, 12)]
    parts = [LoRA(rank=2), DoRA(LoRA(match="lora:10")), LoRA(rank=1)]
    chosen, notes = match_budget(Together(parts), shapes, One(12, 20))
    assert [each.rank for each in chosen.leaves()] == [2, 6, 1]
    assert count_parameters(chosen, shapes) == 9 * 32 + 20
    assert notes == ["matched to lora:10: rank 6 has 308 parameters, lora:10 320 (-3.7 %)"]
    with pytest.raises(UserError, match="LoRA and RandLoRA have match"):
        match_budget(Together([LoRA(match="lora:2"), RandLoRA(match="lora:2")]), shapes, One(12, 20))
