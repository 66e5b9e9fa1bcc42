"""Several adapters on one model: each as if it were alone, sums as by hand, and a base that stays bit for bit."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from randlora_pl.adapters import (
    Adapter,
    AdapterSet,
    BitFit,
    DoRA,
    FullFineTuning,
    LinearProbe,
    LoRA,
    NoLA,
    RandLoRA,
    VeRA,
    adapted_layers,
    disabled,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    set_train_mode,
    trainable_parameters,
    unmerge,
)
from randlora_pl.adapters.kernels import common
from randlora_pl.adapters.layers import WeightedSum
from randlora_pl.adapters.operations import report_of, use_bases, weight_updates
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
from tests.adapters.cases import assert_close, bases_of, randomise

# Methods, ranks, seeds, targets, packed and split weights, all on open_clip's image tower.
KINDS: dict[str, tuple[Adapter, list[str] | None]] = {
    "randlora": (RandLoRA(rank=4, seed=3), None),
    "randlora-split": (RandLoRA(rank=5, seed=3, qkv="split"), ["q", "v", "o"]),
    "lora": (LoRA(rank=2, alpha=4.0), ["attn"]),
    "lora-mlp": (LoRA(rank=3, alpha=4.0), ["mlp"]),
    "dora": (DoRA(LoRA(rank=2, alpha=4.0)), ["qkv"]),
    "dora-split": (DoRA(LoRA(rank=2, alpha=4.0, qkv="split")), ["k", "fc1"]),
    "vera": (VeRA(rank=8, alpha=8.0), None),
    "nola": (NoLA(rank=2, num_bases=8, alpha=1.0), ["qkv"]),
    "full": (FullFineTuning(), None),
    "bitfit": (BitFit(), None),
    "probe": (LinearProbe(), None),
}
ADDS = [name for name in KINDS if name not in ("full", "bitfit")]


def base() -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(5)
    tower: nn.Module = zoo.small_clip().visual
    return tower


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each kind that is not at its start."""
    root = tmp_path_factory.mktemp("adapters")
    saved = {}
    for name, (adapter, targets) in KINDS.items():
        model = base()
        inject(model, adapter, targets)
        randomise(model)
        saved[name] = save_adapter(model, root / f"{name}{'.safetensors' if 'mlp' in name else ''}")
    return saved


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> AdapterSet:
    """All kinds on one model, none active."""
    result = AdapterSet(base())
    for name, folder in folders.items():
        result.load(name, folder)
    return result


@pytest.fixture
def adapters(loaded: AdapterSet) -> AdapterSet:
    """A copy of `loaded`."""
    return copy.deepcopy(loaded)


def alone(folder: Path) -> nn.Module:
    model = base()
    load_adapter(model, folder)
    return model


def outputs(model: nn.Module) -> Tensor:
    torch.manual_seed(7)
    with torch.no_grad():
        out: Tensor = model(zoo.images())
    return out


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if ".delta." not in name}


