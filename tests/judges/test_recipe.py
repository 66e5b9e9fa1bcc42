"""PEFT's random bases from its seed alone, bit for bit, and its RandLoRA's slices written out by hand."""

from typing import Any

import pytest
import torch
from peft import RandLoraConfig, VeraConfig, get_peft_model
from torch import nn

from randlora_pl.adapters.methods.peft_bases import draw_peft_randlora, draw_peft_vera
from randlora_pl.adapters.random_bases import WeightShape
from tests.support.products import covering

# Tall, wide, square, several at once; ranks that divide the smaller side and that do not, and one above it.
LAYERS = [
    ({"a": (8, 20)}, 4),
    ({"a": (20, 8)}, 3),
    ({"a": (9, 9)}, 2),
    ({"a": (6, 24), "b": (24, 6), "c": (10, 10)}, 5),
]
LAYERS += [({"a": (4, 12)}, 6)]
KINDS = [{}, {"sparse": True}, {"very_sparse": True}, {"sparse": True, "very_sparse": True}]


def adapted(layers: dict[str, tuple[int, int]], config: Any) -> tuple[Any, list[WeightShape]]:
    model = nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in layers.items()})
    config.target_modules = set(layers)
    return get_peft_model(model, config), [WeightShape(name, o, i) for name, (i, o) in layers.items()]  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "case", "key"), covering(KINDS, LAYERS, [0, 7], strength=1))
def test_randlora(kind: dict[str, bool], case: tuple[dict[str, tuple[int, int]], int], key: int) -> None:
    layers, rank = case
    peft, shapes = adapted(layers, RandLoraConfig(r=rank, projection_prng_key=key, **kind))
    a, b = draw_peft_randlora(key, rank, shapes, **kind)
    assert torch.equal(a, peft.base_model.randlora_A["default"].float())
    assert torch.equal(b, peft.base_model.randlora_B["default"].float())
    assert not torch.equal(a, draw_peft_randlora(key + 1, rank, shapes, **kind)[0])


@pytest.mark.parametrize(("layers", "rank"), LAYERS)
def test_randlora_where_there_is_no_bfloat16(
    layers: dict[str, tuple[int, int]], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.randlora.model.is_bf16_available", lambda: False)
    peft, shapes = adapted(layers, RandLoraConfig(r=rank))
    a, b = draw_peft_randlora(0, rank, shapes, dtype=torch.float16)
    assert torch.equal(a, peft.base_model.randlora_A["default"].float())
    assert torch.equal(b, peft.base_model.randlora_B["default"].float())


def test_the_two_dtypes_have_nothing_in_common_at_the_size_of_real_layers() -> None:
    shapes = [WeightShape("a", 256, 256)]
    for one, other in zip(
        *(draw_peft_randlora(0, 4, shapes, dtype=t) for t in (torch.bfloat16, torch.float16)), strict=True
    ):
        assert (one - other).abs().max() > 1


@pytest.mark.parametrize(("case", "key"), covering(LAYERS, [0, 7], strength=1))
def test_vera(case: tuple[dict[str, tuple[int, int]], int], key: int) -> None:
    layers, rank = case
    peft, shapes = adapted(layers, VeraConfig(r=rank, projection_prng_key=key))
    a, b = draw_peft_vera(key, rank, shapes)
    assert torch.equal(a, peft.base_model.vera_A["default"])
    assert torch.equal(b, peft.base_model.vera_B["default"])
