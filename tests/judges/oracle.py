"""PEFT as an outside judge: one linear layer, adapted by PEFT and by us, with the same random tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, delta_weights, inject
from randlora_pl.adapters.base import DeltaWeight
from tests.adapters.cases import One, assert_close

# in < out, in > out, square, and a rank of 5 that divides neither side.
SHAPES = [(12, 20, 4), (20, 12, 4), (16, 16, 4), (12, 22, 5), (23, 12, 5), (13, 13, 5)]


@dataclass
class Pair:
    """The same frozen layer under PEFT and under us, and which trainable tensors belong together."""

    theirs: nn.Module
    ours: One
    their_layer: Any
    tensors: dict[str, tuple[nn.Parameter, nn.Parameter, bool]]  # theirs, ours, whether one is the transpose

    @property
    def delta(self) -> Any:
        assert isinstance(self.ours.fc.delta, DeltaWeight)
        return self.ours.fc.delta

    @torch.no_grad()
    def share(self, std: float = 0.3) -> None:
        """Random values for every trainable tensor of both."""
        for theirs, ours, turned in self.tensors.values():
            values = std * torch.randn_like(ours) + (ours if ours.dim() == 1 else 0)
            ours.copy_(values)
            theirs.copy_(values.T if turned else values)


def adapt_both(in_features: int, out_features: int, config: PeftConfig, adapter: Adapter) -> tuple[nn.Module, One]:
    """Two copies of a random layer, one with PEFT's adapter and one with ours."""
    ours = One(in_features, out_features)
    base = One(in_features, out_features)
    base.load_state_dict(ours.state_dict())
    inject(ours, adapter, ["fc"])
    return get_peft_model(base, config), ours


def check(pair: Pair) -> None:
    """Update, output, and every gradient agree."""
    pair.share()
    x = torch.randn(7, 3, pair.ours.features)
    results: list[tuple[Tensor, ...]] = []
    for model, index in ((pair.theirs, 0), (pair.ours, 1)):
        entry = x.clone().requires_grad_()
        output = model(entry)
        values = [entry, *(tensors[index] for tensors in pair.tensors.values())]
        gradients = torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), values)
        results.append((output, *gradients))
    turned = [False, False, *(turned for *_, turned in pair.tensors.values())]
    for theirs, ours, flip in zip(*results, turned, strict=True):
        assert_close(ours.T if flip else ours, theirs, 1e-5)


def check_delta(pair: Pair) -> None:
    """The updates agree as matrices."""
    pair.share()
    theirs = pair.their_layer.get_delta_weight("default").detach()
    assert_close(delta_weights(pair.ours)["fc"], theirs, 1e-5)
    assert theirs.abs().max() > 0.01
