"""The contract of every method on every kind of layer (issue: "Contract")."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from randlora_pl.adapters import (
    adapted_layers,
    delta_weights,
    disabled,
    merge,
    merge_and_unload,
    trainable_parameters,
)
from randlora_pl.adapters.derived import derived_buffers
from randlora_pl.adapters.layers import AdaptedLayer
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.adapters.trained import update_buffers
from randlora_pl.testing import CHECKS as CHECKS_OF_ALL
from randlora_pl.testing import Contract
from tests.adapters.cases import (
    EXCEPT,
    KINDS,
    METHODS,
    UNFIXED,
    WHOLE,
    adapt,
    adapter_of,
    assert_close,
    base_and_adapted,
    bases_of,
    inputs,
    randomise,
    trained,
)
from tests.adapters.reference import adapted_outputs, adapted_weight

Check = Callable[[str, str], None]
CHECKS: dict[str, list[Check]] = {}
"""The checks of each method, in the order of this file."""


def of_every_method(*but: str) -> Callable[[Check], Check]:
    """Run a check for all methods but some."""

    def add(check: Check) -> Check:
        for method in METHODS:
            if method not in but:
                CHECKS.setdefault(method, []).append(check)
        return check

    return add


def updated_layers(model: nn.Module) -> list[AdaptedLayer]:
    return [layer for layer in adapted_layers(model).values() if layer.delta is not None]


class Row(Contract):
    """The contract of `randlora_pl.testing` on our layers, with the noise of these tests."""

    @torch.no_grad()
    def trained(self, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
        model = self.adapt(self.build().to(dtype), **options)
        randomise(model)
        return model


@of_every_method()
def users_methods_keep_the_same_contract(method: str, kind: str) -> None:
    if method == "nola-official":
        _, model = base_and_adapted(method, kind)
        assert all(delta.any() for delta in delta_weights(model).values())
    run = {"one update", "start", "training", "merge", "exact gradients"} - {*EXCEPT.get(method, ())}
    found = Row(adapter_of(method, kind), (KINDS[kind].build, KINDS[kind].targets)).findings(CHECKS_OF_ALL.keys() - run)
    assert found == dict.fromkeys([name for name in CHECKS_OF_ALL if name in run], "")


@of_every_method(*UNFIXED)
def unload_gives_plain_layers_with_merged_weights(method: str, kind: str) -> None:
    plain, model = trained(method, kind)
    x = inputs(model)
    expected = model(x)
    weights = {id(parameter) for parameter in plain.parameters()}
    assert merge_and_unload(model) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert len(weights) == len(list(model.parameters()))
    assert_close(model(x), expected)


@of_every_method(*WHOLE)
def a_disabled_adapter_is_the_base_model(method: str, kind: str) -> None:
    plain, model = trained(method, kind)
    x = inputs(model)
    adapted = model(x)
    with disabled(model) as same:
        assert same is model
        assert_close(model(x), plain(x), 1e-6)
        with disabled(model):
            assert_close(model(x), plain(x), 1e-6)
        assert_close(model(x), plain(x), 1e-6)
    assert torch.equal(model(x), adapted)
    merge(model, strict=False)
    with disabled(model):
        assert_close(model(x), plain(x), 1e-6)
    assert_close(model(x), adapted)


@of_every_method(*WHOLE)
def the_update_is_the_slow_loop_over_the_formula(method: str, kind: str) -> None:
    _, model = trained(method, kind)
    for layer in updated_layers(model):
        assert layer.delta is not None
        weight = layer.base_weight
        if method in UNFIXED:
            x = torch.randn(7, weight.shape[1])
            assert_close(layer.delta.add(x, weight, None).double(), adapted_outputs(layer.delta, x, weight), 1e-5)
            return
        assert_close(layer.delta.effective_weight(weight).double(), adapted_weight(layer.delta, weight), 1e-5)
        # The fast path must say the same as the definition.
        x = torch.randn(7, weight.shape[1])
        assert_close(layer.delta.add(x, weight, None), F.linear(x, layer.delta.effective_weight(weight)), 1e-5)
    deltas = delta_weights(model)
    assert deltas.keys() == {row.layer for row in model.adapter_report.rows}  # type: ignore[union-attr]
    assert {name: tuple(delta.shape) for name, delta in deltas.items()} == {
        row.layer: row.shape
        for row in model.adapter_report.rows  # type: ignore[union-attr]
    }


@of_every_method(*[name for name in METHODS if not name.startswith("dora")])
def gradients_of_magnitudes_are_exact(method: str, kind: str) -> None:
    """DoRA's norm is a constant for the gradient: only the magnitudes can be differenced."""
    _, model = trained(method, kind, torch.float64)
    parameters = {name: value for name, value in trainable_parameters(model).items() if name.endswith("magnitude")}

    def forward(x: Tensor, *values: Tensor) -> Any:
        return functional_call(model, dict(zip(parameters, values, strict=True)), (x,))

    x = inputs(model, 1, 3, torch.float64).requires_grad_()
    values = [value.detach().clone().requires_grad_() for value in parameters.values()]
    assert torch.autograd.gradcheck(forward, (x, *values), fast_mode=True)


