"""An adapter for each sample of a batch: as one by one, in any order and mix, on any layer, or refused."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from randlora_pl.adapters import (
    Adapter,
    AdapterSet,
    BitFit,
    DoRA,
    LoRA,
    RandLoRA,
    adapted_layers,
    inject,
    merge,
    save_adapter,
)
from randlora_pl.adapters import batched as batched_file
from randlora_pl.adapters.kernels.randlora_linear import StepCache
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
from tests.adapters.cases import KINDS, METHODS, WHOLE, One, adapter_of, assert_close, randomise
from tests.adapters.layers.test_quantized import Eighths

Chosen = Mapping[str, tuple[Adapter, list[str] | None]]
LORA, RANDLORA = LoRA(rank=2, alpha=4.0), RandLoRA(rank=3, basis="hadamard")
SOME: Chosen = {
    "a": (LORA, None),
    "b": (LoRA(rank=5, alpha=4.0), None),
    "r": (RANDLORA, None),
    "s": (RANDLORA, None),
    "t": (RandLoRA(rank=3, seed=8), None),
    "d": (DoRA(LORA), None),
}
NAMES = ["r", "a", None, "s", "d", "b", "t", "a"]


def loaded(build: Callable[[], nn.Module], chosen: Chosen, folder: Path) -> AdapterSet:
    """A set with adapters of random values on the same weights."""
    base = build()
    adapters = AdapterSet(copy.deepcopy(base).eval())
    for number, (name, (adapter, targets)) in enumerate(chosen.items()):
        model = copy.deepcopy(base)
        inject(model, adapter, targets)
        torch.manual_seed(number)
        randomise(model, 0.05)
        adapters.load(name, save_adapter(model, folder / name))
    return adapters


@torch.no_grad()
def one_by_one(adapters: AdapterSet, names: Sequence[str | None], x: Tensor) -> Tensor:
    outputs = []
    for name, sample in zip(names, x, strict=True):
        with adapters.using(name) as model:
            outputs.append(model(sample[None]))
    return torch.cat(outputs)


def assert_exact(adapters: AdapterSet, names: Sequence[str | None], x: Tensor, relative: float = 1e-5) -> None:
    expected = one_by_one(adapters, names, x)
    with adapters.batched(names) as model:
        found = model(x)
    assert_close(found.float(), expected.float(), relative)
    assert not found.requires_grad


@dataclass(repr=False)  # hypothesis would print all tensors
class Everything:
    adapters: AdapterSet
    images: Tensor
    alone: dict[str | None, Tensor]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Everything:
    """Every method on a CLIP tower in one set, in ranks and blocks of two kinds, and each one's outputs alone."""
    chosen: dict[str, tuple[Adapter, list[str] | None]] = {}
    for method in [method for method in METHODS if method not in WHOLE]:
        chosen[method] = METHODS[method](4, "packed"), None
        if method in ("lora", "randlora", "randlora-hadamard", "randlora-lead"):
            chosen[f"{method}-split"] = METHODS[method](2, "split"), ["q", "v", "mlp"]
    adapters = loaded(lambda: zoo.small_clip(layers=1).visual, chosen, tmp_path_factory.mktemp("all"))
    images = zoo.images(8)
    alone: dict[str | None, Tensor] = {}
    for name in (None, *adapters.names):
        with torch.no_grad(), adapters.using(name) as model:
            alone[name] = model(images)
    return Everything(adapters, images, alone)


@settings(max_examples=15)
@given(data=st.data())
def test_any_mix_of_methods_in_any_order_is_as_one_by_one(every: Everything, data: Any) -> None:
    names = data.draw(st.lists(st.sampled_from([None, *every.adapters.names]), min_size=1, max_size=8))
    with every.adapters.batched(names) as model:
        found = model(every.images[: len(names)])
    for row, name in enumerate(names):
        assert_close(found[row], every.alone[name][row])


def test_every_method_is_as_one_by_one_beside_itself(every: Everything) -> None:
    known = every.adapters.names
    for name in known:
        names = [None, name, "lora", name, *([f"{name}-split"] if f"{name}-split" in known else [])]
        with every.adapters.batched(names) as model:
            found = model(every.images[: len(names)])
        for row, each in enumerate(names):
            assert_close(found[row], every.alone[each][row])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str, tmp_path: Path) -> None:
    methods = ("lora", "lora", "randlora", "randlora-hadamard", "randlora-hadamard", "vera", "dora", "hydralora")
    chosen = {str(n): (adapter_of(method, kind), KINDS[kind].targets) for n, method in enumerate(methods)}
    adapters = loaded(KINDS[kind].build, chosen, tmp_path)
    x = torch.randn(10, 5, int(adapters.model.features))  # type: ignore[arg-type]
    assert_exact(adapters, ["7", "0", None, "1", "2", "3", "4", "5", "6", "0"], x)


