"""How well adapters of one budget can express a given update (equations 6 to 8 of the paper).

LoRA: the truncated singular value decomposition is the best there is (Eckart & Young, 1936), so that

    ||W - B A||_F >= (sum_{i > k} sigma_i^2)^(1/2)                                                     (equation 8)

The paper writes the sum without its square root, which makes it the square of the norm on the left.

RandLoRA: lambda and gamma of equation 4 are fitted to the update by alternating least squares. For fixed lambda each
column of W is a least-squares problem of n unknowns, for fixed gamma the whole of W one of n r unknowns; both are
solved exactly in float64, so that the error never grows. A local optimum is what this finds, not necessarily the best.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from randlora_pl.adapters.base import WeightShape
from randlora_pl.adapters.methods.fixed_rank.lora import LoRA
from randlora_pl.adapters.methods.full_rank.randlora import RandLoRA
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.spectrum import truncated

RIDGE = 1e-12
"""Added to normal equations, relative to their mean diagonal entry: they may be singular."""


@dataclass(frozen=True)
class Fitted:
    """A fit of lambda (n, r) and gamma (n, d) to a matrix (D, d).

    Attributes:
        lambdas: Without any scaling, float64.
        gammas: float64.
        errors: ||W - sum||_F / ||W||_F at the start and after each sweep.
    """

    lambdas: Tensor
    gammas: Tensor
    errors: list[float]

    @property
    def error(self) -> float:
        """The last of the errors."""
        return self.errors[-1]


@dataclass(frozen=True)
class LayerFit:
    """What two methods leave of one update, relative to its Frobenius norm.

    Attributes:
        layer: Name of the layer.
        shape: (out, in).
        lora: ||W - B A||_F / ||W||_F for the best B A: equation 8.
        randlora: The same for the fitted sum of equation 4.
        bound: n epsilon / ||W||_F of equation 7, epsilon being the largest error of a segment of the decomposition that
            is fitted with its own bases (equation 6).
        lora_parameters: Of this layer.
        randlora_parameters: Of this layer.
    """

    layer: str
    shape: tuple[int, int]
    lora: float
    randlora: float
    bound: float
    lora_parameters: int
    randlora_parameters: int


def combined(b: Tensor, a: Tensor, lambdas: Tensor, gammas: Tensor) -> Tensor:
    """sum_j B_j diag(lambda_j) A diag(gamma_j), (D, d).

    Args:
        b: (D, n, r).
        a: (r, d).
        lambdas: (n, r).
        gammas: (n, d).
    """
    inner = torch.einsum("nr,rd,nd->nrd", lambdas, a, gammas)
    return b.flatten(1) @ inner.flatten(0, 1)


def fit(w: Tensor, b: Tensor, a: Tensor, sweeps: int = 100, tolerance: float = 1e-4) -> Fitted:
    """Fits lambda and gamma to a matrix by alternating least squares.

    Args:
        w: (D, d).
        b: (D, n, r), the bases.
        a: (r, d), the shared one.
        sweeps: The most rounds over both.
        tolerance: Ends once a round lowers the error by less than this share of it.
    """
    w, b, a = w.double(), b.double(), a.double()
    _, count, rank = b.shape
    flat = b.flatten(1)
    products, gram, norm = flat.T @ w, flat.T @ flat, float(w.norm())
    lambdas, gammas = torch.ones(count, rank, dtype=w.dtype), torch.zeros(count, w.shape[1], dtype=w.dtype)
    errors = [1.0 if norm > 0 else 0.0]
    for _ in range(sweeps if norm > 0 else 0):
        gammas = _gammas(products, gram, a, lambdas)
        lambdas = _lambdas(products, gram, a, gammas)
        size = lambdas.square().mean().sqrt()  # the product alone is determined: keep both of one order
        lambdas, gammas = lambdas / size, gammas * size
        errors.append(float((w - combined(b, a, lambdas, gammas)).norm()) / norm)
        if errors[-2] - errors[-1] < tolerance * errors[-1]:
            break
    return Fitted(lambdas, gammas, errors)


def _gammas(products: Tensor, gram: Tensor, a: Tensor, lambdas: Tensor) -> Tensor:
    """The best gamma (n, d) for fixed lambda: W[:, c] = sum_j gamma_j[c] B_j (lambda_j * A[:, c]) for each column c.

    Args:
        products: B^T W, (n r, d).
        gram: B^T B, (n r, n r).
        a: (r, d).
        lambdas: (n, r).
    """
    count, rank = lambdas.shape
    width = a.shape[1]
    blocks = gram.view(count, rank, count, rank)
    scaled = lambdas[:, :, None] * a  # (n, r, d)
    right = (scaled * products.view(count, rank, width)).sum(1).T  # (d, n)
    found = torch.empty(count, width, dtype=a.dtype)
    for start in range(0, width, 64):  # bounds the memory
        part = scaled[:, :, start : start + 64]
        half = torch.einsum("nrms,msc->cnrm", blocks, part)
        normal = torch.einsum("nrc,cnrm->cnm", part, half)
        found[:, start : start + 64] = _solve(normal, right[start : start + 64]).T
    return found


def _lambdas(products: Tensor, gram: Tensor, a: Tensor, gammas: Tensor) -> Tensor:
    """The best lambda (n, r) for fixed gamma: W = sum_ji lambda_ji b_ji (A_i * gamma_j)^T."""
    count, rank = len(gammas), len(a)
    rows = (a[None] * gammas[:, None]).flatten(0, 1)  # (n r, d)
    normal = gram * (rows @ rows.T)
    return _solve(normal[None], (products * rows).sum(1)[None])[0].view(count, rank)


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """Solutions (b, k) of positive semidefinite systems (b, k, k)."""
    mean = normal.diagonal(dim1=1, dim2=2).mean(1)
    ridge = (RIDGE * mean).clamp_min(torch.finfo(normal.dtype).tiny)
    factor, info = torch.linalg.cholesky_ex(
        normal + ridge[:, None, None] * torch.eye(normal.shape[1], dtype=normal.dtype)
    )
    if info.any():  # singular beyond the ridge
        least: Tensor = torch.linalg.lstsq(normal, right[..., None], driver="gelsd").solution
        return least[..., 0]
    solution: Tensor = torch.cholesky_solve(right[..., None], factor)
    return solution[..., 0]


def segments(w: Tensor, b: Tensor, a: Tensor, sweeps: int = 10) -> list[float]:
    """||U_j Sigma_j V_j^T - B_j Lambda_j A Gamma_j||_F for each of the n segments of the decomposition (equation 6).

    Args:
        w: (D, d).
        b: (D, n, r).
        a: (r, d).
        sweeps: Rounds of each fit.
    """
    u, values, v = torch.linalg.svd(w.double(), full_matrices=False)
    rank = b.shape[2]
    found = []
    for j in range(b.shape[1]):
        part = slice(j * rank, (j + 1) * rank)
        segment = u[:, part] * values[part] @ v[part]
        found.append(fit(segment, b[:, j : j + 1], a, sweeps).error * float(segment.norm()))
    return found


def represent(layer: str, update: Tensor, lora: LoRA, randlora: RandLoRA, bases: Bases, sweeps: int = 100) -> LayerFit:
    """What the best LoRA and a fitted RandLoRA leave of one update.

    Args:
        layer: Name of the layer.
        update: (out, in).
        lora: Its rank counts.
        randlora: Dense bases, full variant; its rank counts.
        bases: Of ``randlora``, at least as large as this layer needs.
        sweeps: The most rounds of the fit.
    """
    shape = WeightShape(layer, *update.shape)
    w = update if shape.out_features >= shape.in_features else update.T
    rank, count = randlora.rank_of(shape), randlora.bases_of(shape)
    b, a = bases.B[: shape.large, :count, :rank], bases.A[0, :rank, : shape.small]
    norm = float(w.double().norm())
    fitted = fit(w, b, a, sweeps)
    epsilon = max(segments(w, b, a), default=0.0)
    return LayerFit(
        layer, (shape.out_features, shape.in_features), truncated(w, lora.rank_of(shape)).error, fitted.error,
        count * epsilon / norm if norm > 0 else 0.0, lora.count(shape), randlora.count(shape),
    )  # fmt: skip


def mean_error(fits: list[LayerFit], which: str) -> float:
    """Root of the mean squared relative error over layers, of ``lora`` or ``randlora``."""
    return math.sqrt(sum(float(getattr(one, which)) ** 2 for one in fits) / max(1, len(fits)))
