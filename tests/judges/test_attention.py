"""Plain ``nn.MultiheadAttention`` with W + delta written in by hand judges updates of packed attention."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from randlora_pl.adapters import trainable_parameters
from tests.adapters import reference
from tests.adapters.cases import KINDS, METHODS, UNFIXED, WHOLE, SelfAttention, assert_close, inputs, trained
from tests.support.products import covered

ATTENTION = [kind for kind in KINDS if kind.startswith("mha-")]
ADDING = [method for method in METHODS if method not in (*WHOLE, *UNFIXED)]


def by_hand(model: Any) -> SelfAttention:
    """A plain layer whose weights hold the updates, each entry from the formula."""
    plain = SelfAttention(12)
    own = plain.attn
    with torch.no_grad():
        for name in ("in_proj_bias", "out_proj.bias"):
            own.get_parameter(name).copy_(model.attn.get_parameter(name))
        for layer, weight in ((model.attn, own.in_proj_weight), (model.attn.out_proj, own.out_proj.weight)):
            frozen = layer.in_proj_weight if layer is model.attn else layer.weight
            delta = getattr(layer, "delta", None)
            weight.copy_(frozen if delta is None else reference.adapted_weight(delta, frozen))
    return plain


@covered(("method", "kind"), ADDING, ATTENTION, strength=1)
def test_output_and_input_gradient(method: str, kind: str) -> None:
    _, model = trained(method, kind)
    plain, x = by_hand(model), inputs(model)
    found = []
    for each in (model, plain):
        entry = x.clone().requires_grad_()
        output: Tensor = each(entry)
        (gradient,) = torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), entry)
        found.append((output, gradient))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 2e-5)


@covered(("method", "kind"), ADDING, ATTENTION, strength=1)
def test_parameter_gradients(method: str, kind: str) -> None:
    """Through autograd of a plain layer that is called with W0 + delta as its weights."""
    base, model = trained(method, kind, torch.float64)
    module: Any = model
    values = list(trainable_parameters(model).values())
    x = inputs(model, dtype=torch.float64)

    def call() -> Tensor:
        weights = {}
        for name, layer in (("attn.in_proj_weight", module.attn), ("attn.out_proj.weight", module.attn.out_proj)):
            if isinstance(getattr(layer, "delta", None), nn.Module):
                frozen = layer.in_proj_weight if layer is module.attn else layer.weight
                weights[name] = layer.delta.effective_weight(frozen)
        output: Tensor = functional_call(base, weights, (x,))
        return output

    gradients = [torch.autograd.grad(output.square().sum(), values) for output in (model(x), call())]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, 1e-9)
