"""The optimizer of an adapted model: which of its tensors weight decay may move."""

import torch

from randlora_pl.adapters import make_optimizer, trainable_parameters
from tests.support.products import in_one_item

from .cases import METHODS, base_and_adapted, inputs

_DECAY = ("full", "galore", "fira", "nola-official")
"""Methods whose published decay moves the model: of the pretrained weights, or of two factors that are not zero."""


@in_one_item("method", [name for name in METHODS if name != "probe"])  # which trains nothing
def test_decay_alone_changes_no_model(method: str) -> None:
    """Factors that start away from zero may shrink, because the other factor is zero."""
    _, model = base_and_adapted(method, "linear-in<out")
    x = inputs(model)
    with torch.no_grad():
        before = model(x)
    optimizer = make_optimizer(model, lr=2.56e-2, weight_decay=0.1)
    for each in trainable_parameters(model).values():
        each.grad = torch.zeros_like(each)
    for _ in range(80):
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(model(x), before) == (method not in _DECAY)
