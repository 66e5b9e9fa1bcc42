"""Methods that train the model's own tensors."""

import pytest
import torch
from torch import nn

from randlora_pl.adapters import Adapter, BitFit, FullFineTuning, LinearProbe, disabled, inject, trainable_parameters
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import SelfAttention, assert_close


def block() -> nn.Module:
    return nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (FullFineTuning(), {name for name, _ in block().named_parameters()}),
        (
            BitFit(),
            {"self_attn.in_proj_bias", "self_attn.out_proj.bias", "linear1.bias", "linear2.bias"}
            | {"norm1.bias", "norm2.bias"},
        ),
        (LinearProbe(), set()),
    ],
    ids=lambda value: value.method() if isinstance(value, Adapter) else "",
)
def test_what_trains(adapter: Adapter, expected: set[str]) -> None:
    model = block()
    report = inject(model, adapter)
    assert set(trainable_parameters(model)) == expected == {row.layer for row in report.rows}
    assert report.trainable == sum(value.numel() for value in trainable_parameters(model).values())
    assert {row.kind for row in report.rows} <= {"tensor"}
    assert adapter.describe() == {"method": type(adapter).__name__, "options": {}}


def test_frozen_tensors_train_again_and_a_shared_one_counts_once() -> None:
    model = block()
    model.requires_grad_(False)
    assert inject(model, FullFineTuning()).trainable == sum(value.numel() for value in model.parameters())
    model = nn.ModuleDict({"one": nn.Linear(6, 6), "two": nn.Linear(6, 6)})
    model["two"].weight = model["one"].weight
    report = inject(model, FullFineTuning())
    assert report.trainable == sum(row.trainable for row in report.rows) == 36 + 12


def test_there_is_no_base_to_go_back_to_but_for_the_probe() -> None:
    for adapter in (BitFit(), FullFineTuning()):
        model = SelfAttention(12)
        inject(model, adapter)
        with pytest.raises(UserError, match="no base model is left, so disabling the update is"), disabled(model):
            pass
    model = SelfAttention(12)
    x = torch.randn(2, 3, 12)
    expected = model(x)
    inject(model, LinearProbe())
    with disabled(model):
        assert_close(model(x), expected, 1e-6)
