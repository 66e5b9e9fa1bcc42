"""Low precision: W0 + delta in bfloat16 and products in float16 lose nothing of a small update."""

import gc
import math
import struct
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters import Adapter, LoRA, RandLoRA
from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.kernels.basis_product import mixed_stack
from randlora_pl.adapters.kernels.common import added, built_again, rounded
from randlora_pl.adapters.layers import WeightedSum
from randlora_pl.adapters.methods.randlora import RandLoRADelta
from randlora_pl.adapters.random_bases import WeightShape
from tests.adapters.cases import METHODS, UNFIXED, WHOLE, assert_close
from tests.support.products import in_one_item, marked

RATIOS = (0.0005, 0.05)


def reference(total: float, index: int) -> float:
    """One entry, by Python's integers and the layout of the two formats."""
    word = (index * 0x9E3779B1) % 2**32
    for shift, factor in ((15, 0x85EBCA77), (13, 1)):
        signed = word - 2**32 if word >= 2**31 else word
        word = ((signed ^ (signed >> shift)) * factor) % 2**32
    (bits,) = struct.unpack("<I", struct.pack("<f", total))
    kept = (bits + 2 * (word & 0x7FFF)) % 2**32 >> 16 << 16
    result: float = struct.unpack("<f", struct.pack("<I", kept))[0]
    return result


def test_entries_are_those_of_the_reference() -> None:
    weight = torch.randn(40, 50).bfloat16()
    weight[0, :4] = torch.tensor([0.0, -0.0, 1.0, -2.0])
    delta = torch.randn(40, 50) * 0.003
    total = weight.float() + delta
    found = added(weight, delta)
    assert found.dtype == torch.bfloat16
    expected = [reference(value, index) for index, value in enumerate(total.flatten().tolist())]
    assert found.float().flatten().tolist() == expected
    assert torch.equal(added(weight.T, delta.T), rounded(total.T.contiguous(), torch.bfloat16))  # any layout


def test_plain_sums_gradients_and_numbers_of_a_diverged_run() -> None:
    weight, delta = torch.randn(8, 6), torch.randn(8, 6).double()
    assert torch.equal(added(weight, delta), weight + delta.float())
    assert torch.equal(added(weight.half(), delta), weight.half() + delta.half())
    assert torch.equal(rounded(weight, torch.float64), weight.double())
    weight, delta = torch.randn(8, 6).bfloat16().requires_grad_(), torch.randn(8, 6).requires_grad_()
    upstream = torch.randn(8, 6).bfloat16()
    found = torch.autograd.grad(added(weight, delta), (weight, delta), upstream)
    assert torch.equal(found[0], upstream) and torch.equal(found[1], upstream.float())
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int32)  # NaNs, infinities
    found = rounded(bits.view(torch.float32).repeat(500, 1), torch.bfloat16)
    assert found[:, :3].isnan().all() and (found[:, 3] == math.inf).all() and (found[:, 4] == -math.inf).all()


@torch.no_grad()
def update(adapter: Adapter, ratio: float, weight: Tensor) -> DeltaWeight:
    """An update of a method, its start plus noise of such a size that the update has a size relative to the weight."""
    shape = WeightShape("fc", *weight.shape)
    made = adapter.delta_weight(shape, weight, adapter.bases([shape], torch.device("cpu")))
    values = {name: value for name, value in made.named_parameters() if name != "magnitude"}
    starts = {name: value.clone() * (name != "betas") for name, value in values.items()}  # NoLA's own start is not zero
    noise = {name: torch.randn(value.shape) for name, value in values.items()}

    def size(factor: float) -> float:
        for name, value in values.items():
            value.copy_(starts[name] + factor * noise[name])
        return float(getattr(made, "inner", made).change(weight).norm() / weight.float().norm())

    factor = 1e-3 if ratio else 0.0
    found = size(factor)
    for _ in range(8 if ratio else 0):
        factor *= math.sqrt(ratio / found)  # updates have degree 1 or 2 in the noise
        found = size(factor)
    assert ratio / 2 <= found <= 2 * ratio
    return made


