"""Methods that train the model's own tensors."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from randlora_pl.adapters import (
    Adapter,
    BitFit,
    FullFineTuning,
    GaLore,
    LinearProbe,
    LoRA,
    SHiRA,
    disabled,
    inject,
    load_adapter,
    make_optimizer,
    merge_and_unload,
    read_adapter,
    save_adapter,
    set_train_mode,
    trainable_parameters,
)
from randlora_pl.adapters.methods.full import projected_weights
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
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


# With targets

TARGETS = ["visual:qkv", "visual:fc1"]
PLACES = SHiRA(rank=24)  # 24 (96 + 32) is 96 x 32, in both layers


def stepped(adapter: Adapter, model: nn.Module) -> nn.Module:
    """Three steps of AdamW, which decays nothing: SHiRA's values start at 0, and weights do not."""
    inject(model, adapter, TARGETS)
    set_train_mode(model)
    optimizer = make_optimizer(model, lr=1e-2, eps=1e-4, weight_decay=0.0)
    images = torch.linspace(-2, 2, 2 * 3 * 16 * 16, dtype=torch.float64).sin().view(2, 3, 16, 16)
    for _ in range(3):
        optimizer.zero_grad()
        model.encode_image(images)[:, 0].square().sum().backward()  # type: ignore[operator]
        optimizer.step()
    return model


def test_with_targets_the_weights_that_an_adapter_would_add_to_train_alone(tmp_path: Path) -> None:
    """In a CLIP with packed attention: gradients, changes, file, and the same as SHiRA with every place."""
    start = zoo.small_clip(mlp_ratio=3.0).double()
    sites = {row.layer: row.shape for row in inject(copy.deepcopy(start), LoRA(rank=2), TARGETS).rows}
    model = stepped(FullFineTuning(), copy.deepcopy(start))
    weights = {f"{name}{'_weight' if name.endswith('in_proj') else '.weight'}": size for name, size in sites.items()}
    report = model.adapter_report
    assert {row.layer: row.shape for row in report.rows} == weights and len(weights) == 4  # type: ignore[union-attr]
    before, after = start.state_dict(), model.state_dict()
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == weights.keys()
    assert {name for name, each in model.named_parameters() if each.grad is not None} == weights.keys()
    assert not any(module.training for module in model.modules())  # what is frozen, as beside an adapter
    assert report.trainable == sum(a * b for a, b in weights.values())  # type: ignore[union-attr]
    shira = merge_and_unload(stepped(PLACES, copy.deepcopy(start))).state_dict()
    assert shira.keys() == after.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, shira[name], rtol=1e-9, atol=1e-12)
    file = read_adapter(save_adapter(model, tmp_path / "a"))
    assert file.tensors.keys() == weights.keys() and file.targets == TARGETS
    load_adapter(fresh := copy.deepcopy(start), tmp_path / "a")
    load_adapter(fresh, tmp_path / "a")  # where it is in place already
    assert all(torch.equal(value, after[name]) for name, value in fresh.state_dict().items())
    with pytest.raises(UserError, match=r"does not fit this model: .* different weights"):
        load_adapter(zoo.small_clip(mlp_ratio=3.0), tmp_path / "a")


def test_targets_of_full_fine_tuning_are_whole_weights() -> None:
    for targets, told in (
        (["nothing"], "matches no layer"),
        (["attn.q"], r"trains whole weights, and .*attn\.q is rows of one. Set qkv instead"),
        ([], "targets is empty"),
    ):
        with pytest.raises(UserError, match=told):
            inject(zoo.small_clip(), FullFineTuning(), targets)
    with pytest.raises(UserError, match="every layer of the targets is in trained"):
        inject(zoo.small_clip(), FullFineTuning(), TARGETS, trained=["visual"])


def test_galore_with_targets_projects_these() -> None:
    report = inject(model := zoo.small_clip(), GaLore(rank=2), TARGETS)
    assert projected_weights(model).keys() == trainable_parameters(model).keys() == {row.layer for row in report.rows}