def assert_base(model: nn.Module) -> None:
    """A plain model with the base's weights, bit for bit."""
    plain = base()
    assert not adapted_layers(model) and getattr(model, "adapter_report", None) is None
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    there, here = plain.state_dict(), model.state_dict()
    assert there.keys() == here.keys() and all(torch.equal(here[name], value) for name, value in there.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_active_adapter_is_what_load_adapter_gives(
    adapters: AdapterSet, folders: dict[str, Path], kind: str
) -> None:
    adapters.use("lora")
    adapters.use(kind)
    expected, model = alone(folders[kind]), adapters.model
    assert adapters.active == {kind: 1.0} and adapters.names == list(KINDS)
    assert torch.equal(outputs(model), outputs(expected))
    mine, theirs = trainable_parameters(model), trainable_parameters(expected)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert str(report_of(model)) == str(report_of(expected))


@pytest.mark.slow
@settings(max_examples=20)
@given(data=st.data())
def test_the_base_is_bit_identical_after_any_switches(folders: dict[str, Path], data: Any) -> None:
    adapters = AdapterSet(base())
    for name, folder in folders.items():
        adapters.load(name, folder)
    sums = st.dictionaries(st.sampled_from(ADDS), st.floats(-2, 2), max_size=3)
    for choice in data.draw(st.lists(st.none() | st.sampled_from(list(KINDS)) | sums, max_size=8)):
        adapters.use(choice)
        data.draw(st.sampled_from([merge, unmerge]))(adapters.model)
        if isinstance(choice, dict):
            assert adapters.active == {name: weight for name, weight in choice.items() if weight}
    adapters.use(None)
    assert_base(adapters.model)


WEIGHTS: dict[str, dict[str, float]] = {
    "additive": {"randlora": 0.5, "lora": -1.5},
    "packed and split": {"randlora": 0.5, "randlora-split": 0.25, "lora": 1.0},
    "dora": {"dora": 0.5, "lora-mlp": 2.0},
    "dora in blocks": {"dora-split": 0.75, "dora": 0.5, "vera": 0.1},
    "one": {"nola": 0.3},
    "with nothing": {"nola": 0.3, "probe": 0.3},
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_a_sum_is_the_sum_of_the_updates_by_hand(
    adapters: AdapterSet, folders: dict[str, Path], weights: dict[str, float]
) -> None:
    """The oracle writes W0 + sum_i w_i (merged_i - W0) into a plain model."""
    expected = base()
    state = {name: value.double() for name, value in expected.state_dict().items()}
    start = copy.deepcopy(state)
    for name, weight in weights.items():
        merged = merge_and_unload(alone(folders[name])).state_dict()
        for key, value in merged.items():
            state[key] += weight * (value.double() - start[key])
    expected.load_state_dict(state)
    adapters.use(weights)
    assert_close(outputs(adapters.model), outputs(expected), 1e-4)
    for key, update in weight_updates(adapters.model).items():
        torch.testing.assert_close(update.double(), state[key] - start[key], rtol=1e-4, atol=1e-5)
    merge(adapters.model)
    for key, value in frozen(adapters.model).items():
        torch.testing.assert_close(value.double(), state[key], rtol=1e-5, atol=1e-5)
    assert_close(outputs(adapters.model), outputs(expected), 1e-4)
    with disabled(adapters.model):
        assert_close(outputs(adapters.model), outputs(base()))  # by another path through attention
    adapters.use(None)
    assert_base(adapters.model)


def test_gradients_of_a_sum_are_those_of_plain_autograd(adapters: AdapterSet) -> None:
    weights = {"randlora": 0.5, "dora": -1.0, "lora-mlp": 2.0}
    adapters.use(weights)
    model = adapters.model
    found = trainable_parameters(model)
    assert found and all(".delta.parts." in name for name in found)
    model(zoo.images()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in found.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in found)
    path, layer = next((p, m) for p, m in adapted_layers(model).items() if isinstance(m.delta, WeightedSum))
    torch.manual_seed(1)
    x, upstream = torch.randn(3, 4, layer.base_weight.shape[1]), torch.randn(3, 4, layer.base_weight.shape[0])
    parameters = [p for n, p in found.items() if n.startswith(f"{path}.")]
    delta = layer.delta
    assert isinstance(delta, WeightedSum) and len(delta.parts) == 2
    fast = torch.autograd.grad((delta.add(x, layer.base_weight, None) * upstream).sum(), parameters)
    parts: list[Any] = list(delta.parts)
    weight = layer.base_weight + sum(
        factor * (part.effective_weight(layer.base_weight) - layer.base_weight)
        for part, factor in zip(parts, delta.weights, strict=True)
    )
    slow = torch.autograd.grad((x @ weight.T * upstream).sum(), parameters)
    for one, other in zip(fast, slow, strict=True):
        assert_close(one, other, 1e-4)


def test_a_sum_drops_inputs_on_the_paths_of_its_parts_only(tmp_path: Path) -> None:
    model = zoo.mlp()
    plain = copy.deepcopy(model)
    for name in ("a", "b"):
        tuned = copy.deepcopy(plain)
        inject(tuned, LoRA(rank=2, alpha=4.0, dropout=0.5), ["enter"])
        randomise(tuned)
        save_adapter(tuned, tmp_path / name)
    adapters = AdapterSet(model)
    for name in ("a", "b"):
        adapters.load(name, tmp_path / name)
    adapters.use({"a": 0.5, "b": 2.0})
    layer, x = model.enter, torch.randn(4000, 8)
    still = layer(x)
    assert torch.equal(layer(x), still)  # loaded adapters predict
    with adapters.using("a"):  # also after a sum
        assert torch.equal(layer(x), layer(x))
    set_train_mode(model)
    dropped = layer(x)
    assert not torch.allclose(dropped, still, atol=0.1)
    assert_close(dropped.mean(0), still.mean(0), 0.2)
    outside = dropped - plain.enter(x)  # drop(x) @ delta.T of both parts, each with a mask of its own
    torch.manual_seed(3)
    again = layer(x) - plain.enter(x)
    torch.manual_seed(3)
    masks = [common.dropped(x, 0.5), common.dropped(x, 0.5)]
    deltas = [w * part.change(torch.empty(0)) for part, w in zip(layer.delta.parts, layer.delta.weights, strict=True)]
    by_hand = sum(mask @ delta.T for mask, delta in zip(masks, deltas, strict=True))
    torch.testing.assert_close(again, by_hand, rtol=1e-4, atol=1e-4)
    assert outside.std() > 0


def test_training_the_active_adapter_leaves_the_others(
    adapters: AdapterSet, folders: dict[str, Path], tmp_path: Path
) -> None:
    for kind in ("randlora", "full"):
        adapters.use(kind)
        set_train_mode(adapters.model)
        optimizer = torch.optim.AdamW(trainable_parameters(adapters.model).values(), lr=0.01)
        adapters.model(zoo.images()).square().sum().backward()
        optimizer.step()
        after = outputs(adapters.model.eval())
        assert not torch.allclose(after, outputs(alone(folders[kind])), atol=1e-3)
        adapters.use("lora")
        assert torch.equal(outputs(adapters.model), outputs(alone(folders["lora"])))
        adapters.use(kind)
        assert torch.equal(outputs(adapters.model), after)
        assert torch.equal(outputs(alone(save_adapter(adapters.model, tmp_path / kind))), after)
        adapters.use(None)
        assert_base(adapters.model)


def test_using_switches_for_a_block_and_back(adapters: AdapterSet, folders: dict[str, Path]) -> None:
    adapters.use("dora")
    with adapters.using({"lora": 0.5, "vera": 0.5}) as model, adapters.using("lora"):
        assert torch.equal(outputs(model), outputs(alone(folders["lora"])))
    assert adapters.active == {"dora": 1.0}
    with pytest.raises(ZeroDivisionError), adapters.using(None):
        assert_base(adapters.model)
        raise ZeroDivisionError
    assert torch.equal(outputs(adapters.model), outputs(alone(folders["dora"])))


@pytest.mark.parametrize("through", [None, "probe", "full"])
def test_a_merged_model_is_merged_again(adapters: AdapterSet, folders: dict[str, Path], through: str | None) -> None:
    adapters.use("randlora")
    merge(adapters.model)
    adapters.use(through)  # these have nothing to merge
    adapters.use("lora")
    layers = [layer for layer in adapted_layers(adapters.model).values() if layer.delta is not None]
    assert layers and all(layer.merged for layer in layers)
    expected = alone(folders["lora"])
    merge(expected)
    assert all(torch.equal(value, frozen(expected)[name]) for name, value in frozen(adapters.model).items())
    unmerge(adapters.model)
    adapters.use("vera")
    assert not any(layer.merged for layer in adapted_layers(adapters.model).values())


def test_removing_and_one_adapter_with_the_weight_1(adapters: AdapterSet, folders: dict[str, Path]) -> None:
    adapters.use({"lora": 0.5, "vera": 1.0})
    adapters.remove("dora")
    assert adapters.active == {"lora": 0.5, "vera": 1.0}
    adapters.remove("vera")
    assert adapters.active == {} and adapters.names == [n for n in KINDS if n not in ("dora", "vera")]
    assert_base(adapters.model)
    adapters.use({"dora-split": 1.0, "randlora": 0.0})
    assert adapters.active == {"dora-split": 1.0}
    assert torch.equal(outputs(adapters.model), outputs(alone(folders["dora-split"])))


def test_loading_leaves_what_is_active(adapters: AdapterSet, folders: dict[str, Path]) -> None:
    adapters.use("lora")
    merge(adapters.model)
    before = frozen(adapters.model)
    file = adapters.load("more", folders["full"])
    assert file.adapter.method() == "FullFineTuning"
    assert adapters.active == {"lora": 1.0}
    assert all(torch.equal(value, before[name]) for name, value in frozen(adapters.model).items())


def test_equal_bases_are_held_once_and_those_of_a_file_stay_with_their_adapter(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    adapters, other, stored = AdapterSet(base()), base(), base()
    inject(other, RandLoRA(rank=4, seed=4))
    inject(stored, RandLoRA(rank=4, seed=3))
    a, b = bases_of(stored)[0].tensors().values()
    use_bases(stored, Bases(3, 2 * a.float(), b.float(), stored=True))
    randomise(stored)
    adapters.load("one", folders["randlora"])
    adapters.load("two", folders["randlora"])
    adapters.load("other", save_adapter(other, tmp_path / "other"))
    adapters.load("stored", save_adapter(stored, tmp_path / "stored"))
    held: dict[str, Bases] = {}
    for name in adapters.names:
        with adapters.using(name) as model:
            [held[name]] = bases_of(model)
    assert held["one"] is held["two"] and len({id(each) for each in held.values()}) == 3
    adapters.use("stored")
    assert torch.equal(outputs(adapters.model), outputs(stored))
    adapters.use("one")
    assert torch.equal(outputs(adapters.model), outputs(alone(folders["randlora"])))


@torch.no_grad()
def test_a_switch_drops_what_the_layers_kept_and_no_copy_of_the_bases(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 96)).eval()
    tuned, x, adapters = copy.deepcopy(plain), torch.randn(1, 48), AdapterSet(plain)
    inject(tuned, RandLoRA(rank=4, basis="hadamard"), [".*"])
    file = save_adapter(tuned, tmp_path / "adapter")
    for name in ["one", "two"]:
        adapters.load(name, file)
    copies: set[tuple[int, ...]] = set()
    for name in ["one", "two", "one"]:
        with adapters.using(name) as model:
            model(x)
            model(x)  # the second use begins to keep S
            caches = [layer.delta.cache for layer in adapted_layers(model).values()]  # type: ignore[union-attr]
            assert all(cache.held._made for cache in caches)  # type: ignore[union-attr]
            copies.add(tuple(map(id, bases_of(model)[0].copies._made.values())))
        assert not any(cache.held._made for cache in caches)  # type: ignore[union-attr]
    assert len(copies) == 1


def test_switches_under_inference_mode_leave_a_model_that_trains(adapters: AdapterSet) -> None:
    with torch.inference_mode():
        adapters.use("randlora")
        merge(adapters.model)
        adapters.use({"lora": 0.5, "full": 0.0})
        adapters.use("full")
    for kind in ("lora", "full"):
        adapters.use(kind)
        unmerge(adapters.model)
        adapters.model(zoo.images()).sum().backward()
    adapters.use(None)
    assert_base(adapters.model)


def test_a_linear_layer_alone_is_a_model(tmp_path: Path) -> None:
    layer = nn.Linear(6, 4)
    tuned = copy.deepcopy(layer)
    inject(tuned, LoRA(rank=2), [".*"])
    randomise(tuned)
    adapters = AdapterSet(layer)
    adapters.load("a", save_adapter(tuned, tmp_path / "a"))
    adapters.use("a")
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), tuned(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no other device to move to")
def test_waiting_adapters_follow_a_model_that_moves(adapters: AdapterSet, folders: dict[str, Path]) -> None:
    adapters.use("full")
    adapters.model.cuda()
    for choice in ("randlora", "full", "dora"):
        adapters.use(choice)
        expected = outputs(alone(folders[choice]))
        torch.manual_seed(7)
        with torch.no_grad():
            found = adapters.model(zoo.images().cuda())
        assert_close(found.cpu(), expected, 1e-4)
    adapters.use(None)
    assert_base(adapters.model.cpu())


# What is refused


def test_names_weights_and_sums_that_are_refused(adapters: AdapterSet, folders: dict[str, Path]) -> None:
    adapters.use("lora")
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: adapters.use("lara"), "adapter 'lara' is not loaded. Loaded: randlora, .* Did you mean 'lora'"),
        (lambda: adapters.use({"vara": 1.0}), "adapter 'vara' is not loaded"),
        (lambda: adapters.remove("nothing"), "adapter 'nothing' is not loaded"),
        (lambda: adapters.use({"lora": float("nan")}), "weight of the adapter 'lora' is nan"),
        (lambda: adapters.use({"lora": 0.5, "full": 0.5}), "'full' .FullFineTuning.* adapter add"),
        (lambda: adapters.use({"bitfit": 0.5}), "'bitfit' .BitFit.* adapter merge --scale"),
        (lambda: adapters.load("lora", folders["lora"]), "adapter 'lora' already exists"),
        (lambda: AdapterSet(adapters.model), "already has adapters"),
        (lambda: inject(adapters.model, LoRA(rank=2)), "already has adapters"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
        assert adapters.active == {"lora": 1.0}
        assert torch.equal(outputs(adapters.model), outputs(alone(folders["lora"])))
    adapters.use({"lora": 0.5, "vera": 0.5})
    with pytest.raises(UserError, match="weighted"):
        save_adapter(adapters.model, folders["lora"].parent / "sum")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, adapters: AdapterSet) -> None:
    torch.manual_seed(6)
    for adapter in (LoRA(rank=2), FullFineTuning()):
        other: nn.Module = zoo.small_clip(width=48).visual
        inject(other, adapter)
        folder = save_adapter(other, tmp_path / adapter.method())
        adapters.use("vera")
        before = outputs(adapters.model)
        with pytest.raises(UserError, match="trained"):
            adapters.load("other", folder)
        assert "other" not in adapters.names and adapters.active == {"vera": 1.0}
        assert torch.equal(outputs(adapters.model), before)
        adapters.use(None)
        assert_base(adapters.model)


def test_an_update_that_is_not_finite_is_not_merged(adapters: AdapterSet, folders: dict[str, Path]) -> None:
    adapters.use("vera")
    with torch.no_grad():
        next(iter(trainable_parameters(adapters.model).values())).fill_(float("nan"))
    adapters.use("lora")
    merge(adapters.model)
    with pytest.raises(UserError, match="not finite"):
        adapters.use("vera")
    assert adapters.active == {"lora": 1.0}
    assert any(layer.merged for layer in adapted_layers(adapters.model).values())
    adapters.use(None)
    assert_base(adapters.model)


@pytest.mark.parametrize("choice", ["lora", "full", "probe", None])
def test_a_model_that_was_unloaded_is_refused(adapters: AdapterSet, choice: str | None) -> None:
    """Its weights hold the adapter now, so that the base is not known any more."""
    adapters.use(choice)
    merge_and_unload(adapters.model)
    if choice is None:
        inject(adapters.model, LoRA(rank=2))
    with pytest.raises(UserError, match="AdapterSet"):
        adapters.use("vera")
