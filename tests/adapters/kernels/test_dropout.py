"""Dropout on the input of an update: which entries are dropped, and the fast path beside the plain two products."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.func import vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from randlora_pl.adapters import LoRA, RandLoRA, inject, trainable_parameters
from randlora_pl.adapters.kernels import basis_product as sum_parts
from randlora_pl.adapters.kernels import common
from randlora_pl.adapters.kernels.common import Choice, drop_mask, dropped, in_parts, keep_scaling
from tests.adapters.cases import One, assert_close, randomise
from tests.adapters.kernels.test_randlora_linear import BASES, FORMS, adapted, every_basis
from tests.support.products import covered, in_one_item, marked

COMPILED = [("hadamard", (60, 24))]
SHAPES = [(24, 24), (24, 60), (60, 24), (130, 390), (300, 130)]


def dropping(in_features: int, out_features: int, basis: str, probability: float = 0.3) -> One:
    model = adapted(in_features, out_features, basis)
    model.fc.delta.dropout = probability  # type: ignore[union-attr]
    return model


def plain(model: One, x: Tensor, probability: float = 0.3) -> Tensor:
    """Two products that autograd differentiates, with the masks that the layer draws."""
    delta = model.fc.delta.change(torch.empty(0))  # type: ignore[union-attr, operator]
    kept = (~drop_mask(x, probability)).to(x.dtype) * keep_scaling(x, probability)
    return F.linear(x, model.fc.weight, model.fc.bias) + F.linear(x * kept, delta)


# The masks


@in_one_item("probability", [0.0005, 0.05, 0.1, 0.5, 0.77, 0.9995])
def test_entries_are_dropped_with_their_probability_and_by_themselves(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.empty(3000, 401)
    mask = drop_mask(x, probability)
    assert mask.dtype == torch.bool
    assert mask.shape == x.shape
    deviation = (probability * (1 - probability)) ** 0.5
    assert abs(mask.float().mean().item() - probability) < 4 * deviation / x.numel() ** 0.5
    entries = mask.flatten().double() - probability
    for rest in range(4):  # a word of random bits has four of them
        assert abs(entries[rest::4].mean().item()) < 5 * deviation / (x.numel() / 4) ** 0.5
    for away in (1, 2, 3, 4, 401, 512 * 401):  # uncorrelated with their neighbours, those of a word and of a part
        product = (entries[away:] * entries[:-away]).mean().item()
        assert abs(product) < 5 * deviation**2 / (x.numel() - away) ** 0.5
    assert not torch.equal(drop_mask(x, probability), mask)


def test_a_seed_gives_the_mask_again() -> None:
    masks = []
    for _ in range(2):
        torch.manual_seed(7)
        masks.append(drop_mask(torch.empty(1100, 30), 0.2))
    assert torch.equal(*masks)


@pytest.mark.parametrize("probability", [1e-9, 0.3, 1 - 1e-9])
def test_any_shape_has_a_mask(probability: float) -> None:
    for shape in ((), (0,), (0, 5), (1,), (7,), (3, 5), (2, 3, 4, 5), (1500, 3)):
        x = torch.ones(shape)
        assert drop_mask(x, probability).shape == x.shape
        assert dropped(x, probability).shape == x.shape
        assert dropped(x.to(torch.bfloat16), probability).dtype == torch.bfloat16


@in_one_item("probability", [0.0004, 0.0031, 0.05, 0.3, 0.9, 0.999])
def test_the_expected_value_stays(probability: float) -> None:
    """Also where the probability is rounded: dropped and scaled by the same one."""
    torch.manual_seed(0)
    x = torch.ones(1000, 1000)
    share = drop_mask(x, probability).float().mean().item()
    deviation = (probability / (1 - probability) / 1e6) ** 0.5
    assert (1 - share) * keep_scaling(x, probability) == pytest.approx(1, abs=5 * deviation)
    assert keep_scaling(x, probability) == pytest.approx(1 / (1 - probability), rel=0.01)
    out = dropped(x, probability)
    assert out.mean().item() == pytest.approx(1, abs=5 * deviation)
    assert out.unique().tolist() == pytest.approx([0, keep_scaling(x, probability)])


def test_a_mask_is_made_beside_its_input() -> None:
    with torch.device("meta"):  # the default device of tensors that name none
        assert drop_mask(torch.zeros(5, 3, device="cpu"), 0.3).device.type == "cpu"


def test_samples_of_vmap_have_masks_of_their_own() -> None:
    model = One(24, 60)
    inject(model, LoRA(rank=4, dropout=0.5), ["fc"])
    randomise(model, 0.5)
    x = torch.randn(1, 24).expand(2, 24)
    alike = vmap(model, randomness="same")(x)
    assert torch.equal(alike[0], alike[1])
    apart = vmap(model, randomness="different")(x)
    assert not torch.allclose(apart[0], apart[1])


def test_parts_cover_all_tokens_in_order() -> None:
    for count in (0, 1, 511, 512, 513, 2000):
        tokens = torch.arange(count)
        parts = [tokens[part] for part in in_parts(tokens)]
        assert torch.equal(torch.cat(parts), tokens)
        assert all(len(part) <= common.AT_ONCE for part in parts)


# The fast path


@covered(("shape", "form", "basis"), SHAPES, FORMS, BASES)
def test_every_form_gives_the_numbers_and_gradients_of_the_two_products(
    shape: tuple[int, int], form: Choice, basis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sum_parts, "cheapest_alone", lambda *_: form)
    monkeypatch.setattr(common, "AT_ONCE", 4)
    model = dropping(*shape, basis)
    model.fc.bias.requires_grad_()
    values = [model.fc.bias, *trainable_parameters(model).values()]
    for size in ((7, 3), (1,), (0,), (), (2, 2, 2)):
        x = torch.randn(*size, shape[0], dtype=torch.float64, requires_grad=True)
        results = []
        for run in (model, lambda entry: plain(model, entry)):
            torch.manual_seed(3)
            output = run(x)
            weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
            results.append((output, *torch.autograd.grad((output * weights).sum(), [x, *values])))
        for fast, slow in zip(*results, strict=True):
            assert fast.shape == slow.shape
            assert torch.allclose(fast, slow, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            torch.manual_seed(3)
            assert torch.allclose(model(x), results[0][0], rtol=1e-12, atol=1e-12)


@covered(("needs", "basis"), itertools.product((False, True), repeat=4), BASES, strength=1)
def test_any_part_may_be_frozen(needs: tuple[bool, ...], basis: str) -> None:
    for shape in ((24, 60), (60, 24)):
        model = dropping(*shape, basis)
        delta = model.fc.delta
        x = torch.randn(70, shape[0], dtype=torch.float64)
        tensors = [x, model.fc.bias, delta.lambdas, delta.gammas]  # type: ignore[union-attr]
        for tensor, need in zip(tensors, needs, strict=True):
            tensor.requires_grad_(need)  # type: ignore[operator]
        results = []
        for run in (model, lambda entry, model=model: plain(model, entry)):
            torch.manual_seed(3)
            output = run(x)
            assert output.requires_grad == any(needs)
            chosen = [tensor for tensor in tensors if tensor.requires_grad]
            results.append((output, *(torch.autograd.grad(output.square().sum(), chosen) if chosen else ())))
        for fast, slow in zip(*results, strict=True):
            assert torch.allclose(fast, slow, rtol=1e-10, atol=1e-10)


@every_basis
def test_tokens_without_a_gradient_are_left_out(basis: str) -> None:
    for shape in ((24, 60), (60, 24)):
        model = dropping(*shape, basis)
        x = torch.randn(80, shape[0], dtype=torch.float64, requires_grad=True)
        upper = torch.randn(80, shape[1], dtype=torch.float64)
        upper[8:] = 0
        values = [x, *trainable_parameters(model).values()]
        results = []
        for run in (model, lambda entry, model=model: plain(model, entry)):
            torch.manual_seed(3)
            results.append(torch.autograd.grad((run(x) * upper).sum(), values))
        for fast, slow in zip(*results, strict=True):
            assert torch.allclose(fast, slow, rtol=1e-10, atol=1e-10)


@covered(("basis", "reentrant"), BASES, [False, True], strength=1)
def test_recomputed_activations_drop_the_same_entries(basis: str, reentrant: bool) -> None:
    model = dropping(24, 60, basis)
    x = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    gradients = []
    for run in (model, lambda entry: checkpoint(model, entry, use_reentrant=reentrant)):
        torch.manual_seed(3)
        model.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        gradients.append([x.grad, *(value.grad for value in trainable_parameters(model).values())])
    for first, second in zip(*gradients, strict=True):
        assert first is not None and second is not None
        assert torch.equal(first, second)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("basis", ["uniform", "hadamard"])
def test_bfloat16_keeps_its_dtypes(basis: Any, autocast: bool) -> None:
    for shape in ((128, 256), (256, 128)):
        model = One(*shape)
        inject(model, RandLoRA(rank=5, dropout=0.3, basis=basis), ["fc"])
        randomise(model, 0.5)
        x = torch.randn(300, shape[0])
        torch.manual_seed(3)
        exact = model(x).detach()
        if not autocast:
            model.fc.weight.data, model.fc.bias.data = model.fc.weight.bfloat16(), model.fc.bias.bfloat16()
            x = x.bfloat16()
        x.requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(x)
            assert output.dtype == torch.bfloat16
            assert_close(output.float(), exact, 0.03)
            output.float().square().mean().backward()
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        assert all(value.grad.dtype == torch.float32 for value in trainable_parameters(model).values())  # type: ignore[union-attr]


def test_a_layer_keeps_a_mask_and_not_what_was_dropped() -> None:
    """Its input is kept by others as well, such as the other projections of it; a mask has a quarter of its bytes."""
    model = One(128, 512)
    inject(model, RandLoRA(rank=4, dropout=0.1), ["fc"])
    x = torch.randn(700, 128, requires_grad=True)
    kept: dict[int, int] = {}
    known = {x.untyped_storage().data_ptr(), *(value.untyped_storage().data_ptr() for value in model.parameters())}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    shared = sum(value.nbytes for value in (model.fc.delta.bases.A, model.fc.delta.bases.B))  # type: ignore[union-attr, operator]
    assert sum(kept.values()) - shared < 1.2 * x.numel()


def test_a_mask_that_no_gradient_needs_is_not_kept() -> None:
    model = dropping(24, 60, "dense")
    for value in trainable_parameters(model).values():
        value.requires_grad_(False)
    model.fc.bias.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        model(torch.randn(9, 24, dtype=torch.float64))
    assert all(tensor.dtype != torch.bool for tensor in kept)


@pytest.mark.parametrize(
    ("basis", "shape"), marked(itertools.product(BASES, [(24, 60), (60, 24)]), COMPILED.__contains__)
)
def test_other_numbers_of_tokens_are_not_compiled_again(shape: tuple[int, int], basis: str) -> None:
    """Twice at most: for the first number, and for any."""
    model = dropping(*shape, basis)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tokens in (200, 203, 207, 211):
        compiled(torch.randn(2, tokens, shape[0], dtype=torch.float64, requires_grad=True)).sum().backward()
    assert counter.frame_count <= 2


def test_few_tokens_do_not_build_the_update() -> None:
    model = One(128, 512)
    inject(model, RandLoRA(rank=4, dropout=0.1), ["fc"])
    x = torch.randn(10, 128)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() < 2 * 10 * (2 * 512 * 128 + 128 * 128) * 1.1
