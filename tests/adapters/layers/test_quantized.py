"""Quantised layers: an update beside a forward that is not ours, of a stand-in and of bitsandbytes if that is there."""

import copy
import itertools
import pickle
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from randlora_pl.adapters import (
    Adapter,
    AdapterSet,
    DoRA,
    LoRA,
    RandLoRA,
    VeRA,
    adapted_layers,
    delta_weights,
    disabled,
    inject,
    layers,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    trainable_parameters,
)
from randlora_pl.adapters.operations import detach
from randlora_pl.adapters.sites import _of_unit_vectors, dequantize
from randlora_pl.adapters.trained import update_buffers
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import METHODS, UNFIXED, WHOLE, One, assert_close, bases_of, optimizer_steps, randomise
from tests.support.products import in_one_item

ADDING = [method for method in METHODS if method not in (*WHOLE, "svft")]


class Eighths(nn.Linear):
    """A linear layer whose weight is whole eighths in eight bits, flat, so that nothing but itself can use it."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.load_state_dict(plain.state_dict())
        packed = (plain.weight.detach() * 8).round().clamp(-127, 127).to(torch.int8)
        self.weight = nn.Parameter(packed.flatten(), requires_grad=False)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return self.weight.view(self.out_features, self.in_features).to(dtype) / 8

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.unpacked(input.dtype), self.bias.to(input.dtype))


def pair(in_features: int = 20, out_features: int = 12, dtype: torch.dtype = torch.float32) -> tuple[One, One]:
    """A layer whose weight is whole eighths, and the same one quantized."""
    plain = One(in_features, out_features)
    with torch.no_grad():
        plain.fc.weight.copy_((plain.fc.weight * 40).round() / 8)
    quantized = One(in_features, out_features)
    quantized.fc = Eighths(plain.fc)
    return plain.to(dtype), quantized


def both(method: str, in_features: int = 20, out_features: int = 12) -> tuple[One, One]:
    """The two with one adapter, its tensors random."""
    plain, quantized = pair(in_features, out_features)
    for model in (plain, quantized):
        inject(model, METHODS[method](4, "packed"), ["fc"])
    randomise(plain)
    with torch.no_grad():
        own = {**trainable_parameters(plain), **update_buffers(plain)}
        for name, tensor in {**trainable_parameters(quantized), **update_buffers(quantized)}.items():
            tensor.copy_(own[name])  # also places that ties and the rounding of unpacked weights leave open
    return plain, quantized


@in_one_item("sizes", [(20, 12), (12, 20)])
@in_one_item("method", ADDING)
def test_a_quantized_layer_is_the_plain_one_with_an_update(method: str, sizes: tuple[int, int]) -> None:
    plain, quantized = both(method, *sizes)
    for tokens in (1, 60):
        results = []
        for model in (plain, quantized):
            x = torch.linspace(-1, 1, tokens * sizes[0]).view(tokens, -1).requires_grad_()
            output = model(x)
            values = [x, *trainable_parameters(model).values()]
            results.append((output, *torch.autograd.grad(output.square().sum(), values)))
            with torch.no_grad():
                assert_close(model(x), output, 1e-5)
        for first, second in zip(*results, strict=True):
            assert_close(second, first, 1e-4)
    if method not in UNFIXED:
        assert_close(*(delta_weights(model)["fc"] for model in (quantized, plain)), 1e-5)


@in_one_item("method", ["lora", "randlora", "vera", "nola", "kradapter", "shira", "pranc", "pranc-dense"])
def test_an_update_without_use_for_the_frozen_weight_does_not_unpack_it(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = both(method)[1]
    monkeypatch.setattr(Eighths, "unpacked", lambda *_: pytest.fail("unpacked"))
    monkeypatch.setattr(Eighths, "forward", lambda self, x: x.new_zeros(len(x), self.out_features))
    monkeypatch.setattr(layers, "dequantize", lambda *_: pytest.fail("unpacked"))
    assert model(torch.ones(3, 20)).abs().sum() > 0


class Casts(TorchDispatchMode):
    """Sizes of what is cast and multiplied entry by entry, from the size of an output of a token on."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.name() in ("aten::_to_copy", "aten::mul.Tensor", "aten::mul_.Tensor", "aten::mul.out"):
            self.sizes += [found.numel()] * (found.numel() > 96)
        return found