def slope(found: Tensor, weight: Tensor, expected: Tensor) -> float:
    """The part of an update that arrives: 1 is all of it."""
    return float(
        ((found.detach().float() - weight.float()) * expected.detach()).sum() / expected.detach().square().sum()
    )


@pytest.mark.parametrize(("ratios",), marked([(RATIOS,), ((0.0015, 0.005, 0.015),)], lambda row: row == (RATIOS,)))
@in_one_item("method", [method for method in METHODS if method not in (*WHOLE, *UNFIXED, "pranc-dense")])  # as pranc
@torch.no_grad()
def test_every_method_keeps_small_updates(method: str, ratios: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(288, 192)).bfloat16()
    for ratio in ratios:
        made = update(METHODS[method](12, "packed"), ratio, weight)
        change = made.change(weight).float()
        entries = int(change.count_nonzero())  # few of a sparse method
        tolerance = 0.01 + 4 * 2.6 * min(1, 5e-4 / ratio) / math.sqrt(entries)
        assert slope(made.effective_weight(weight), weight, change) == pytest.approx(1, abs=tolerance)
        whole = WeightedSum([made], [1.0])
        assert slope(whole.effective_weight(weight), weight, change) == pytest.approx(1, abs=tolerance)
    plain = (weight + made.change(weight).to(torch.bfloat16) * 0.01).float()
    assert (
        slope(plain, weight, change * 0.01) < 0.5 or 2 * entries < weight.numel()
    )  # what rounding to the nearest would lose
    zero = update(METHODS[method](12, "packed"), 0.0, weight)
    assert torch.equal(zero.effective_weight(weight), weight)


@in_one_item(
    "method",
    [RandLoRA(rank=12), RandLoRA(rank=12, basis="hadamard"), RandLoRA(rank=12, basis="ternary"), LoRA(rank=64)],
)
def test_a_layer_with_a_built_weight_uses_all_of_a_small_update(method: Adapter) -> None:
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(288, 192)).bfloat16()
    unit = torch.eye(192).bfloat16().repeat(8, 1).requires_grad_()  # a product with it is the weight in use
    made = update(method, RATIOS[0], weight)
    built = made.add(unit, weight, None)[:192].T
    assert torch.equal(built, made.effective_weight(weight))
    with torch.autocast("cpu", torch.bfloat16):
        built = made.add(unit, weight, None)[:192].T
    assert slope(built, weight, made.change(weight)) == pytest.approx(1, abs=0.06)


# Weights that the backward pass builds again


@in_one_item(("bias", "x_trains"), [(True, True), (False, True), (True, False)])
def test_gradients_are_the_same_and_no_weight_is_kept(bias: bool, x_trains: bool) -> None:
    scale = torch.randn(30, 1, dtype=torch.float64, requires_grad=True)
    weight, x = torch.randn(30, 20, dtype=torch.float64), torch.randn(2, 5, 20, dtype=torch.float64)
    offset = torch.randn(30, dtype=torch.float64, requires_grad=True) if bias else None
    built: list[weakref.ref[Tensor]] = []

    def build() -> Tensor:
        made = weight * (1 + scale)
        built.append(weakref.ref(made))
        return made

    outputs = built_again(x.requires_grad_(x_trains), build, offset)
    gc.collect()
    assert [made() for made in built] == [None]
    expected = F.linear(x, weight * (1 + scale), offset)
    assert_close(outputs, expected, 1e-12)
    inputs = [each for each in (scale, x, offset) if each is not None and each.requires_grad]
    gradient = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(each, inputs, gradient) for each in (outputs, expected)), strict=True)
    for first, second in pairs:
        assert_close(first, second, 1e-12)
    assert len(built) == 2


# Products in float16: small values of S survive, results and gradients are those of float32


OUT, IN = 896, 896  # the query of Qwen2-0.5B, which `recipes/commonsense_official` trains with these rates
RATE, WARMUP = 1e-4, 100


