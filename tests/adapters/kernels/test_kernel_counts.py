"""Kernels of one adapted layer's step, chosen as on a GPU: each is a launch, by which small models are bound."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from randlora_pl.adapters import RandLoRA, inject
from randlora_pl.utils.device import choose_as_on_cuda
from tests.adapters.cases import randomise
from tests.support.products import in_one_item

ALLOCATE = {"empty", "new_empty", "empty_like", "_unsafe_view", "detach", "lift_fresh"}


class Kernels(TorchDispatchMode):
    """Counts operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ALLOCATE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def counts(sizes: tuple[int, int], micro_batches: int, **options: Any) -> list[tuple[int, int]]:
    """Kernels of the forward and of the backward pass of each micro-batch of the second step, under autocast."""
    layer = nn.Sequential(nn.Linear(*sizes)).requires_grad_(False).bfloat16()
    inject(layer, RandLoRA(rank=7, **options), [".*"])  # 133 columns
    randomise(layer, 0.1)
    optimizer = torch.optim.SGD((value for value in layer.parameters() if value.requires_grad), lr=0.1)
    inputs = list(layer[0].delta.parameters())  # type: ignore[union-attr, operator]
    result = []
    for step in range(2):
        for _ in range(micro_batches):
            x = torch.randn(2000, sizes[0], dtype=torch.bfloat16, requires_grad=True)
            with Kernels() as forward, torch.autocast("cpu", torch.bfloat16):
                output = layer(x)
            upper = torch.ones_like(output)
            with Kernels() as backward:
                torch.autograd.grad(output, [x, *inputs], upper)
            if step:
                result.append((len(forward.names), len(backward.names)))
                assert not {"item", "_local_scalar_dense", "nonzero"} & {*forward.names, *backward.names}
        optimizer.step()
    return result


@in_one_item(
    ("way", "options", "wide", "tall"),
    [
        # Forward and backward pass of the first micro-batch, and of the second. Without copies of B, turned blocks and
        # a kept S: dense 8 + 15, dropout 11 + 18, hadamard 21 + 40, or 31 + 30 if wider than tall. Of each build of
        # W0 + B S, five are the rounding of a bfloat16 sum.
        ("dense", {}, [(14, 8), (1, 8)], [(14, 8), (1, 8)]),
        ("low", {"memory": "low"}, [(14, 21), (14, 21)], [(14, 21), (14, 21)]),
        ("dropout", {"dropout": 0.1}, [(10, 12), (6, 12)], [(9, 13), (5, 13)]),
        ("ternary", {"basis": "ternary"}, [(14, 8), (1, 8)], [(14, 8), (1, 8)]),
        ("hadamard", {"basis": "hadamard"}, [(23, 11), (5, 11)], [(19, 15), (1, 15)]),
    ],
)
def test_a_layer_needs_few_kernels(
    way: str, options: dict[str, Any], wide: list[tuple[int, int]], tall: list[tuple[int, int]]
) -> None:
    with choose_as_on_cuda():
        for sizes, budget in (((128, 384), tall), ((384, 128), wide)):
            for found, most in zip(counts(sizes, 2, **options), budget, strict=True):
                assert found[0] <= most[0]
                assert found[1] <= most[1]