@in_one_item(("basis", "half"), itertools.product(["uniform", "ternary", "hadamard"], [False, True]))
def test_tokens_that_are_written_neither_build_s_nor_cast_b(basis: Any, half: bool) -> None:
    """Nothing is merged into a quantized weight; after the prompt and a token the update is two products."""
    _, quantized = pair(64, 96)
    sizes = []
    for adapted in (False, True):
        if adapted:
            inject(quantized, RandLoRA(rank=4, basis=basis), ["fc"])
            randomise(quantized)
        quantized.eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            for tokens in (200, 1):
                quantized(torch.randn(tokens, 64))
            with Casts() as casts:
                quantized(torch.randn(1, 64))
        sizes.append(casts.sizes)
    assert sizes[0] == sizes[1]  # of the frozen layer's own forward


def test_disabled_detached_copied_and_checkpointed() -> None:
    plain, quantized = pair()
    x = torch.randn(5, 20)
    expected = quantized(x)
    assert_close(expected, plain(x), 1e-6)
    inject(quantized, RandLoRA(rank=4), ["fc"])
    randomise(quantized)
    assert isinstance(quantized.fc, Eighths)
    adapted = quantized(x)
    for twin in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(twin(x), adapted)
        assert len(bases_of(twin)) == 1
        randomise(twin)
        assert not torch.equal(twin(x), adapted)
    with disabled(quantized):
        assert torch.equal(quantized(x), expected)
    values = list(trainable_parameters(quantized).values())
    gradients = [
        torch.autograd.grad(run(x).square().sum(), values)
        for run in (quantized, lambda value: checkpoint(quantized, value, use_reentrant=False))
    ]
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    detach(quantized)
    assert type(quantized.fc) is Eighths
    assert torch.equal(quantized(x), expected)