def first_step(**options: object) -> tuple[RandLoRADelta, Tensor]:
    """A layer after one step of Adam, which is as long as its learning rate whatever the gradient is."""
    torch.manual_seed(0)
    shape = WeightShape("q", OUT, IN)
    adapter = RandLoRA(rank=10, alpha=20, init="lambda", **options)  # type: ignore[arg-type]
    weight = 0.02 * torch.randn(OUT, IN)
    delta = adapter.delta_weight(shape, weight, adapter.bases([shape], torch.device("cpu")))
    with torch.no_grad():
        delta.lambdas.add_(torch.randn(delta.lambdas.shape).sign(), alpha=RATE / WARMUP)
    return delta, weight


def stacks(delta: RandLoRADelta) -> tuple[Tensor, Tensor]:
    """S in float32 and in float16 products, both as real numbers."""
    exact, half = (
        mixed_stack(delta.basis(), delta.tensors(), delta.form(), dtype) for dtype in (torch.float32, torch.float16)
    )
    return exact.double(), half.double() / 2**12


@in_one_item("basis", ["uniform", "hadamard"])
@torch.no_grad()
def test_less_than_one_percent_of_s_vanishes_after_the_first_step(basis: str) -> None:
    delta, weight = first_step(basis=basis)
    exact, half = stacks(delta)
    assert float(((half == 0) & (exact != 0)).double().mean()) < 0.01
    assert float((half - exact).norm() / exact.norm()) < 0.1
    assert float((exact.half() == 0).double().mean()) > 0.99  # as it would be without the factor
    with torch.autocast("cpu", torch.float16):
        found = delta.effective_weight(weight) - weight
    change = delta.change(torch.empty(0))
    assert float((found * change).sum() / change.square().sum()) == pytest.approx(1, abs=0.02)


@in_one_item(
    ("basis", "tokens", "shape"),
    [
        (basis, tokens, shape)
        for basis in ("uniform", "hadamard")
        for tokens in (8, 400)
        for shape in ((96, 160), (160, 96))
    ],
)
def test_outputs_and_scaled_gradients_are_those_of_float32(basis: str, tokens: int, shape: tuple[int, int]) -> None:
    """Thin products and built weights, with the loss scale that GradScaler starts with, for small and for large S."""
    torch.manual_seed(0)
    where = WeightShape("fc", *shape)
    adapter = RandLoRA(rank=4, basis=basis, init="lambda")
    weight = 0.02 * torch.randn(shape)
    delta = adapter.delta_weight(where, weight, adapter.bases([where], torch.device("cpu")))
    scale = 2.0**16
    for size in (1e-6, 1e-3, 0.02):
        with torch.no_grad():
            delta.lambdas.copy_(size * torch.randn(delta.lambdas.shape))
        x, upstream = torch.randn(tokens, shape[1]).half(), torch.randn(tokens, shape[0]) / tokens / 100
        found = []
        for half in (False, True):
            inputs = (x if half else x.float()).clone().requires_grad_()
            with torch.autocast("cpu", torch.float16, enabled=half):
                for own in (weight, None):  # with W0, and the update's part alone
                    out = delta.contribution(inputs, lambda: weight) if own is None else delta.add(inputs, own, None)
                    loss = (out.float() * upstream).sum() * scale
                    gradients = torch.autograd.grad(loss, (inputs, delta.lambdas, delta.gammas))
                    found.append([out.detach().float(), *(each.float() / scale for each in gradients)])
        for own, pair in enumerate(zip(found[:2], found[2:], strict=True)):
            for place, (one, other) in enumerate(zip(*pair, strict=True)):
                alone = own == 1 and place < 2 and size == 1e-6  # B S itself is subnormal
                assert (one - other).norm() <= (0.1 if alone else 0.002) * one.norm(), (size, own, place)


def test_the_range() -> None:
    delta, _ = first_step()
    with torch.no_grad():
        delta.lambdas.fill_(1.0)
        exact, _ = stacks(delta)
        delta.lambdas.mul_(15.9 / exact.abs().max())
        exact, half = stacks(delta)
    assert half.isfinite().all() and (half - exact).norm() <= 1e-3 * exact.norm()
