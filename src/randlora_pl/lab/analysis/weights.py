"""Updates of weights: ranks and singular values (compare Table 2 of the paper), and best approximations.

Approximations of a given update are by LoRA and RandLoRA (equations 6 to 8 of the paper).

LoRA: the truncated singular value decomposition is optimal (Eckart & Young, 1936), so that

    ||W - B A||_F >= (sum_{i > k} sigma_i^2)^(1/2)                                                     (equation 8)

The paper omits the square root, so that its right-hand side is the square of the norm.

RandLoRA: lambda and gamma of equation 4 are fitted to the update by alternating least squares. For fixed lambda each
column of W is a least-squares problem with n unknowns, for fixed gamma all of W is one with n r unknowns. Both are
solved exactly in float64, so that the error never increases. The result is a local optimum. With orthonormal bases and
signs the optimum has a closed form.

If B = [B_1 ... B_n] has orthonormal columns and A has entries of +1 and -1, the blocks of equation 4 do not interact:

    min ||W - sum_j B_j L_j A G_j||^2 = ||(I - B B^T) W||^2 + sum_j (||C_j||^2 - s_1(A * C_j)^2),    C_j = B_j^T W,

where s_1 is the largest singular value and * multiplies by entry. A block is the best rank-one fit lambda_j gamma_j^T
of A * C_j, because dividing by an entry of +1 or -1 changes no norm. So the fit needs no iteration.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from randlora_pl.adapters import AdapterFile, LoRA, RandLoRA
from randlora_pl.adapters.derived import Spectrum, spectrum, truncate
from randlora_pl.adapters.random_bases import Bases, WeightShape
from randlora_pl.adapters.select import match_budget
from randlora_pl.adapters.sites import find_sites, weight_key
from randlora_pl.interop.base_model import layer_updates, load_base, rows_of
from randlora_pl.lab.analysis.figures import FULL, colors, footnote, legend, new_figure
from randlora_pl.utils.errors import errors_in
from randlora_pl.utils.text import for_figure

NAMES = ("LoRA", "RandLoRA")
"""The methods that are compared."""


def methods_of(rank: int, shapes: list[WeightShape], seed: int) -> tuple[LoRA, RandLoRA]:
    """Return a LoRA of a rank, and the RandLoRA with about as many parameters on these weights."""
    matched, _ = match_budget(RandLoRA(match=f"lora:{rank}", seed=seed), shapes, torch.nn.Module())
    assert isinstance(matched, RandLoRA)
    return LoRA(rank=rank), matched


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


@dataclass(frozen=True)
class Fitted:
    """Fit of lambda (n, r) and gamma (n, d) to a matrix (D, d).

    Attributes:
        lambdas: Lambda without scaling, float64.
        gammas: Gamma, float64.
        errors: ||W - sum||_F / ||W||_F at the start and after each sweep.
    """

    lambdas: Tensor
    gammas: Tensor
    errors: list[float]

    @property
    def error(self) -> float:
        """Error after the last sweep."""
        return self.errors[-1]


@dataclass(frozen=True)
class LayerFit:
    """Errors of two methods on one update, relative to its Frobenius norm.

    Attributes:
        lora: ||W - B A||_F / ||W||_F for the best B A (equation 8).
        randlora: ||W - sum||_F / ||W||_F for the fitted sum of equation 4.
        bound: n epsilon / ||W||_F of equation 7, where epsilon is the largest error of a segment of the decomposition,
            each fitted with its own bases (equation 6).
        orthonormal: The same as ``randlora`` for orthonormal bases and an A of signs, by what leads the bases.
    """

    layer: str
    shape: tuple[int, int]
    lora: float
    randlora: float
    bound: float
    lora_parameters: int
    randlora_parameters: int
    orthonormal: Mapping[str, float] = field(default_factory=dict)

    @property
    def errors(self) -> dict[str, float]:
        """Relative errors by name: ``lora``, ``randlora``, and the orthonormal bases."""
        return {"lora": self.lora, "randlora": self.randlora, **self.orthonormal}

    def as_row(self) -> dict[str, Any]:
        """Return a table row."""
        own = {name: value for name, value in vars(self).items() if name != "orthonormal"}
        return own | {"shape": " x ".join(map(str, self.shape))} | dict(self.orthonormal)


def combined(b: Tensor, a: Tensor, lambdas: Tensor, gammas: Tensor) -> Tensor:
    """Return sum_j B_j diag(lambda_j) A diag(gamma_j), (D, d), of B (D, n, r), A (r, d), lambda (n, r) and gamma."""
    inner = torch.einsum("nr,rd,nd->nrd", lambdas, a, gammas)
    return b.flatten(1) @ inner.flatten(0, 1)


def fit(w: Tensor, b: Tensor, a: Tensor, sweeps: int = 100, tolerance: float = 1e-4) -> Fitted:
    """Fit lambda and gamma to a matrix (D, d) by alternating least squares.

    Args:
        w: Matrix.
        b: Bases (D, n, r).
        a: Shared basis (r, d).
        sweeps: Maximum number of sweeps over both.
        tolerance: Relative decrease of the error per sweep below which the fit stops.
    """
    w, b, a = w.double(), b.double(), a.double()
    (_, count, rank), width = b.shape, w.shape[1]
    flat = b.flatten(1)
    products, gram, norm = flat.T @ w, flat.T @ flat, float(w.norm())  # (n r, d) and (n r, n r)
    lambdas, gammas = torch.ones(count, rank, dtype=w.dtype), torch.zeros(count, width, dtype=w.dtype)
    errors = [1.0 if norm > 0 else 0.0]
    for _ in range(sweeps if norm > 0 else 0):
        # gamma for fixed lambda: W[:, c] = sum_j gamma_j[c] B_j (lambda_j * A[:, c]) for each column c
        scaled = lambdas[:, :, None] * a  # (n, r, d)
        right = (scaled * products.view(count, rank, width)).sum(1).T  # (d, n)
        for start in range(0, width, 64):  # limits the memory
            part = scaled[:, :, start : start + 64]
            half = torch.einsum("nrms,msc->cnrm", gram.view(count, rank, count, rank), part)
            normal = torch.einsum("nrc,cnrm->cnm", part, half)
            gammas[:, start : start + 64] = _solve(normal, right[start : start + 64]).T
        # lambda for fixed gamma: W = sum_ji lambda_ji b_ji (A_i * gamma_j)^T
        rows = (a[None] * gammas[:, None]).flatten(0, 1)  # (n r, d)
        normal = gram * (rows @ rows.T)
        lambdas = _solve(normal[None], (products * rows).sum(1)[None])[0].view(count, rank)
        size = lambdas.square().mean().sqrt()  # only the product is determined, so keep both on one scale
        lambdas, gammas = lambdas / size, gammas * size
        errors.append(float((w - combined(b, a, lambdas, gammas)).norm()) / norm)
        if errors[-2] - errors[-1] < tolerance * errors[-1]:
            break
    return Fitted(lambdas, gammas, errors)


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """Return the solutions (b, k) of positive semidefinite systems (b, k, k)."""
    mean = normal.diagonal(dim1=1, dim2=2).mean(1)
    # relative to the mean diagonal entry, since they may be singular
    ridge = (1e-12 * mean).clamp_min(torch.finfo(normal.dtype).tiny)
    factor, info = torch.linalg.cholesky_ex(
        normal + ridge[:, None, None] * torch.eye(normal.shape[1], dtype=normal.dtype)
    )
    if info.any():  # singular beyond the ridge
        least: Tensor = torch.linalg.lstsq(normal, right[..., None], driver="gelsd").solution
        return least[..., 0]
    solution: Tensor = torch.cholesky_solve(right[..., None], factor)
    return solution[..., 0]


def segments(w: Tensor, b: Tensor, a: Tensor, sweeps: int = 10) -> list[float]:
    """Return ||U_j Sigma_j V_j^T - B_j Lambda_j A Gamma_j||_F for each of the n segments of the SVD (equation 6)."""
    u, values, v = torch.linalg.svd(w.double(), full_matrices=False)
    rank = b.shape[2]
    lines = []
    for j in range(b.shape[1]):
        part = slice(j * rank, (j + 1) * rank)
        segment = u[:, part] * values[part] @ v[part]
        lines.append(fit(segment, b[:, j : j + 1], a, sweeps).error * float(segment.norm()))
    return lines


def represent(
    layer: str,
    update: Tensor,
    lora: LoRA,
    randlora: RandLoRA,
    bases: Bases,
    sweeps: int = 100,
    leads: Mapping[str, Tensor | None] | None = None,
) -> LayerFit:
    """Return the errors of the best LoRA and of a fitted RandLoRA on one update (out, in).

    Args:
        layer: Name of the layer.
        update: Update (out, in).
        lora: LoRA with its rank.
        randlora: RandLoRA with its rank, of the full variant.
        bases: Its dense bases, at least as large as this layer needs.
        sweeps: Maximum number of sweeps of the fit.
        leads: By name, the directions (larger side, k) that lead orthonormal bases, or None for random ones.
    """
    shape = WeightShape(layer, *update.shape)
    w = tall(update)
    rank, count = randlora.rank_of(shape), randlora.bases_of(shape)
    b, a = bases.B[: shape.large, :count, :rank], bases.A[0, :rank, : shape.small]
    norm = float(w.double().norm())
    fitted = fit(w, b, a, sweeps)
    epsilon = max(segments(w, b, a), default=0.0)
    return LayerFit(
        layer, (shape.out_features, shape.in_features), truncate(w, lora.rank_of(shape)).error, fitted.error,
        count * epsilon / norm if norm > 0 else 0.0, lora.count(shape), randlora.count(shape),
        {name: remaining(w, orthonormal(b, lead), a.sign()) for name, lead in (leads or {}).items()},
    )  # fmt: skip


def mean_error(fits: list[LayerFit], which: str) -> float:
    """Return the root mean square of the relative errors over layers, of one of `LayerFit.errors`."""
    return math.sqrt(sum(one.errors[which] ** 2 for one in fits) / max(1, len(fits)))


def represent_figure(fits: Mapping[int, list[LayerFit]], title: str) -> Figure:
    """Plot the error over all layers by number of parameters, and the error of each layer at the largest budget."""
    labels = {"lora": "LoRA, best possible", "randlora": "RandLoRA, fitted"}
    figure = new_figure(11.5, 4.8, title)
    budgets, layers = figure.subplots(1, 2, sharey=True)
    largest = fits[max(fits)]
    numbers = range(1, len(largest) + 1)
    names = list(dict.fromkeys(["randlora", *largest[0].errors]))
    for which, color in colors(names).items():
        counter = "lora_parameters" if which == "lora" else "randlora_parameters"
        counts = [sum(getattr(one, counter) for one in each) for each in fits.values()]
        errors = [mean_error(each, which) for each in fits.values()]
        label = labels.get(which, f"RandLoRA, {which}")
        style: dict[str, Any] = (
            {"marker": "o"} if which in labels else {"marker": "s", "markersize": 3, "linestyle": "--"}
        )
        budgets.plot(counts, errors, color=color, label=for_figure(label), **style)
        if which in labels:
            layers.plot(numbers, [one.errors[which] for one in largest], marker="o", markersize=4, color=color)
    budgets.set(xscale="log", xlabel="trained parameters", ylabel="relative error (Frobenius)", ylim=(0, 1.05))
    budgets.set_title("all layers: root of the mean square", fontsize=10)
    layers.set(xlabel="layer, in the model's order")
    layers.set_title(f"each layer, at the budget of LoRA rank {max(fits)}", fontsize=10)
    for axes in (budgets, layers):
        axes.grid(alpha=0.3)
    budgets.legend(loc="lower left", fontsize=9)
    footnote(
        figure,
        "LoRA: truncated SVD, the optimum; equation 8 with the square root that the paper omits (a Frobenius norm is "
        "the root of the sum of squares).\n"
        "RandLoRA: lambda and gamma of equation 4 by alternating least squares, a local optimum; with orthonormal "
        "bases and signs by the closed form, the optimum.",
    )
    return figure


SMALLEST = 1e-7
"""Lower limit of relative singular values in plots: below it is rounding of float32."""


@dataclass(frozen=True)
class LayerSpectrum:
    """Spectrum of the update (out, in) of one weight; singular values are float64, largest first."""

    layer: str
    shape: tuple[int, int]
    sizes: Spectrum
    values: Tensor

    def as_row(self) -> dict[str, Any]:
        """Return a table row, without the singular values."""
        out_features, in_features = self.shape
        return {"layer": self.layer, "out": out_features, "in": in_features, "full_rank": len(self.values)} | vars(
            self.sizes
        )


def matrix_updates(file: AdapterFile) -> dict[str, Tensor]:
    """Return the update (out, in) of each linear, convolution and attention weight of an adapter, by layer name.

    Full fine-tuning also changes embeddings, norms and biases, which are not matrices of a layer and are left out.

    Raises:
        UserError: The adapter cannot be read, or its base model is required and not available.
    """
    changes = layer_updates(file)
    if not file.adapter.trains_base:
        return changes
    part = load_base(file).submodule_for(file)
    whole = {weight_key(part, site): site for site in find_sites(part) if not site.block}
    return {site.shape.layer: rows_of(changes[key], site) for key, site in whole.items() if key in changes}


def layer_spectrum(layer: str, update: Tensor) -> LayerSpectrum:
    """Return the spectrum of one update (out, in).

    Raises:
        UserError: The update is not finite; the message has the layer.
    """
    with errors_in(layer):
        sizes = spectrum(update)
    out_features, in_features = update.shape
    return LayerSpectrum(layer, (out_features, in_features), sizes, torch.linalg.svdvals(update.detach().double()))


def common_layers(adapters: Sequence[Sequence[LayerSpectrum]]) -> list[str]:
    """Return the names of the layers that all adapters change, in order; if none, the layers of the first adapter."""
    shared = set.intersection(*({one.layer for one in layers} for layers in adapters))
    return [one.layer for one in adapters[0] if one.layer in shared] or [one.layer for one in adapters[0]]


def means(layers: Sequence[LayerSpectrum]) -> dict[str, float]:
    """Return means over layers: rank, stable rank, effective rank, norm, full rank, and rank divided by full rank."""
    count = max(1, len(layers))
    keys = ("rank", "stable_rank", "effective_rank", "norm")
    averages = {key: sum(float(getattr(one.sizes, key)) for one in layers) / count for key in keys}
    averages["full_rank"] = sum(len(one.values) for one in layers) / count
    return averages | {"share_of_full_rank": sum(one.sizes.rank / len(one.values) for one in layers) / count}


def curve(layers: Sequence[LayerSpectrum], points: int = 200) -> tuple[Any, Any, Any, Any]:
    """Return relative singular values over layers: (index / full rank, median, minimum, maximum).

    Layers of different width are interpolated to one axis; zero updates are left out.
    """
    fractions = np.linspace(0, 1, points)
    rows = []
    for one in layers:
        if one.sizes.spectral_norm > 0:
            values = (one.values / one.values[0]).clamp_min(SMALLEST).numpy()
            rows.append(np.interp(fractions, np.linspace(0, 1, len(values)), values))
    stacked = np.stack(rows or [np.full(points, np.nan)])
    return fractions, np.median(stacked, 0), stacked.min(0), stacked.max(0)


def spectrum_figure(adapters: Mapping[str, Sequence[LayerSpectrum]]) -> Figure:
    """Plot singular values, and rank and effective rank by layer, of several adapters; only common layers are drawn."""
    layers = common_layers(list(adapters.values()))
    figure = new_figure(14, 4.6, "")
    curves, ranks, effective = figure.subplots(1, 3)
    for label, color in colors(list(adapters)).items():
        mine = [one for one in adapters[label] if one.layer in layers]
        fractions, middle, low, high = curve(mine)
        curves.plot(fractions, middle, color=color, label=for_figure(label))
        curves.fill_between(fractions, low, high, color=color, alpha=0.15, linewidth=0)
        numbers = [layers.index(one.layer) + 1 for one in mine]
        size = 6 if color == FULL else 3  # visible behind the other markers
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": size, "linewidth": 1}
        ranks.plot(numbers, [one.sizes.rank / len(one.values) for one in mine], **style)
        effective.plot(numbers, [one.sizes.effective_rank / len(one.values) for one in mine], **style)
    curves.set(yscale="log", xlabel="index / full rank", ylabel="singular value / largest", ylim=(SMALLEST / 2, 2))
    curves.set_title("singular values: median and range over layers", fontsize=10)
    for axes, title in ((ranks, "rank / full rank"), (effective, "effective rank / full rank")):
        axes.set(ylim=(-0.03, 1.05), xlabel="layer, in the model's order")
        axes.set_title(title, fontsize=10)
    for axes in (curves, ranks, effective):
        axes.grid(alpha=0.3)
    legend(figure, curves)
    footnote(
        figure, f"{len(layers)} layers that all adapters change; effective rank: exp of the entropy of the spectrum"
    )
    return figure
