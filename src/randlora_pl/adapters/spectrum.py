"""How much of a matrix there is: rank, stable rank, effective rank, norm; and its best approximations of lower rank.

Everything comes from one singular value decomposition in float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.rank_or_error import check_rank_or_error


@dataclass(frozen=True)
class Spectrum:
    """Sizes of one matrix.

    Attributes:
        rank: Number of singular values above the tolerance, ``max(out, in) * eps * s_1`` with float32's eps (the rule
            of ``torch.linalg.matrix_rank``): what is smaller is rounding of a float32 matrix.
        stable_rank: ||M||_F^2 / ||M||_2^2 (Rudelson & Vershynin, 2007), at most the rank; 0 for a matrix of zeros.
        effective_rank: exp of the entropy of the singular values divided by their sum (Roy & Vetterli, 2007), those
            below the tolerance left out; at most the rank; 0 for a matrix of zeros.
        norm: Frobenius norm.
        spectral_norm: The largest singular value.
    """

    rank: int
    stable_rank: float
    effective_rank: float
    norm: float
    spectral_norm: float


@dataclass(frozen=True)
class LowRank:
    """An approximation ``left @ right`` of a matrix.

    Attributes:
        left: (out, k), float64.
        right: (k, in), float64; the singular values are shared out evenly, as their square roots.
        error: ||M - left right||_F / ||M||_F; 0 for a matrix of zeros.
    """

    left: Tensor
    right: Tensor
    error: float

    @property
    def rank(self) -> int:
        """The number k of columns and rows."""
        return self.left.shape[1]


def spectrum(matrix: Tensor, name: str = "the matrix") -> Spectrum:
    """Rank, stable and effective rank, and norms of a matrix (out, in) of any floating dtype.

    Raises:
        UserError: It has an entry that is not finite; says its name.
    """
    values = torch.linalg.svdvals(_checked(matrix, name))
    largest = float(values[0]) if len(values) else 0.0
    if largest == 0:
        return Spectrum(0, 0.0, 0.0, 0.0, 0.0)
    kept = values[values > max(matrix.shape) * torch.finfo(torch.float32).eps * largest]
    shares = kept / kept.sum()
    entropy = float(torch.special.entr(shares).sum())
    squares = float((values / largest).square().sum())  # no overflow, no underflow
    return Spectrum(len(kept), squares, math.exp(entropy), largest * math.sqrt(squares), largest)


def truncated(matrix: Tensor, rank: int | None = None, error: float | None = None, name: str = "the matrix") -> LowRank:
    """The best approximation of a matrix (out, in) by one of low rank (Eckart & Young, 1936).

    Args:
        matrix: Any floating dtype.
        rank: The largest rank k to use; at most the smaller side is.
        error: Instead: use the smallest k whose relative error in the Frobenius norm is at most this. At least 1.
        name: What to call it in an error.

    Raises:
        UserError: The matrix has an entry that is not finite, or not exactly one of rank and error is given in its
            range: a positive whole number, or 0 <= error < 1.
    """
    check_rank_or_error(rank, error)
    u, values, v = torch.linalg.svd(_checked(matrix, name), full_matrices=False)
    squares = (values / values[0]).square() if values[0] > 0 else torch.zeros_like(values)
    # What ranks 0, 1, ... leave, summed from the smallest value up.
    left_over = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    relative = (left_over / left_over[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    k = max(1, int((relative <= error).nonzero()[0])) if error is not None else min(rank or 1, len(values))
    roots = values[:k].sqrt()
    return LowRank(u[:, :k] * roots, roots[:, None] * v[:k], float(relative[k]))


def _checked(matrix: Tensor, name: str) -> Tensor:
    """The matrix in float64."""
    if not torch.isfinite(matrix).all():
        raise UserError(
            f"{name} is not finite (NaN or infinity): the training diverged. Lower the learning rate or alpha."
        )
    return matrix.detach().double()