@pytest.mark.parametrize("action", [merge, merge_and_unload])
def test_merging_is_refused_and_changes_nothing(action: Any) -> None:
    _, quantized = both("lora")
    model = nn.ModuleDict({"first": One(8, 8), "second": quantized})
    detach(quantized)
    inject(model, LoRA(rank=2), [".*"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"second.fc"):
        action(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer.merged for layer in adapted_layers(model).values())
    with pytest.raises(UserError, match="quantized"):
        quantized.fc.merge()  # type: ignore[operator]


def test_blocks_of_a_quantized_weight() -> None:
    from tests.adapters.cases import FewHeads

    plain = FewHeads()
    with torch.no_grad():
        plain.qkv_proj.weight.copy_((plain.qkv_proj.weight * 40).round() / 8)
    quantized = FewHeads()
    quantized.qkv_proj = Eighths(plain.qkv_proj)
    for model in (plain, quantized):
        inject(model, DoRA(LoRA(rank=3, alpha=3.0)), ["q", "v"])
    values = zip(trainable_parameters(plain).values(), trainable_parameters(quantized).values(), strict=True)
    with torch.no_grad():
        for first, second in values:
            assert torch.allclose(first, second, atol=1e-5)  # magnitudes from the weight that the layer multiplies with
            first.add_(torch.randn_like(first))
            second.copy_(first)
    x = torch.randn(4, 3, 16)
    assert_close(quantized(x), plain(x), 1e-5)
    first, second = (delta_weights(model) for model in (plain, quantized))
    assert first.keys() == second.keys() == {"qkv_proj.q", "qkv_proj.v"}
    for name, delta in first.items():
        assert_close(second[name], delta, 1e-5)


def test_an_adapter_goes_from_the_quantized_model_into_the_plain_one(tmp_path: Path) -> None:
    plain, quantized = pair()
    inject(quantized, RandLoRA(rank=4), ["fc"])
    randomise(quantized)
    save_adapter(quantized, tmp_path / "adapter")
    load_adapter(plain, tmp_path / "adapter")
    x = torch.randn(5, 20)
    assert_close(plain(x), quantized(x), 1e-5)
    merge(plain)
    assert_close(plain(x), quantized(x), 1e-5)
    _, again = pair()
    again.load_state_dict({name: value for name, value in quantized.state_dict().items() if "delta" not in name})
    adapters = AdapterSet(again)
    adapters.load("one", tmp_path / "adapter")
    adapters.use({"one": 0.5})
    expected = (plain(x) + F.linear(x, again.fc.base_weight, again.fc.bias)) / 2  # type: ignore[arg-type]
    assert_close(again(x), expected, 1e-5)


def library(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for bitsandbytes: two classes, and the functions that unpack their weights."""
    bits = types.ModuleType(name)
    functional: Any = types.SimpleNamespace(
        dequantize_4bit=lambda data, state: data.view(state["shape"]).to(torch.float32) / 8,
        int8_vectorwise_dequant=lambda data, scales: data * scales[:, None] / 127,
    )
    monkeypatch.setattr(bits, "functional", functional, raising=False)
    monkeypatch.setitem(sys.modules, name, bits)
    return [type(kind, (Eighths,), {"__module__": f"{name}.nn.modules"}) for kind in ("Linear4bit", "Linear8bitLt")]


def test_a_library_unpacks_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the layer's products with all unit vectors, as an unknown class."""
    plain, _ = pair()
    calls: list[int] = []
    real = Eighths.forward
    monkeypatch.setattr(Eighths, "forward", lambda self, x: calls.append(len(x)) or real(self, x))
    of_units = dequantize(Eighths(plain.fc))
    assert calls == [20]
    assert_close(of_units, plain.fc.weight, 1e-6)
    four, eight = (kind(plain.fc) for kind in library("bits", monkeypatch))
    four.weight.quant_state, four.compute_dtype = {"shape": (12, 20)}, torch.bfloat16
    eight.weight, eight.state = nn.Parameter(eight.weight.view(12, 20), False), types.SimpleNamespace(SCB=None)
    eight.weight.SCB = torch.full((12,), 127 / 8)
    for moved in (False, True):  # a first forward moves the scales
        if moved:
            eight.state.SCB, eight.weight.SCB = eight.weight.SCB, None
        assert_close(dequantize(eight), plain.fc.weight, 1e-6)
    found = dequantize(four)
    assert found.dtype == torch.bfloat16 and torch.equal(found.float(), plain.fc.weight)
    quantized = One(20, 12)
    quantized.fc = four
    inject(quantized, DoRA(LoRA(rank=3, alpha=3.0)), ["fc"])
    assert torch.equal(quantized.fc.base_weight.float(), plain.fc.weight)  # type: ignore[union-attr, operator]
    assert calls == [20]
    eight.state.SCB = None
    four.weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=True)
    for layer in (four, eight):
        assert_close(dequantize(layer).float(), plain.fc.weight, 1e-2)  # bfloat16 with the bias
    assert calls == [20] * 3


# bitsandbytes, which runs on a CPU too


def bnb(kind: str) -> tuple[nn.Module, nn.Module]:
    """A layer of bitsandbytes, quantized, and a plain one with the weight that it multiplies with."""
    library = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes, the optional extra for 4 and 8 bits, is missing"
    )
    plain, quantized = One(64, 96), One(64, 96)
    if kind == "4-bit":
        layer = library.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = library.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    layer.load_state_dict(plain.fc.state_dict(), strict=False)
    quantized.fc = layer.to("cpu")
    quantized(torch.randn(2, 64))
    return plain, quantized


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
@pytest.mark.parametrize(
    "adapter",
    [
        RandLoRA(rank=4),
        LoRA(rank=4, alpha=4.0),
        VeRA(rank=8, alpha=8.0),
        DoRA(LoRA(rank=4, alpha=4.0)),
        RandLoRA(rank=4, basis="hadamard"),
    ],
    ids=["randlora", "lora", "vera", "dora", "hadamard"],
)
def test_layers_of_bitsandbytes(adapter: Adapter, kind: str) -> None:
    plain, quantized = bnb(kind)
    x = torch.randn(10, 64)
    weight = quantized.fc.weight
    frozen, bits = quantized(x).detach(), weight.detach().clone()
    dtype = getattr(quantized.fc, "compute_dtype", None)
    inject(quantized, adapter, ["fc"])
    assert getattr(quantized.fc, "compute_dtype", None) == dtype
    assert_close(quantized(x), frozen, 1e-6)
    base: Any = quantized.fc.base_weight  # type: ignore[union-attr]
    assert base.shape == (96, 64)
    assert_close(base, plain.fc.weight, 0.25)
    assert_close(base, _of_unit_vectors(quantized.fc, torch.float32), 1e-5)  # type: ignore[arg-type]
    moved = optimizer_steps(quantized, 3)
    assert all(moved.values())
    assert quantized.fc.weight is weight and torch.equal(weight, bits)
    randomise(quantized)
    twin = copy.deepcopy(quantized)
    assert_close(twin(x), quantized(x), 1e-6)
    assert_close(quantized(x) - frozen, x @ delta_weights(quantized)["fc"].T, 2e-2 if kind == "8-bit" else 1e-4)
    with disabled(quantized):
        assert_close(quantized(x), frozen, 1e-6)
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"\(Linear\dbit\w*\)"):
        merge(quantized)
