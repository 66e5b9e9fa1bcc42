"""Structured bases: products of small matrices stand for the matrix of the definition, which has full rank."""

import math

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import RandLoRA, delta_weights, trainable_parameters
from randlora_pl.adapters.kernels import common, hadamard
from randlora_pl.adapters.kernels.hadamard import Hadamard, block_size, copies, transform
from randlora_pl.adapters.random_bases import Distribution, WeightShape, draw
from tests.adapters import reference
from tests.adapters.cases import adapted_one
from tests.support.products import in_one_item, marked

# D, d and n r: square, cut off in a copy and in a block, several blocks, odd widths, more and fewer columns than d.
SIZES = [
    (12, 12, 12),
    (36, 12, 15),
    (13, 12, 12),
    (128, 128, 128),
    (384, 128, 130),
    (300, 128, 128),
    (390, 130, 64),
    (200, 192, 400),
    (269, 67, 70),
    (7, 1, 3),
]
sizes = in_one_item(("large", "small", "columns"), SIZES)


def signs(large: int, small: int, seed: int = 0) -> Tensor:
    drawn = draw(seed, "signs", 2, copies(large, small) * small, 1, Distribution("binary"), torch.device("cpu"))
    return drawn[..., 0].T.to(torch.int8)


def structured(large: int, small: int, columns: int) -> tuple[Hadamard, Tensor]:
    """Structured bases and the matrix (D, n r) that they stand for, written out entry by entry."""
    here = signs(large, small)
    matrix = reference.hadamard(here.tolist(), large, small, columns)
    return Hadamard(here, large, small, columns), torch.tensor(matrix, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=1e-11, atol=1e-11)


def randomised(in_features: int, out_features: int, **options: object) -> Tensor:
    """The update of one float64 layer with normal lambdas and gammas."""
    model, _ = adapted_one(RandLoRA(basis="hadamard", **options), in_features, out_features, torch.float64)
    for value in trainable_parameters(model).values():
        nn.init.normal_(value)
    return delta_weights(model)["fc"]


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix))


# The matrix


@in_one_item("size", [1, 2, 3, 4, 7, 12, 20, 36, 64, 67, 96])
def test_transforms_are_orthogonal_with_entries_of_unit_mean_square(size: int) -> None:
    matrix = transform(size)
    close(matrix, matrix.T)
    close(matrix @ matrix, size * torch.eye(size, dtype=torch.float64))
    expected = [[reference.orthogonal_entry(size, i, j) for j in range(size)] for i in range(size)]
    close(matrix, torch.tensor(expected, dtype=torch.float64))
    if size & (size - 1) == 0:
        assert matrix.abs().unique().tolist() == [1.0]


def test_blocks_have_64_rows_at_the_usual_widths() -> None:
    widths = (64, 128, 192, 384, 512, 768, 1024, 1152, 1280, 1408, 1664, 4096, 5120)
    assert {block_size(width) for width in widths} == {64}
    odd = {1: 1, 12: 12, 63: 63, 65: 65, 67: 67, 100: 100, 130: 65, 538: 269}
    assert {width: block_size(width) for width in odd} == odd


@sizes
def test_every_product_is_that_of_the_matrix(
    large: int, small: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases, b = structured(large, small, columns)
    generator = torch.Generator().manual_seed(1)
    tokens, others = (torch.randn(11, n, generator=generator, dtype=torch.float64) for n in (large, small))
    stack = torch.randn(columns, small, generator=generator, dtype=torch.float64)
    weight = torch.randn(large, small, generator=generator, dtype=torch.float64)
    turned = bases.mixed(stack, stack.dtype)
    close(bases.add_to(weight.clone(), turned, False), weight + b @ stack)
    close(bases.add_to(weight.T.clone(), turned, True), (weight + b @ stack).T)
    close(bases.unmixed(bases.reduce(weight)), b.T @ weight)
    for step in (512, 4, 11):
        monkeypatch.setattr(common, "AT_ONCE", step)
        close(bases.unmixed(bases.contract(bases.project(tokens), others)), (tokens @ b).T @ others)
    mixed = turned.flatten(0, 1)
    close(bases.project(tokens).flatten(1) @ mixed, tokens @ b @ stack)
    expected = others @ (b @ stack).T
    close(bases.expand(others @ mixed.T), expected)
    close(bases.expand(others @ mixed.T, torch.ones_like(expected)), 1 + expected)
    close(bases.unmixed(bases.contract(bases.project(tokens[:0]), others[:0])), torch.zeros_like(stack))


# Rank


@sizes
def test_the_update_has_the_rank_of_its_columns(large: int, small: int, columns: int) -> None:
    for r in {min(small, 5), 1, small}:
        update = randomised(small, large, rank=r, num_bases=max(1, columns // r))
        assert rank(update) == min(small, r * max(1, columns // r))
        assert rank(randomised(large, small, rank=r)) == small


@pytest.mark.parametrize(("r",), marked([(5,), (6,), (8,)], (5,).__eq__))  # 5 does not divide 768: 770 columns
def test_each_of_q_k_and_v_gets_an_update_of_full_rank(r: int) -> None:
    update = randomised(768, 2304, rank=r)
    assert [rank(block) for block in (update, *update.split(768))] == [768] * 4
    # So does every head: a structure that left out columns of one larger transform would give 21 of 64 here.
    assert {rank(head) for head in update.split(64)} == {64}


# Sharing


def test_two_signs_for_a_row_are_stored_and_the_structure_is_for_ever() -> None:
    shapes = [WeightShape("fc1", 3072, 768), WeightShape("fc2", 768, 3072), WeightShape("odd", 800, 500)]
    shared = RandLoRA(rank=6, basis="hadamard").bases(shapes, torch.device("cpu"))
    assert (shared.B.dtype, shared.B.numel()) == (torch.int8, 2 * 3072)
    assert shared.B.unique().tolist() == [-1, 1]
    assert shared.scale == 1
    assert math.isclose(shared.B.float().mean().item(), 0, abs_tol=0.1)
    shapes = [WeightShape("fc", 24, 16)]
    shared = RandLoRA(rank=4, basis="hadamard", seed=3).bases(shapes, torch.device("cpu"))
    assert hadamard.STRUCTURE == "hadamard/1"
    assert shared.fingerprint == "ebbd5fea04082705c166688130f39a59c6ef59e5b42b4106d82912452c9da5db"
    plain = shared.B.permute(1, 0, 2).float()
    assert shared.fingerprint != type(shared)(3, shared.A, plain, signs=True).fingerprint
    # A change of these orphans every adapter that exists: then change STRUCTURE too.
    b = Hadamard(signs(300, 192, seed=2024), 300, 192, 192).matrix(torch.float64)
    position = torch.arange(b.numel(), dtype=torch.float64).view_as(b)
    assert (b * torch.cos(position)).sum().item() == pytest.approx(52.537319033193526, rel=1e-9)
