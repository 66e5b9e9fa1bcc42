"""The contract of every method on every kind of layer: an item runs all checks of one method."""

import itertools

import pytest
import torch

from randlora_pl.adapters import make_optimizer, merge, trainable_parameters
from tests.adapters.cases import KINDS, METHODS, WHOLE, assert_close, base_and_adapted, inputs, trained
from tests.adapters.contract import CHECKS
from tests.support.products import in_one_item, marked


def by_default(pair: tuple[str, str]) -> bool:
    """Return True for an eighth of the product, in which each method meets a plain layer and another one."""
    return (list(METHODS).index(pair[0]) + list(KINDS).index(pair[1])) % 8 == 0


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
    ("randlora", "conv2d"),
]


@pytest.mark.parametrize(("method", "kind"), marked(COMPILED, lambda row: COMPILED.index(row) % 8 == 1))
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


DECAYS = ("full", "galore", "fira", "nola-official")
"""Methods whose published decay moves the model: of the pretrained weights, or of two factors that are not zero."""


@in_one_item("method", ["nola-official", *WHOLE[:-1]])  # the probe trains nothing
def test_decay_alone_changes_no_model(method: str) -> None:
    """Of all other methods the contract says it: a factor may shrink, because the other one is zero."""
    _, model = base_and_adapted(method, "linear-in<out")
    x = inputs(model)
    before = model(x)
    optimizer = make_optimizer(model, lr=2.56e-2, weight_decay=0.1)
    for each in trainable_parameters(model).values():
        each.grad = torch.zeros_like(each)
    for _ in range(20):
        optimizer.step()
    assert torch.equal(model(x), before) == (method not in DECAYS)
