"""What adapters share: options, patterns, dropout and dtypes."""

from dataclasses import field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, BitFit, DoRA, LoRA, NoLA, RandLoRA, VeRA, base, inject
from randlora_pl.adapters.base import DeltaWeight, FactoredDelta, Rank, builds
from randlora_pl.adapters.kernels.common import dropped
from randlora_pl.adapters.random_bases import WeightShape, matches, trainable
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import METHODS, WHOLE, One, adapter_of, assert_close, randomise
from tests.support.products import in_one_item

SHAPE = WeightShape("visual.blocks.3.mlp.fc1", 12, 8)


class Own(LoRA):
    """Options whose defaults are no attributes of the class."""

    size: Rank
    rank: Rank = field(default_factory=lambda: 7)


def test_sides_of_a_weight() -> None:
    assert (SHAPE.large, SHAPE.small) == (12, 8)
    turned = WeightShape("x", 8, 12)
    assert (turned.large, turned.small) == (12, 8)


@in_one_item(
    ("pattern", "fits"),
    [
        ("fc1", True),
        ("mlp.fc1", True),
        (r"mlp\.fc\d", True),
        (r".*mlp.*", True),
        (r"visual.blocks.3.mlp.fc1", True),
        ("fc", False),
        ("c1", False),
        ("mlp", False),
        ("fc2|fc1", True),
        ("text.*", False),
    ],
)
def test_patterns_fit_a_whole_name_or_all_of_it_behind_a_dot(pattern: str, fits: bool) -> None:
    assert matches(pattern, SHAPE.layer) is fits


def test_options_by_pattern_take_the_first_that_fits_or_the_default() -> None:
    adapter = RandLoRA()
    assert adapter.replace(rank=5).value("rank", SHAPE) == 5
    assert adapter.replace(rank={"attn.*": 2, ".*mlp.*": 4, "fc1": 8}).value("rank", SHAPE) == 4
    assert adapter.replace(rank={"attn.*": 2}).value("rank", SHAPE) == 6
    assert Own(size={"fc1": 3}, rank={"attn.*": 2}).value("rank", SHAPE) == 7
    with pytest.raises(UserError, match=rf"^Own: no pattern of size matches {SHAPE.layer}\.$"):
        Own(size={"attn.*": 2}).value("size", SHAPE)


def test_rank_and_alpha_by_pattern_reach_the_layers() -> None:
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


def test_methods_print_their_options() -> None:
    assert repr(LoRA(rank=2, seed=5)).startswith("LoRA(rank=2, alpha=1.0, ")
    assert repr(DoRA(LoRA(rank=2, seed=5))).count("LoRA(rank=2, ") == 1
    assert "seed=5" in repr(LoRA(rank=2, seed=5))


@in_one_item("adapter", [LoRA, VeRA, NoLA, RandLoRA])
@in_one_item("dropout", [-0.5, 1, 7])
def test_an_impossible_dropout_is_refused(adapter: type[LoRA], dropout: float) -> None:
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


@pytest.mark.parametrize("adapter", [LoRA, NoLA, RandLoRA])
def test_a_rank_above_the_smaller_side_is_refused_but_for_vera(adapter: type[LoRA]) -> None:
    with pytest.raises(UserError, match="smaller"):
        inject(One(8, 12), adapter(rank=9), ["fc"])
    assert inject(One(8, 12), VeRA(rank=9), ["fc"]).trainable == 12 + 9


DROPPING: list[Adapter] = [
    RandLoRA(rank=4, dropout=0.4),
    RandLoRA(rank=4, variant="a", dropout=0.4),
    LoRA(rank=4, alpha=4.0, dropout=0.4),
    VeRA(rank=40, alpha=40.0, dropout=0.4),
    NoLA(rank=2, num_bases=8, dropout=0.4),
]


