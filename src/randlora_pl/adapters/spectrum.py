"""Rank, stable rank, effective rank and norms of a matrix, and its best low-rank approximations.

Everything is computed from one singular value decomposition in float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import check_rank_or_error


@dataclass(frozen=True)
class Spectrum:
    """Ranks and norms of one matrix.

    Attributes:
        rank: Number of singular values above the tolerance, ``max(out, in) * eps * s_1`` with float32's eps (as
            ``torch.linalg.matrix_rank``); smaller values are rounding of a float32 matrix.
        stable_rank: ||M||_F^2 / ||M||_2^2 (Rudelson & Vershynin, 2007), at most the rank; 0 for a zero matrix.
        effective_rank: exp of the entropy of the singular values divided by their sum (Roy & Vetterli, 2007), without
            values below the tolerance; at most the rank; 0 for a zero matrix.
        norm: Frobenius norm.
        spectral_norm: Largest singular value.
    """

    rank: int
    stable_rank: float
    effective_rank: float
    norm: float
    spectral_norm: float


@dataclass(frozen=True)
class LowRank:
    """Approximation ``left @ right`` of a matrix; both factors contain the square roots of the singular values."""

    left: Tensor  # (out, k), float64
    right: Tensor  # (k, in), float64
    error: float  # ||M - left right||_F / ||M||_F; 0 for a zero matrix

    @property
    def rank(self) -> int:
        """Rank k of the factors."""
        return self.left.shape[1]


def spectrum(matrix: Tensor, name: str = "the matrix") -> Spectrum:
    """Return the ranks and norms of a matrix (out, in) of any floating dtype.

    Raises:
        UserError: The matrix is not finite; the message has its name.
    """
    values = torch.linalg.svdvals(_checked(matrix, name))
    largest = float(values[0]) if len(values) else 0.0
    if largest == 0:
        return Spectrum(0, 0.0, 0.0, 0.0, 0.0)
    kept = values[values > max(matrix.shape) * torch.finfo(torch.float32).eps * largest]
    fractions = kept / kept.sum()
    entropy = float(torch.special.entr(fractions).sum())
    squares = float((values / largest).square().sum())  # avoids overflow and underflow
    return Spectrum(len(kept), squares, math.exp(entropy), largest * math.sqrt(squares), largest)


def truncated(matrix: Tensor, rank: int | None = None, error: float | None = None, name: str = "the matrix") -> LowRank:
    """Return the best low-rank approximation of a matrix (out, in) (Eckart & Young, 1936).

    Args:
        matrix: Matrix of any floating dtype.
        rank: Maximum rank k; limited by the smaller side.
        error: Alternative to ``rank``: use the smallest k >= 1 whose relative error in the Frobenius norm is at most
            this.
        name: Name of the matrix in errors.

    Raises:
        UserError: The matrix is not finite, or not exactly one of rank (positive integer) and error (0 <= error < 1)
            is given.
    """
    check_rank_or_error(rank, error)
    u, values, v = torch.linalg.svd(_checked(matrix, name), full_matrices=False)
    squares = (values / values[0]).square() if values[0] > 0 else torch.zeros_like(values)
    # Squared errors of ranks 0, 1, ..., summed from the smallest value up.
    residual = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    relative = (residual / residual[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    k = max(1, int((relative <= error).nonzero()[0])) if error is not None else min(rank or 1, len(values))
    roots = values[:k].sqrt()
    return LowRank(u[:, :k] * roots, roots[:, None] * v[:k], float(relative[k]))


def _checked(matrix: Tensor, name: str) -> Tensor:
    """Return the matrix in float64; raise an error if it is not finite."""
    if not torch.isfinite(matrix).all():
        raise UserError(f"{name} is not finite (NaN or infinity): training diverged. Lower the learning rate or alpha.")
    return matrix.detach().double()
