"""Rank, stable rank, effective rank and truncation, against NumPy and matrices whose answer is known."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from randlora_pl.adapters.derived import spectrum, truncate
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import check_rank_or_error
from tests.support.products import in_one_item


def of_values(values: list[float], rows: int = 7, columns: int = 5) -> Tensor:
    """A float64 matrix with these singular values."""
    generator = torch.Generator().manual_seed(len(values))
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64)).Q[:, : len(values)]
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q[:, : len(values)]
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T


def reference(matrix: Tensor) -> tuple[int, float, float, float]:
    """The definitions, one by one, in NumPy: rank, stable rank, effective rank, norm."""
    array = matrix.double().numpy()
    values = np.linalg.svd(array, compute_uv=False)
    norm = math.sqrt(sum(float(entry) ** 2 for entry in array.flatten()))
    tolerance = max(array.shape) * float(np.finfo(np.float32).eps) * values[0]
    kept = [value for value in values if value > tolerance]
    entropy = -sum(value / sum(kept) * math.log(value / sum(kept)) for value in kept)
    rank = int(np.linalg.matrix_rank(array, tol=tolerance))
    return rank, norm**2 / float(np.linalg.norm(array, 2)) ** 2, math.exp(entropy), norm


@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)  # fmt: skip
def test_sizes_are_those_of_the_definitions(rows: int, columns: int, rank: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = scale * torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    found = spectrum(matrix)
    expected = reference(matrix)
    assert found.rank == expected[0] <= min(rows, columns, rank)
    assert (found.stable_rank, found.effective_rank, found.norm) == pytest.approx(expected[1:], rel=1e-6)
    assert 1 <= found.stable_rank <= found.rank + 1e-9 and 1 <= found.effective_rank <= found.rank + 1e-9


def test_zeros_and_extreme_sizes() -> None:
    empty = spectrum(torch.zeros(4, 3))
    assert (empty.rank, empty.stable_rank, empty.effective_rank, empty.norm) == (0, 0, 0, 0)
    low = truncate(torch.zeros(4, 3), error=0.1)
    assert (low.rank, low.error) == (1, 0) and torch.equal(low.left @ low.right, torch.zeros(4, 3).double())
    for scale in (1e-30, 1e30):
        assert spectrum(of_values([2, 2]) * scale).stable_rank == pytest.approx(2)
        assert truncate(of_values([4, 3]) * scale, rank=1).error == pytest.approx(0.6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(bad: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 2] = bad
    for function in (spectrum, lambda m, name: truncate(m, rank=1, name=name)):
        with pytest.raises(UserError, match="update"):
            function(matrix, "the update of fc")  # type: ignore[operator]


def test_truncation_is_the_best_there_is() -> None:
    """Its error is what was measured, and the tail of the singular values."""
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(3))
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    for k in range(1, 12):
        low = truncate(matrix, rank=k)
        measured = float((matrix.double() - low.left @ low.right).norm() / matrix.double().norm())
        tail = math.sqrt(sum(values[k:] ** 2) / sum(values**2))
        assert low.rank == k and low.left.shape == (20, k) and low.right.shape == (k, 12)
        assert (low.error, measured) == pytest.approx((tail, tail), abs=1e-9)
    assert truncate(matrix, rank=99).rank == 12


@settings(max_examples=30)
@example(error=0.0, seed=1)  # takes every singular value
@given(error=st.floats(0, 0.999), seed=st.integers(0, 100))
def test_smallest_rank_for_an_error(error: float, seed: int) -> None:
    matrix = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed))
    low = truncate(matrix, error=error)
    assert low.error <= error and (error > 0 or low.rank == 6)
    assert low.rank == 1 or truncate(matrix, rank=low.rank - 1).error > error


@in_one_item(
    ("wish", "message"),
    [
        ({}, "either --rank K or --error E"),
        ({"rank": 2, "error": 0.1}, "either --rank K or --error E"),
        ({"rank": 0}, "--rank is 0"),
        ({"error": 1.0}, "--error is 1.0"),
        ({"error": -0.1}, "--error is -0.1"),
        ({"error": float("nan")}, "--error is nan"),
    ],
)
def test_impossible_wishes(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_rank_or_error(wish.get("rank"), wish.get("error"))
