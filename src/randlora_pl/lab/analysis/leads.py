"""Orthonormal bases with chosen directions, and the share of an update that RandLoRA captures with them.

If B = [B_1 ... B_n] has orthonormal columns and A has entries of +1 and -1, the blocks of equation 4 do not interact:

    min ||W - sum_j B_j L_j A G_j||^2 = ||(I - B B^T) W||^2 + sum_j (||C_j||^2 - s_1(A * C_j)^2),    C_j = B_j^T W,

where s_1 is the largest singular value and * multiplies by entry. A block is the best rank-one fit lambda_j gamma_j^T
of A * C_j, because dividing by an entry of +1 or -1 changes no norm. So the fit needs no iteration.
"""

import math

import torch
from torch import Tensor


def tall(matrix: Tensor) -> Tensor:
    """Return a matrix, transposed if it is wider than tall: the bases are on the larger side."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def directions(matrix: Tensor) -> Tensor:
    """Return the singular vectors (D, k) of a matrix's larger side, float64, without values that are rounding."""
    left, values, _ = torch.linalg.svd(tall(matrix).double(), full_matrices=False)
    kept: Tensor = left[:, values > max(matrix.shape) * torch.finfo(torch.float32).eps * values.max()]
    return kept


def orthonormal(b: Tensor, lead: Tensor | None = None) -> Tensor:
    """Return bases (D, n, r) with orthonormal columns, float64, from random ones.

    Args:
        b: Random bases (D, n, r).
        lead: Directions (D, k), of which the first n become the first column of one block each; all random if None.

    Returns:
        Bases of the same shape. Their n r columns may be more than D: the last columns are then zero.
    """
    large, count, rank = b.shape
    columns = b.double().transpose(1, 2).flatten(1)  # the first columns of all blocks first, so that they stay
    if lead is not None:
        number = min(count, lead.shape[1])
        columns[:, :number] = lead[:, :number]
    filled = columns.new_zeros(large, rank * count)
    filled[:, :large] = torch.linalg.qr(columns)[0]
    return filled.view(large, rank, count).transpose(1, 2)


def remaining(w: Tensor, b: Tensor, signs: Tensor) -> float:
    """Return min ||W - sum||_F / ||W||_F for a matrix (D, d), by the closed form.

    Args:
        w: Matrix (D, d).
        b: Bases (D, n, r) whose columns are orthonormal or zero.
        signs: A (r, d) with entries of +1 and -1.
    """
    w = w.double()
    blocks = torch.einsum("dnr,dc->nrc", b.double(), w) * signs.double()  # A * C_j
    captured = torch.linalg.eigvalsh(blocks @ blocks.mT)[:, -1].sum()
    total = w.square().sum()
    return math.sqrt(max(0.0, 1 - float(captured / total))) if total > 0 else 0.0
