"""Linear layers whose weight is a tensor that unpacks itself, as torchao's: of a stand-in, and of torchao itself."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters import (
    Adapter,
    AdapterSet,
    BitFit,
    DoRA,
    FullFineTuning,
    LoRA,
    RandLoRA,
    delta_weights,
    disabled,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    trainable_parameters,
)
from randlora_pl.adapters.operations import detach
from randlora_pl.adapters.sites import dequantize
from randlora_pl.models.execution import cast_frozen
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.packed import stored_bytes
from tests.adapters.cases import assert_close, randomise


class Eighths(Tensor):
    """Whole eighths in eight bits."""

    values: Tensor

    @staticmethod
    def __new__(cls: type["Eighths"], values: Tensor) -> "Eighths":
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.values = values
        return made  # type: ignore[no-any-return]

    def dequantize(self) -> Tensor:
        return self.values.float() / 8

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantize().to(x.dtype), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() in ("aten::detach", "aten::clone"), func
        return Eighths(args[0].values.clone())


class Model(nn.Module):
    """Two linear layers; the second, without an adapter, is behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.proj = nn.Linear(20, 24), nn.Linear(24, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.fc(x).tanh())  # type: ignore[no-any-return]


class Reader(nn.Module):
    """A parent that reads the weight of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.other(x), self.fc.weight)


def eighths(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            packed = (layer.weight.detach() * 40).round().to(torch.int8)
            layer.weight = nn.Parameter(Eighths(packed), requires_grad=False)


def int8(model: nn.Module) -> None:
    library = pytest.importorskip("torchao.quantization", reason='needs the extra: pip install ".[torchao]"')
    library.quantize_(model, library.Int8WeightOnlyConfig())


def pair(pack: Any) -> tuple[Model, Model]:
    """A model with packed weights, and a plain one of the values that they unpack to."""
    packed, plain = Model(), Model()
    plain.load_state_dict(packed.state_dict())
    pack(packed)
    for path in ("fc", "proj"):
        plain.get_submodule(path).weight = nn.Parameter(dequantize(packed.get_submodule(path)))
    return packed, plain


PACKS = [eighths, pytest.param(int8, marks=pytest.mark.torchao)]
METHODS = [LoRA(rank=3), RandLoRA(rank=4), RandLoRA(rank=4, basis="hadamard"), DoRA(LoRA(rank=3)), BitFit()]


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("adapter", METHODS, ids=["lora", "randlora", "hadamard", "dora", "bitfit"])
def test_outputs_and_gradients_are_those_of_unpacked_weights(adapter: Adapter, pack: Any) -> None:
    """Within rounding of float32: F.linear with the unpacked W0, plus the update."""
    both, results = pair(pack), []
    for model in both:
        inject(model, adapter, None if adapter.trains_base else ["fc"])
    randomise(both[0])
    with torch.no_grad():
        for name, value in trainable_parameters(both[0]).items():
            trainable_parameters(both[1])[name].copy_(value)
    x = torch.randn(2, 5, 20)
    for model in both:
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        results.append((output, *torch.autograd.grad(output.sum(), [inputs, *trainable_parameters(model).values()])))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, 2e-5)
    if not adapter.trains_base:
        assert_close(*(delta_weights(model)["fc"] for model in both), 1e-5)
        with disabled(both[0]), disabled(both[1]):
            assert_close(both[0](x), both[1](x), 1e-5)


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("adapter", [LoRA(rank=2), BitFit()], ids=["lora", "bitfit"])
def test_a_training_keeps_no_unpacked_weight(adapter: Adapter, pack: Any) -> None:
    """Of adapted layers and of others; the library's own product would keep each as float32."""
    model, _ = pair(pack)
    inject(model, adapter, None if adapter.trains_base else ["fc"])
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        model(torch.randn(3, 20, requires_grad=True))
    assert kept and not {(24, 20), (20, 24), (6, 24), (24, 6)} & set(kept)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(3, 20)).dtype == torch.bfloat16
    twin, x = copy.deepcopy(model), torch.randn(3, 20)
    assert torch.equal(twin(x), model(x))
    detach(model)
    assert type(model.fc) is type(model.proj) is nn.Linear


@pytest.mark.parametrize("pack", PACKS)
def test_packed_weights_are_counted_and_neither_cast_nor_merged_nor_trained(pack: Any) -> None:
    model, _ = pair(pack)
    before = dequantize(model.fc)
    sizes = [stored_bytes(parameter) for parameter in model.parameters()]
    assert sizes[0] == 24 * 20 + (0 if pack is eighths else 24 * (4 + 1)) and sizes[1] == 4 * 24
    with pytest.raises(UserError, match=r"FullFineTuning selects fc.weight, which is quantized.*RandLoRA"):
        inject(model, FullFineTuning())
    with pytest.raises(UserError, match=r"trained selects proj.weight, which is quantized"):
        inject(model, LoRA(rank=2), ["fc"], trained=["proj"])
    inject(model, LoRA(rank=2), ["fc"])
    randomise(model)
    assert cast_frozen(model, torch.bfloat16) == 2 and dequantize(model.fc).dtype == torch.float32
    for action in (merge, merge_and_unload):
        with pytest.raises(UserError, match=r"fc \(Linear\) is quantized"):
            action(model)
    merge(model, strict=False)
    assert torch.equal(dequantize(model.fc), before)


def test_a_layer_whose_weight_is_read_has_no_update() -> None:
    model = Reader()
    eighths(model)
    with pytest.raises(UserError, match="Reader reads its weight"):
        inject(model, LoRA(rank=2), ["fc"])


@pytest.mark.parametrize("pack", PACKS)
def test_an_adapter_fits_the_packed_and_the_plain_model(pack: Any, tmp_path: Path) -> None:
    model, plain = pair(pack)
    inject(model, RandLoRA(rank=4), ["fc"])
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    x = torch.randn(5, 20)
    expected = model(x)
    detach(model)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(x), expected)
    load_adapter(plain, tmp_path / "adapter")
    assert_close(plain(x), expected, 1e-5)
    merge_and_unload(plain)
    assert_close(plain(x), expected, 1e-5)


@pytest.mark.parametrize("pack", PACKS)
def test_adapters_of_a_packed_base_take_turns_and_share_a_batch(pack: Any, tmp_path: Path) -> None:
    base, _ = pair(pack)
    for name, adapter in {"one": RandLoRA(rank=4), "two": DoRA(LoRA(rank=3))}.items():
        model = copy.deepcopy(base)
        inject(model, adapter, ["fc"])
        randomise(model)
        save_adapter(model, tmp_path / name)
    adapters, x, order = AdapterSet(base.eval()), torch.randn(3, 20), ["two", None, "one"]
    rows = []
    with torch.no_grad():
        for name, own in zip(order, x.split(1), strict=True):
            if name is not None:
                adapters.load(name, tmp_path / name)
            with adapters.using(name):
                rows.append(base(own))
        with adapters.batched(order):
            assert_close(base(x), torch.cat(rows), 1e-5)


@pytest.mark.torchao
def test_products_in_half_precision_are_finite() -> None:
    """The library multiplies by whole numbers up to 127 and scales afterwards: 512 * 4 * 127 is above float16."""
    layer = nn.Linear(512, 8, bias=False)
    nn.init.constant_(layer.weight, 0.01)
    model = nn.Sequential(layer)
    int8(model)
    inject(model, LoRA(rank=2), ["0"])
    x = torch.full((1, 512), 4.0)
    assert_close(model(x.half()).float(), model(x), 1e-3)