class Layout(nn.Module):
    """A linear layer and an attention between two functions that move the samples, (b, 4, 6) to the same."""

    def __init__(self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], batch_first: bool) -> None:
        super().__init__()
        self.there, self.back = there, back
        self.fc1, self.attn = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.there(x))
        return self.back(x + self.attn(x, x, x, need_weights=False)[0])


WINDOWS = (lambda x: x.reshape(-1, 2, 6), lambda x: x.reshape(-1, 4, 6), True)  # two of each sample, as in Swin
SECOND = (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1), False)


@pytest.mark.parametrize("layout", [WINDOWS, SECOND], ids=["windows", "batch second"])
@pytest.mark.parametrize("count", [2, 4, 8])  # the length is 4
def test_samples_are_found_where_they_are(layout: Any, count: int, tmp_path: Path) -> None:
    adapters = loaded(lambda: Layout(*layout), SOME, tmp_path)
    assert_exact(adapters, NAMES[:count], torch.randn(count, 4, 6))


def shuffled(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, 2)).transpose(0, 1).reshape(-1, 2, 6)  # all first windows, then all second ones


class Classifier(nn.Module):
    """Features of images times the features of two classes, by one adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 6)
        self.register_buffer("classes", torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) @ self.fc1(self.classes).T


class Compares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) @ self.fc1(x).T


class Packs(nn.Module):
    """A layer on the words of all texts, without the hidden ones: as many as in the other text here."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 6)

    def forward(self, shown: Tensor) -> Tensor:
        return self.fc1(torch.ones(*shown.shape, 6)[shown])


class Lists(Classifier):
    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return list(self.fc1(x))


class Reads(One):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight.T


REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "order": (lambda: Layout(shuffled, WINDOWS[1], True), torch.zeros(2, 4, 6), "fc1: the input has shape .* move"),
    "classes": (Classifier, torch.randn(2, 6), r"fc1: the input has shape \(2, 6\) for one sample"),
    "compares": (Compares, torch.randn(2, 6), r"Compares compares samples .* \(2, 2\) for two"),
    "packs": (Packs, torch.arange(4).expand(2, 4) < torch.tensor([[2], [2]]), r"fc1: the input has shape \(2, 6\)"),
    "number": (zoo.mlp, torch.randn(3, 8), r"gets inputs of shapes \(3, 8\) for 2 names"),
    "reads": (lambda: Reads(8, 12), torch.randn(2, 8), "fc: other code reads its weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_unknown_is_refused_and_the_state_is_back(case: str, tmp_path: Path) -> None:
    build, x, message = REFUSED[case]
    targets = [".*"] if case in ("number", "reads") else None
    adapters = loaded(build, {"a": (LORA, targets), "b": (LORA, targets)}, tmp_path)
    adapters.use("b")
    merge(adapters.model)
    keys = adapters.model.state_dict().keys()
    with pytest.raises(UserError, match=message), adapters.batched(["a", None]) as model:
        model(x)
    assert adapters.active == {"b": 1.0} and adapters.model.state_dict().keys() == keys
    assert all(layer.merged for layer in adapted_layers(adapters.model).values() if layer.delta is not None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in adapters.model.modules())
    with pytest.raises(UserError), adapters.batched(["a", "b"]) as model:  # again: nothing wrong is remembered
        model(x)


def test_names_and_states_that_are_refused(tmp_path: Path) -> None:
    adapters = loaded(zoo.small_vit, {"a": (LORA, None), "b": (BitFit(), None)}, tmp_path)
    listed, changes = "takes a list with the name", "'b' .BitFit. changes the model's own"
    refused: dict[str, list[Any]] = {"'c' is not loaded": [["a", "c"]], changes: [["a", "b"]]}
    for message, lists in (refused | {listed: ["ab", [], [{"a": 0.5}, "a"]]}).items():
        for names in lists:
            with pytest.raises(UserError, match=message), adapters.batched(names):
                pass
    assert_exact(adapters, ["b", "b"], zoo.images())  # alone it can
    with adapters.batched(["a", None]), pytest.raises(UserError, match="Leave the block of batched first"):
        adapters.use("a")
    with pytest.raises(UserError, match="training mode"), adapters.batched(["a", None]):
        adapters.model.train()
        with adapters.batched(["a", None]):
            pass


def test_a_list_of_samples_is_returned_and_a_part_in_training_mode_is_refused(tmp_path: Path) -> None:
    adapters, x = loaded(Lists, SOME, tmp_path), torch.randn(8, 6)
    with adapters.batched(NAMES) as model:
        found = model(x)
    for name, sample, row in zip(NAMES, x, found, strict=True):
        with torch.no_grad(), adapters.using(name) as model:
            assert_close(row, model(sample[None])[0])
    adapters.model.get_submodule("fc1").train()
    with pytest.raises(UserError, match="training mode"), adapters.batched(NAMES):
        pass


def test_a_frozen_weight_is_multiplied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = loaded(lambda: One(8, 8), {n: (a, ["fc"]) for n, (a, _) in SOME.items() if n in "abrs"}, tmp_path)
    with adapters.batched(["a", "b", "r", "s", None, "a"]) as model:
        model(torch.randn(6, 5, 8))
        products: list[int] = []
        linear = torch.nn.functional.linear

        def counted(x: Tensor, *args: Any) -> Tensor:
            products.append(len(x))
            return linear(x, *args)

        monkeypatch.setattr(batched_file.F, "linear", counted)
        model(torch.randn(6, 5, 8))
    assert products == [6]


def test_a_batch_drops_what_updates_kept_that_it_applied_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: Chosen = {name: (RANDLORA, [".*"]) for name in "rs"}
    linear = loaded(lambda: One(8, 8), chosen, tmp_path / "linear")
    convolution = loaded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), chosen, tmp_path / "convolution")
    dropped: list[StepCache] = []
    clear = StepCache.clear

    def counted(cache: StepCache) -> None:
        dropped.append(cache)
        clear(cache)

    monkeypatch.setattr(StepCache, "clear", counted)
    for adapters, x, kept in ((linear, torch.randn(2, 5, 8), 0), (convolution, zoo.images(2), 2)):
        with adapters.batched(["r", "s"]) as model:
            model(x)
            dropped.clear()
        assert len(dropped) == kept


