"""The contract of every method on every kind of layer: an item runs all checks of one method."""

import itertools

import pytest
import torch

from randlora_pl.adapters import merge, trainable_parameters
from tests.adapters.cases import KINDS, METHODS, assert_close, inputs, trained
from tests.adapters.contract import CHECKS
from tests.support.products import marked


def by_default(pair: tuple[str, str]) -> bool:
    """Return True for a sixth of the product, in which each method meets a plain layer and one of attention."""
    return (list(METHODS).index(pair[0]) + list(KINDS).index(pair[1])) % 6 == 0


@pytest.mark.parametrize(("method", "rest"), marked(itertools.product(METHODS, (False, True)), lambda row: not row[1]))
def test_contract(method: str, rest: bool, subtests: pytest.Subtests) -> None:
    for kind in KINDS:
        if by_default((method, kind)) != rest:
            with subtests.test(kind):
                for check in CHECKS[method]:
                    torch.manual_seed(0)
                    check(method, kind)


COMPILED = [
    *[
        (method, "linear-in>out")
        for method in ("randlora-a", "lora", "vera", "nola", "dora", "hira", "oft", "pissa", "loraxs", "hydralora")
    ],
    *[("randlora", kind) for kind in ("linear-in<out", "mha-packed", "mha-split", "mha-out_proj", "timm-packed")],
    *[(method, "linear-in<out") for method in ("pranc", "pranc-dense", "svft", "hydralora")],
    *[(method, "linear-in<out") for method in ("kradapter", "shira")],
    ("adalora", "linear-in<out"),
    ("autolora", "linear-in<out"),
    ("autolora-bases", "linear-in>out"),
    ("dora-randlora", "timm-split"),
    ("together", "mha-packed"),
]


@pytest.mark.parametrize(("method", "kind"), marked(COMPILED, lambda row: COMPILED.index(row) % 4 == 1))
def test_compiles_without_a_graph_break(method: str, kind: str) -> None:
    _, model = trained(method, kind)
    x = inputs(model)
    values = list(trainable_parameters(model).values())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = [run(x) for run in (compiled, model)]
    assert_close(*outputs)
    gradients = [torch.autograd.grad(output.square().mean(), values) for output in outputs]
    for first, second in zip(*gradients, strict=True):
        assert_close(first, second)
    merge(model, strict=False)
    assert_close(compiled(x), outputs[1])
