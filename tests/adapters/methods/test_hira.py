"""HiRA: full rank from a small one, the start, what the backward pass keeps, and DoRA around it."""

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import DoRA, HiRA, delta_weights, inject
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One, assert_close, randomise
from tests.adapters.layers.test_quantized import pair


def test_a_small_rank_gives_full_rank_and_zeros_stay_zero() -> None:
    model = One(24, 24)
    with torch.no_grad():
        model.fc.weight[3, 5:9] = 0
    report = inject(model, HiRA(rank=2, seed=3), ["fc"])
    assert report.trainable == HiRA(rank=2).count(WeightShape("fc", 24, 24)) == 2 * 48
    delta = model.fc.delta
    assert isinstance(delta, nn.Module) and delta.A.abs().max() <= 24**-0.5  # type: ignore[operator, union-attr]
    randomise(model)
    update = delta_weights(model)["fc"]
    assert torch.linalg.matrix_rank(update) == 24
    assert not update[3, 5:9].any() and update[3, 9:].all()
    with pytest.raises(UserError, match="rank 25 is larger than the smaller side 24 of fc"):
        inject(One(24, 24), HiRA(rank=25), ["fc"])


def large_tensors_kept(model: One) -> int:
    """How many tensors of the weight's size, besides the weight, a training pass keeps."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.extend([tensor] * (tensor.data_ptr() != model.fc.weight.data_ptr() and tensor.numel() == 40 * 30))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randn(3, 40, requires_grad=True))
    output.sum().backward()
    return len(kept)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_matrix_of_the_weight_s_size_is_kept(dropout: float) -> None:
    """Beside a plain frozen weight, and beside a packed one, which is unpacked again."""
    for model in pair(40, 30):
        before = large_tensors_kept(model)  # of a packed layer's own forward
        inject(model, HiRA(rank=2, dropout=dropout), ["fc"])
        randomise(model)
        assert large_tensors_kept(model.train()) == before


def test_dora_scales_the_rows_of_the_changed_weight() -> None:
    model = One(12, 20)
    inject(model, DoRA(HiRA(rank=3)), ["fc"])
    weight = model.fc.weight.detach().clone()
    assert not delta_weights(model)["fc"].any()
    randomise(model)
    delta = model.fc.delta
    changed = weight + weight * (delta.inner.B @ delta.inner.A)  # type: ignore[operator, union-attr]
    expected = delta.magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)  # type: ignore[index, union-attr]
    x = torch.randn(4, 12)
    assert_close(model(x), x @ expected.T + model.fc.bias, 1e-5)