def test_an_adapter_in_another_dtype_rounds_no_other_one(tmp_path: Path) -> None:
    chosen: Chosen = {name: (adapter, ["fc"]) for name, (adapter, _) in SOME.items() if name in "abrs"}
    adapters, x = loaded(lambda: One(8, 12), chosen, tmp_path), torch.randn(4, 5, 8)
    for name in ("a", "r"):
        with adapters.using(name) as model:
            model.bfloat16()
        adapters.model.float()
    expected = one_by_one(adapters, ["b", "s"], x[2:])
    with adapters.batched(["a", "r", "b", "s"]) as model:
        assert_close(model(x)[2:], expected)


def test_quantized_layers_inference_mode_and_autocast(tmp_path: Path) -> None:
    def quantized() -> nn.Module:
        model = One(8, 12)
        model.fc = Eighths(model.fc)
        return model

    chosen = {name: (adapter, ["fc"]) for name, (adapter, _) in SOME.items()}
    adapters, x = loaded(quantized, chosen, tmp_path / "quantized"), torch.randn(8, 3, 8)
    vit, images = loaded(zoo.small_vit, SOME, tmp_path / "vit"), zoo.images(8)
    with torch.inference_mode():
        assert_exact(adapters, NAMES, x)
        assert_exact(vit, NAMES, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(adapters, NAMES, x, 2e-2)
        assert_exact(vit, NAMES, images, 5e-2)
    vit.use("a")
    vit.model(images).sum().backward()  # the block has left no inference tensors


def test_values_are_replaced_without_a_new_compilation(tmp_path: Path) -> None:
    methods = {"live": RANDLORA, "next": RANDLORA, "other": RandLoRA(rank=3, seed=8)}
    chosen = {name: (method, ["fc"]) for name, method in methods.items()}
    adapters, images = loaded(lambda: One(8, 12), chosen, tmp_path), torch.randn(2, 5, 8)
    expected = one_by_one(adapters, ["next", "next"], images)
    adapters.use("live")
    counter = CompileCounter()
    compiled = torch.compile(adapters.model, backend=counter)
    with torch.no_grad():
        before, compilations = compiled(images), counter.frame_count
        adapters.replace("live", tmp_path / "next")
        after = compiled(images)
    assert compilations > 0 and counter.frame_count == compilations
    assert_close(after, expected)
    assert not torch.allclose(before, after, atol=1e-3)
    with adapters.batched(["other", "next"]):  # by another program than the compiled one
        assert_close(compiled(images)[1], expected[1])
    assert counter.frame_count == compilations
    with pytest.raises(UserError, match=r"'live' is .* Load it under another name"):
        adapters.replace("live", tmp_path / "other")
    with torch.no_grad():
        assert torch.equal(compiled(images), after)