@pytest.mark.parametrize("adapter", DROPPING, ids=lambda adapter: adapter.method())
def test_dropout_acts_on_the_path_of_the_adapter_only(adapter: Adapter) -> None:
    model = One(12, 20)
    inject(model, adapter, ["fc"])
    randomise(model)
    delta, weight, bias = model.fc.delta, model.fc.weight, model.fc.bias
    assert isinstance(delta, DeltaWeight)
    x = torch.randn(50, 12)
    torch.manual_seed(3)
    actual = model(x)
    torch.manual_seed(3)
    expected = F.linear(x, weight, bias) + F.linear(dropped(x, 0.4), delta.change(torch.empty(0)))
    assert_close(actual, expected)
    assert (actual - F.linear(x, delta.effective_weight(weight), bias)).abs().max() > 0.01
    model.eval()
    assert_close(model(x), F.linear(x, delta.effective_weight(weight), bias))


def test_dropout_inside_dora_leaves_the_frozen_path_alone() -> None:
    model = One(12, 20)
    inject(model, DoRA(LoRA(rank=4, alpha=4.0, dropout=0.4)), ["fc"])
    randomise(model)
    delta, weight = model.fc.delta, model.fc.weight
    x = torch.randn(50, 12)
    torch.manual_seed(3)
    actual = model(x)
    torch.manual_seed(3)
    inner = delta.inner.change(torch.empty(0))  # type: ignore[union-attr,operator]
    scale = delta.magnitude / (weight + inner).norm(dim=1)  # type: ignore[union-attr,operator]
    change = (weight + inner) * scale[:, None] - weight
    expected = F.linear(x, weight, model.fc.bias) + F.linear(dropped(x, 0.4), change)
    assert_close(actual, expected)
    model.eval()
    assert_close(model(x), F.linear(x, delta.effective_weight(weight), model.fc.bias))  # type: ignore[union-attr,operator]
    assert_close(
        delta.train().add(x, weight, None).mean(0),  # type: ignore[union-attr,operator]
        F.linear(x, delta.effective_weight(weight)).mean(0),  # type: ignore[union-attr,operator]
        1.0,
    )


@pytest.mark.parametrize(
    ("of", "expected"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_trainable_tensors_are_float32_unless_the_model_is_float64(of: torch.dtype, expected: torch.dtype) -> None:
    weight = torch.zeros(2, dtype=of)
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


def test_updates_print_their_tensors() -> None:
    model = One(12, 20)
    inject(model, RandLoRA(rank=4), ["fc"])
    assert "lambdas=(3, 4), gammas=(3, 12)" in repr(model)
    assert "A=(1, 4, 12), B=(20, 3, 4), fingerprint=" in repr(model)
    assert BitFit().options() == {}


# Factored updates


def test_thin_products_are_taken_where_they_cost_less() -> None:
    square, wide = torch.empty(768, 768, device="meta"), torch.empty(3072, 768, device="meta")
    for weight in (square, wide):
        assert not builds(3200, 32, weight, trains=True)  # LoRA
        assert builds(3200, 32, weight, trains=False)  # no gradient of the weight's size
        assert builds(3200, 256, weight, trains=True)  # VeRA
        assert not builds(100, 256, weight, trains=True)
        assert not builds(100, 256, weight, trains=False)


@pytest.mark.parametrize("method", ["lora", "vera", "nola", "randlora-a"])
def test_both_forms_of_a_factored_update_agree(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = One(12, 20)
    inject(model, adapter_of(method, "linear-in<out"), ["fc"])
    randomise(model)
    x = torch.randn(9, 12, requires_grad=True)
    values = [x, *model.fc.delta.parameters()]  # type: ignore[union-attr]
    results = []
    for built in (True, False):
        monkeypatch.setattr(base, "builds", lambda *_, built=built: built)
        results.append((model(x), *torch.autograd.grad(model(x).square().sum(), values)))
    for first, second in zip(*results, strict=True):
        assert_close(first, second)


def test_a_layer_that_may_not_keep_its_weight_takes_the_thin_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model = One(12, 20)
    inject(model, adapter_of("lora", "linear-in<out"), ["fc"])
    monkeypatch.setattr(base, "builds", lambda *_: True)
    frozen = model.fc.weight.data_ptr()
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)  # type: ignore[func-returns-value]
    for keep in (None, False):
        model.fc.delta.keep = keep  # type: ignore[union-attr, assignment]
        saved.clear()
        with hooks:
            model(torch.randn(9, 12, requires_grad=True))
        large = [t for t in saved if t.numel() == 12 * 20 and t.data_ptr() != frozen]
        assert bool(large) == (keep is None)
