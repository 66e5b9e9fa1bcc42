"""Merging, unloading, disabling and modes of whole models; layers themselves are tested by the contract."""

import copy

import pytest
import torch
from torch import nn

from randlora_pl.adapters import (
    BitFit,
    DoRA,
    FullFineTuning,
    LinearProbe,
    LoRA,
    RandLoRA,
    adapted_layers,
    delta_weights,
    disabled,
    inject,
    merge,
    set_train_mode,
    trainable_parameters,
    unload,
    unmerge,
)
from randlora_pl.adapters.control import report_of
from randlora_pl.errors import UserError
from tests.adapters import zoo
from tests.adapters.cases import assert_close, randomise


def adapted_vit() -> nn.Module:
    model = zoo.small_vit()
    inject(model, RandLoRA(4, qkv="split"))
    randomise(model)
    return model


def test_a_plain_model_has_no_report_and_nothing_to_do() -> None:
    model = zoo.small_vit()
    for call in (report_of, lambda m: disabled(m).__enter__(), set_train_mode):
        with pytest.raises(UserError, match="the model has no adapter; inject"):
            call(model)
    before = copy.deepcopy(model.state_dict())
    merge(model)
    unmerge(model)
    assert unload(model) is model
    assert delta_weights(model) == {} == adapted_layers(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_report_is_found_until_the_adapter_is_unloaded() -> None:
    model = zoo.small_vit()
    report = inject(model, LoRA(2))
    assert report_of(model) is report
    unload(model)
    with pytest.raises(UserError, match="no adapter"):
        report_of(model)


def test_updates_are_the_same_merged_or_not() -> None:
    model = adapted_vit()
    before = delta_weights(model)
    merge(model)
    after = delta_weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not delta.requires_grad for delta in after.values())


def test_an_error_in_a_disabled_block_enables_the_adapter_again() -> None:
    model = adapted_vit()
    x = zoo.images()
    expected = model(x)
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), expected)


def test_merging_inside_a_disabled_block_takes_effect_behind_it() -> None:
    model = adapted_vit()
    x = zoo.images()
    expected = model(x)
    with disabled(model):
        base = model(x)
        merge(model)
        assert_close(model(x), base)
    assert_close(model(x), expected)
    unmerge(model)
    assert torch.equal(model(x), expected)


def test_gradients_do_not_flow_while_merged_or_disabled() -> None:
    model = adapted_vit()
    merge(model)
    assert not model(zoo.images()).requires_grad
    unmerge(model)
    with disabled(model):
        assert not model(zoo.images()).requires_grad
    assert model(zoo.images()).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("change", [merge, unload])
def test_an_update_that_is_not_finite_is_never_merged(bad: float, change: object) -> None:
    model = adapted_vit()
    last = list(adapted_layers(model))[-1]
    merged_before = adapted_layers(model)["blocks.0.mlp.fc1"]
    merged_before.merge()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        next(adapted_layers(model)[last].delta.parameters())[0] = bad  # type: ignore[union-attr]
    with pytest.raises(
        UserError, match=rf"the weight of {last} with its update is not finite .* lower the learning rate"
    ):
        change(model)  # type: ignore[operator]
    own = set(trainable_parameters(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name not in own)
    assert [layer.merged for layer in adapted_layers(model).values()].count(True) == 1
    assert merged_before.merged


def test_only_updates_train_and_the_rest_stays_in_eval() -> None:
    model = zoo.small_vit(proj_drop_rate=0.5, attn_drop_rate=0.5)
    inject(model, DoRA(LoRA(2, dropout=0.5)))
    set_train_mode(model, True)
    training = {name for name, module in model.named_modules() if module.training}
    assert training
    assert all(".delta" in name for name in training)
    assert any(name.endswith("delta.inner") for name in training)
    set_train_mode(model, False)
    assert not any(module.training for module in model.modules())


def test_modes_of_methods_that_train_the_model_itself() -> None:
    for adapter, expected in ((FullFineTuning(), True), (BitFit(), True), (LinearProbe(), False)):
        model = zoo.small_vit()
        inject(model, adapter)
        set_train_mode(model)
        assert {module.training for module in model.modules()} == {expected}
        set_train_mode(model, False)
        assert {module.training for module in model.modules()} == {False}


def test_unloading_forgets_reports_of_parts() -> None:
    model = zoo.small_clip()
    inject(model.visual, LoRA(2))
    unload(model)
    assert not any("adapter_report" in vars(module) for module in model.modules())
    assert inject(model, LoRA(2)).trainable > 0


def test_unloaded_weights_stay_frozen_and_the_model_can_be_adapted_again() -> None:
    model = adapted_vit()
    x = zoo.images()
    first = model(x)
    unload(model)
    assert trainable_parameters(model) == {}
    assert_close(model(x), first)
    inject(model, LoRA(2))
    assert_close(model(x), first)
    randomise(model)
    assert (model(x) - first).abs().max() > 1e-3