def by_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


@of_every_method()
def copies_work_and_are_independent(method: str, kind: str) -> None:
    _, model = trained(method, kind)
    x = inputs(model)
    expected = model(x)
    for copied in (copy.deepcopy, by_pickle):
        twin = copied(model)
        assert torch.equal(twin(x), expected)
        assert len(bases_of(twin)) == len(bases_of(model)) <= 1
        randomise(twin)
        merge(twin, strict=False)
        assert torch.equal(model(x), expected)
        merge_and_unload(twin) if method not in UNFIXED else None
        assert torch.equal(model(x), expected)


@of_every_method()
def an_adapted_layer_keeps_every_key(method: str, kind: str) -> None:
    plain, model = trained(method, kind)
    keys, own = set(plain.state_dict()), {*trainable_parameters(model), *derived_buffers(model), *update_buffers(model)}
    assert set(model.state_dict()) == keys | own
    other = KINDS[kind].build()
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) == own - keys
    if method not in WHOLE:
        with disabled(model):
            x = inputs(model)
            assert_close(model(x), other(x), 1e-6)


@of_every_method(*WHOLE)
def bases_are_stored_once_and_in_no_checkpoint(method: str, kind: str) -> None:
    model = nn.ModuleDict({"first": KINDS[kind].build(), "second": KINDS[kind].build()})
    adapt(model, method, kind)
    if adapter_of(method, kind).bases([WeightShape("fc", 12, 12)], torch.device("meta")) is None:
        assert bases_of(model) == []
        return
    for same in (model, model.double().float().to("cpu"), copy.deepcopy(model), by_pickle(model)):
        assert len(bases_of(same)) == 1
        assert not any(".bases." in key for key in same.state_dict())
        named = [(name, buffer) for name, buffer in same.named_buffers(remove_duplicate=False) if "bases" in name]
        assert len({buffer.data_ptr() for _, buffer in named}) == 2 < len(named)


@of_every_method()
def autocast_to_bfloat16(method: str, kind: str) -> None:
    _, model = trained(method, kind)
    x = inputs(model)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(x)
    assert actual.dtype == torch.bfloat16
    assert_close(actual.float(), expected, 0.04)
    actual.float().square().mean().backward() if actual.requires_grad else None
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@of_every_method(*WHOLE)
def bfloat16_weights_with_a_float32_adapter(method: str, kind: str) -> None:
    plain, model = trained(method, kind, torch.bfloat16)
    assert {value.dtype for value in trainable_parameters(model).values()} == {torch.float32}
    x = inputs(model, dtype=torch.bfloat16)
    actual = model(x)
    assert actual.dtype == torch.bfloat16
    exact = plain.float() if method not in UNFIXED else copy.deepcopy(model).float()
    for layer, twin in zip(updated_layers(model), _twins(model, exact), strict=True):
        assert layer.delta is not None
        if method in UNFIXED:
            break
        twin.data.copy_(layer.swap_layout(adapted_weight(layer.delta, layer.base_weight)))
    assert_close(actual.float(), exact(x.float()), 0.04)
    actual.float().square().mean().backward()
    assert all(value.grad is not None and value.grad.any() for value in trainable_parameters(model).values())
    merge(model, strict=False)
    assert_close(model(x).float(), exact(x.float()), 0.04)


def _twins(model: nn.Module, plain: nn.Module) -> list[nn.Parameter]:
    """The parameters of a plain model that belong to the updated layers of an adapted one."""
    return [
        getattr(plain.get_submodule(path), layer.weight_name)
        for path, layer in adapted_layers(model).items()
        if layer.delta is not None
    ]


@of_every_method()
def gradient_checkpointing_gives_the_same_gradients(method: str, kind: str) -> None:
    _, model = trained(method, kind)
    x = inputs(model).requires_grad_()
    gradients = []
    for run in (model, lambda value: checkpoint(model, value, use_reentrant=False)):
        values = [x, *trainable_parameters(model).values()]
        gradients.append(torch.autograd.grad(run(x).square().sum(), values))
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@of_every_method()
def the_report_counts_what_trains(method: str, kind: str) -> None:
    model = KINDS[kind].build()
    plain = sum(parameter.numel() for parameter in model.parameters())
    report = adapt(model, method, kind)
    trains = sum(value.numel() for value in trainable_parameters(model).values())
    assert report.trainable == trains == sum(row.trainable for row in report.rows)
    assert report.total == plain + (0 if method in WHOLE else trains)
    assert report.adapter.describe() == adapter_of(method, kind).describe()
    assert report.fingerprint == "".join(bases.fingerprint for bases in bases_of(model))
