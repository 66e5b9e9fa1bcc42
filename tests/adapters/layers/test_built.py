"""Convolutions with an update, against F.conv2d with W0 + delta, and what they refuse."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn

from randlora_pl.adapters import (
    Adapter,
    AdapterSet,
    DoRA,
    LoRA,
    NoLA,
    RandLoRA,
    VeRA,
    adapted_layers,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    set_train_mode,
)
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import randomise
from tests.adapters.reference import adapted_weight

SHAPES: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "dilated": {"kernel_size": (3, 1), "dilation": (2, 1), "padding": "same"},
    "depthwise": {"kernel_size": 3, "groups": 8, "bias": False},
    "strided groups": {"kernel_size": 3, "stride": (2, 1), "groups": 4, "padding": 1, "padding_mode": "reflect"},
}


def layer_of(model: nn.Module) -> Any:
    return next(iter(adapted_layers(model).values()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "adapter",
    [RandLoRA(rank=4), DoRA(LoRA(rank=4, alpha=4.0)), VeRA(rank=9), NoLA(rank=2, num_bases=5)],
    ids=lambda a: a.method(),
)
def test_a_convolution_with_the_reference_update(shape: str, adapter: Adapter) -> None:
    plain = nn.Conv2d(8, 16, **SHAPES[shape])
    model, x = copy.deepcopy(plain), torch.randn(2, 8, 9, 7)
    report = inject(model, adapter, [".*"])
    assert report.rows[0].shape == tuple(plain.weight.flatten(1).shape) and report.rows[0].kind == "conv"
    randomise(model)
    layer = layer_of(model)
    with torch.no_grad():
        plain.weight.copy_(adapted_weight(layer.delta, plain.weight.flatten(1)).view_as(plain.weight))
    torch.testing.assert_close(model(x), plain(x))
    merge_and_unload(model)
    torch.testing.assert_close(model.weight, plain.weight)


def test_dropout_is_of_the_input_of_the_update_alone() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, bias=False))
    inject(model, LoRA(rank=4, dropout=0.5), ["0"])
    randomise(model)
    layer, x = layer_of(model), torch.randn(1, 8, 400, 40)
    change = layer.swap_layout(layer.delta.change(torch.empty(0)))
    assert torch.equal(model.eval()(x), F.conv2d(x, layer.weight + change, padding=1))
    set_train_mode(model)
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)
    left = layer.delta.dropped(x)
    expected = F.conv2d(x, layer.weight, padding=1) + F.conv2d(left, change, padding=1)
    torch.testing.assert_close(found, expected)
    assert 0.45 < (left == 0).float().mean() < 0.55


def test_each_part_of_a_sum_drops_by_itself(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(8, 6, 3))
    for name, adapter in {"a": LoRA(rank=4, dropout=0.5), "b": DoRA(LoRA(rank=4, dropout=0.5))}.items():
        model = copy.deepcopy(base)
        inject(model, adapter, ["0"])
        randomise(model)
        save_adapter(model, tmp_path / name)
    adapters, x = AdapterSet(base), torch.randn(2, 8, 20, 20)
    for name in "ab":
        adapters.load(name, tmp_path / name)
    adapters.use({"a": 0.5, "b": 0.5})
    expected = base(x)
    set_train_mode(base)
    first = base(x)
    assert not torch.equal(first, base(x))
    torch.testing.assert_close(torch.stack([base(x) for _ in range(300)]).mean(0), expected, atol=0.35, rtol=0)


@pytest.mark.parametrize("kind", [Conv2dSame, StdConv2d])
def test_a_subclass_computes_with_the_built_weight(kind: Any, tmp_path: Path) -> None:
    plain = nn.Sequential(kind(8, 6, kernel_size=3, stride=2))
    model, x = copy.deepcopy(plain), torch.randn(2, 8, 9, 9)
    with pytest.raises(UserError, match="forward"):
        inject(model, LoRA(rank=4, dropout=0.1), ["0"])
    inject(model, RandLoRA(rank=4), ["0"])
    assert torch.equal(model(x), plain(x))
    randomise(model)
    layer, expected = layer_of(model), model(x)
    save_adapter(model, tmp_path / "a")
    load_adapter(again := copy.deepcopy(plain), tmp_path / "a")
    assert torch.equal(again(x), expected)
    with torch.no_grad():
        plain[0].weight.copy_(layer.swap_layout(adapted_weight(layer.delta, layer.base_weight)))
    torch.testing.assert_close(expected, plain(x))
    merge(model)
    assert torch.equal(model(x), expected)
    assert type(merge_and_unload(model)[0]) is kind  # type: ignore[index]


def test_a_weight_in_channels_last_is_adapted() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x: Tensor = torch.randn(2, 8, 5, 5)
    inject(model, RandLoRA(rank=4), ["0"])
    randomise(model)
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected)
