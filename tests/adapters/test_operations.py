"""Merging, unloading, disabling and modes of whole models; layers themselves are tested by the contract."""

import copy

import pytest
import torch
from torch import nn

from randlora_pl.adapters import (
    BitFit,
    FullFineTuning,
    LinearProbe,
    LoRA,
    RandLoRA,
    adapted_layers,
    delta_weights,
    disabled,
    inject,
    merge,
    merge_and_unload,
    set_train_mode,
    trainable_parameters,
    unmerge,
)
from randlora_pl.adapters.operations import report_of, use_bases, weight_updates
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
from tests.adapters.cases import KINDS, METHODS, UNFIXED, WHOLE, adapt, assert_close, bases_of, randomise
from tests.adapters.reference import adapted_weight
from tests.support.products import in_one_item


def adapted_vit() -> nn.Module:
    model = zoo.small_vit()
    inject(model, RandLoRA(rank=4, qkv="split"))
    randomise(model)
    return model


def test_a_plain_model_has_no_report_and_nothing_to_do() -> None:
    model = zoo.small_vit()
    for call in (report_of, lambda m: disabled(m).__enter__(), set_train_mode):
        with pytest.raises(UserError, match="inject"):
            call(model)
    before = copy.deepcopy(model.state_dict())
    merge(model)
    unmerge(model)
    assert merge_and_unload(model) is model
    assert delta_weights(model) == {} == adapted_layers(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = inject(model, LoRA(rank=2))
    assert report_of(model) is report
    merge_and_unload(model)
    with pytest.raises(UserError, match="no adapter"):
        report_of(model)


def test_errors_and_gradients_of_a_disabled_block() -> None:
    model = adapted_vit()
    x = zoo.images()
    expected = model(x)
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), expected)
    model = adapted_vit()
    merge(model)
    assert not model(zoo.images()).requires_grad
    unmerge(model)
    with disabled(model):
        assert not model(zoo.images()).requires_grad
    assert model(zoo.images()).requires_grad


def test_merging_inside_a_disabled_block_takes_effect_behind_it() -> None:
    model = adapted_vit()
    x = zoo.images()
    expected = model(x)
    with disabled(model):
        base = model(x)
        merge(model)
        assert_close(model(x), base)
    assert_close(model(x), expected)
    merge(model)
    assert_close(model(x), expected)
    for _ in range(2):
        unmerge(model)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("change", [merge, merge_and_unload])
def test_an_update_that_is_not_finite_is_never_merged(bad: float, change: object) -> None:
    model = adapted_vit()
    last = list(adapted_layers(model))[-1]
    merged_before = adapted_layers(model)["blocks.0.mlp.fc1"]
    merged_before.merge()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        next(adapted_layers(model)[last].delta.parameters())[0] = bad  # type: ignore[union-attr]
    with pytest.raises(UserError, match=rf"the weight of {last} with its update is not finite"):
        change(model)  # type: ignore[operator]
    own = set(trainable_parameters(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name not in own)
    assert [layer.merged for layer in adapted_layers(model).values()].count(True) == 1
    assert merged_before.merged


def test_modes_of_methods_that_train_the_model_itself() -> None:
    for adapter, expected in ((FullFineTuning(), True), (BitFit(), True), (LinearProbe(), False)):
        model = zoo.small_vit()
        inject(model, adapter)
        set_train_mode(model)
        assert {module.training for module in model.modules()} == {expected}
        set_train_mode(model, False)
        assert {module.training for module in model.modules()} == {False}


# Updates by state-dict key, and bases from elsewhere


@pytest.mark.parametrize("kind", ["conv1d-q-and-v", "mha-qkvo", "mha-split"])
@in_one_item("method", [name for name in METHODS if name not in (*WHOLE, *UNFIXED)])
def test_updates_by_key_are_what_merging_adds(method: str, kind: str) -> None:
    model = KINDS[kind].build().double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapt(model, method, kind)
    randomise(model)
    updates = weight_updates(model)
    merge(model)
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == updates.keys()
    for name, update in updates.items():
        torch.testing.assert_close(update, after[name] - before[name], atol=1e-9, rtol=1e-7)


def other_bases(model: nn.Module, more: int = 0) -> Bases:
    drawn = bases_of(model)[0]
    (_, rank, small), (large, count, _) = drawn.A.shape, drawn.B.shape
    return Bases(0, torch.randn(1, rank + more, small), torch.randn(count, large + more, rank + more), stored=True)


@pytest.mark.parametrize("more", [0, 3])
def test_bases_from_elsewhere_give_the_update_of_the_equation(more: int) -> None:
    model = KINDS["linear-in>out"].build()
    adapt(model, "randlora", "linear-in>out")
    randomise(model)
    bases = other_bases(model, more)
    use_bases(model, bases)
    (layer,) = adapted_layers(model).values()
    assert all(torch.equal(found.A, bases.A) and torch.equal(found.B, bases.B) for found in bases_of(model))
    expected = adapted_weight(layer.delta, torch.zeros_like(layer.base_weight))
    assert_close(next(iter(delta_weights(model).values())), expected, 1e-5)
    assert report_of(model).fingerprint == bases.fingerprint and report_of(model).stored_bases is bases


def test_bases_from_elsewhere_are_shared_by_layers_and_not_by_models() -> None:
    model = adapted_vit()
    bases = other_bases(model)
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    use_bases(model, bases)
    assert len({id(found) for found in bases_of(model)}) == 1
    assert {found.fingerprint for found in bases_of(model)} == {bases.fingerprint}
    assert not torch.equal(model(x), before)
    models = [adapted_vit(), adapted_vit()]
    bases = other_bases(models[0])
    for model in models:
        use_bases(model, bases)
    models[0].to("meta")
    assert {found.A.device.type for found in bases_of(models[0])} == {"meta"}
    assert {each.A.device.type for each in (bases, *bases_of(models[1]))} == {"cpu"}


def test_bases_that_are_too_small_or_of_no_use_are_refused() -> None:
    model = adapted_vit()
    drawn = bases_of(model)[0]
    (_, rank, small), (large, count, _) = drawn.A.shape, drawn.B.shape
    narrow = Bases(0, torch.randn(1, rank, small - 1), torch.randn(count, large, rank), stored=True)
    with pytest.raises(UserError, match="23"):
        use_bases(model, narrow)
    assert {id(found) for found in bases_of(model)} == {id(drawn)} and report_of(model).stored_bases is None
    plain = zoo.small_vit()
    inject(plain, LoRA(rank=2))
    with pytest.raises(UserError, match="LoRA"):
        use_bases(plain, drawn)
