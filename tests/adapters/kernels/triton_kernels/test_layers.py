"""Layers with the kernels in the interpreter compute what they compute with PyTorch's operators."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from randlora_pl.adapters import RandLoRA, inject, trainable_parameters
from randlora_pl.utils import device
from tests.adapters.cases import One
from tests.support.products import in_one_item

pytest.importorskip("triton")


class Operators(TorchDispatchMode):
    """Names of the operators of this project that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("randlora::"):
            self.names.add(name.removeprefix("randlora::").removeprefix("hadamard_").removeprefix("ternary_"))
        return func(*args, **(kwargs or {}))


def computed(
    sides: tuple[int, int], tokens: int, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[set[str], list[Tensor]]:
    """Operators, output and gradients of one layer."""
    torch.manual_seed(0)
    layer = One(*sides)
    layer.fc.weight.data.normal_()
    layer.to(dtype)
    inject(layer, RandLoRA(rank=3, **options), ["fc"])
    for value in trainable_parameters(layer).values():
        nn.init.normal_(value, std=0.05)  # S times tokens stays in float16's range
    x = torch.randn(2, tokens // 2, sides[0], dtype=dtype, requires_grad=True)
    with Operators() as found:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.float16 if dtype == torch.float16 else torch.bfloat16, dtype != torch.float32):
            output = layer(x)
        (64 * output.float().square().mean()).backward()
    gradients = [value.grad for value in trainable_parameters(layer).values()]
    return found.names, [output, x.grad, *gradients]  # type: ignore[list-item]


BUILT, THIN = {"build_weight", "reduce_stack"}, {"form_stack", "reduce_stack"}
MIXED = {"mix", "expand", "unmix", "reduce_stack"}
ROWS = [
    ((24, 40), 64, BUILT, {}),
    ((40, 24), 64, BUILT, {"pairing": "peft"}),
    ((24, 40), 2, THIN, {"pairing": "peft"}),
    ((40, 24), 64, THIN, {"dropout": 0.5}),
    ((16, 40), 64, BUILT, {"basis": "ternary"}),
    ((40, 24), 2, {*THIN, "project"}, {"basis": "ternary"}),
    ((24, 40), 64, MIXED, {"basis": "hadamard"}),
    ((40, 24), 64, MIXED, {"basis": "hadamard", "pairing": "peft", "a_basis": "signs"}),
    ((40, 24), 64, {*MIXED, "project"} - {"expand"}, {"basis": "hadamard", "dropout": 0.5}),
    ((24, 40), 64, {*MIXED, "project"}, {"basis": "hadamard", "dropout": 0.5}),
]


@pytest.mark.slow
@in_one_item(("sides", "tokens", "expected", "options"), ROWS)
def test_layers_compute_the_same_with_kernels(
    sides: tuple[int, int], tokens: int, expected: set[str], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)):
        monkeypatch.setattr(device, "VALUE", "0")
        none, plain = computed(sides, tokens, dtype, options)
        monkeypatch.setattr(device, "VALUE", "1")
        names, made = computed(sides, tokens, dtype, options)
        assert not none and (expected <= names or dtype == torch.float16), names
        for one, other in zip(made, plain, strict=True):
            error = (one.float() - other.float()).abs().max() / other.float().abs().max()
            assert one.dtype == other.dtype and error < tolerance, (dtype, error)


def test_built_weights_in_bfloat16_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded by the thresholds of `rounding`, but for sums in another order."""
    for basis in ("uniform", "hadamard"):
        for sides in ((24, 40), (40, 24)):
            layer = One(*sides).bfloat16()
            inject(layer, RandLoRA(rank=3, basis=basis, alpha=1e-3), ["fc"])  # type: ignore[arg-type]
            for value in trainable_parameters(layer).values():
                nn.init.normal_(value)
            built = []
            for value in "01":
                monkeypatch.setattr(device, "VALUE", value)
                delta = layer.fc.delta.float()  # type: ignore[union-attr,operator]
                eye = torch.eye(sides[0], dtype=torch.bfloat16)
                built.append(delta.add(eye.repeat(9, 1), layer.fc.weight.data, None)[: sides[0]])
            assert (built[0] != built[1]).float().mean() < 0.02
            assert (built[0] != layer.fc.weight.T).float().mean() > 0.02
