"""Dropout on the input of an update: which entries are dropped, and the fast path beside the plain two products."""

import itertools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.func import vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from randlora_pl.adapters import LoRA, RandLoRA, trainable_parameters
from randlora_pl.adapters.kernels import common
from randlora_pl.adapters.kernels.common import drop_mask, dropped, in_parts, keep_scaling
from tests.adapters.cases import adapted_one, randomise
from tests.adapters.kernels.test_randlora_linear import BASES, adapted, kept_bytes
from tests.support.products import covered, in_one_item, marked

COMPILED = [("hadamard", (60, 24))]


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
    torch.manual_seed(0)
    assert torch.equal(drop_mask(x, probability), mask)


def test_any_shape_has_a_mask_beside_its_input() -> None:
    shapes = [(), (0,), (0, 5), (1,), (7,), (3, 5), (2, 3, 4, 5), (1500, 3)]
    for shape, probability in itertools.product(shapes, (1e-9, 0.3, 1 - 1e-9)):
        x = torch.ones(shape)
        assert drop_mask(x, probability).shape == x.shape
        assert dropped(x, probability).shape == x.shape
        assert dropped(x.to(torch.bfloat16), probability).dtype == torch.bfloat16
    with torch.device("meta"):  # the default device of tensors that name none
        assert drop_mask(torch.zeros(5, 3, device="cpu"), 0.3).device.type == "cpu"


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


def test_samples_of_vmap_have_masks_of_their_own() -> None:
    model, _ = adapted_one(LoRA(rank=4, dropout=0.5), 24, 60)
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


@covered(("basis", "reentrant"), BASES, [False, True], strength=1)
def test_recomputed_activations_drop_the_same_entries(basis: str, reentrant: bool) -> None:
    model = adapted(24, 60, basis, dropout=0.3)
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


def test_a_layer_keeps_a_mask_and_not_what_was_dropped() -> None:
    """Its input is kept by others as well, such as the other projections of it; a mask has a quarter of its bytes."""
    x = torch.randn(700, 128, requires_grad=True)
    assert kept_bytes(RandLoRA(rank=4, dropout=0.1), 128, 512, x) - x.nbytes < 1.2 * x.numel()


def test_a_mask_that_no_gradient_needs_is_not_kept() -> None:
    model = adapted(24, 60, "dense", dropout=0.3)
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
    model = adapted(*shape, basis, dropout=0.3)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tokens in (200, 203, 207, 211):
        compiled(torch.randn(2, tokens, shape[0], dtype=torch.float64, requires_grad=True)).sum().backward()
    assert counter.frame_count <= 2


def test_few_tokens_do_not_build_the_update() -> None:
    model, _ = adapted_one(RandLoRA(rank=4, dropout=0.1), 128, 512)
    x = torch.randn(10, 128)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() < 2 * 10 * (2 * 512 * 128 + 128 * 128) * 1.1
