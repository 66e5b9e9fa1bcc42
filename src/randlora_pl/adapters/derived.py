"""Decompositions of weights: frozen factors of an update that are computed from W0, and the spectrum of an update.

The derived factors, such as the singular vectors of W0, are computed in float64 on the CPU, once per model, with
canonical signs, and are buffers of the update. Checkpoints contain them, so that a resumed run has the same bits.
Adapter files contain a sketch instead (see `sketch`), which is compared at loading. It refuses other weights, another
dtype of them, and singular vectors that another LAPACK rotates.

A method that uses them derives its adapter from `DerivedAdapter` and its update from `DerivedDelta`. The update's
constructor calls `decompose`, and then `hold` with the tensors that it needs:

    u, s, v = self.decompose(adapter, "gram/1", shape, weight, rank)  # float64, (out, r), (r), (r, in)
    self.hold(weight, U=u, V=s[:, None] * v)  # buffers self.U and self.V, float32

On the meta device only the shapes are computed. The buffers keep their bits if the model's dtype changes, so a forward
pass casts them to the dtype of what trains.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter, DeltaWeight
from randlora_pl.adapters.random_bases import Distribution, WeightShape, draw
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import check_rank_or_error

Triple = tuple[Tensor, Tensor, Tensor]
"""Left factor (out, r), values (r) and right factor (r, in)."""

RecipeName = Literal["svd/1", "gram/1", "minor/1", "qr/1"]

LARGEST = 2048
"""Smaller side above which the top singular vectors are iterated instead of computed, and stored in files."""

_MORE, _ITERATIONS = 16, 10  # further columns and steps of the subspace iteration


class DerivedAdapter(Adapter):
    """Base of methods with tensors derived from the frozen weights."""

    keep_derived: bool = False
    """Store the derived tensors in adapter files, so that loading computes and compares nothing."""

    reads_weight = True
    neutral: ClassVar[tuple[str, ...]] = ("keep_derived",)  # affects files only


class DerivedDelta(DeltaWeight):
    """Update with derived tensors."""

    derived: tuple[str, ...] = ()  # names of their buffers; the ones that files store are in ``kept``, too
    _stored = False
    _key: "tuple[DerivedAdapter, str] | None" = None

    def decompose(
        self, adapter: DerivedAdapter, recipe: RecipeName, shape: WeightShape, weight: Tensor, rank: int
    ) -> Triple:
        """Return the factors of a weight by a recipe, float64 on the CPU (or the meta device).

        Args:
            adapter: Adapter, for ``keep_derived``.
            recipe: ``svd/1`` and ``gram/1``: left singular vectors, singular values and right singular vectors, all of
                them by LAPACK, or the top ones by the Gram matrix (above `LARGEST` by subspace iteration). ``minor/1``:
                the left singular vectors of the smallest values. ``qr/1``: Q and R, with ones as values.
            shape: Name and shape of the weight.
            weight: W0, (out, in).
            rank: Number r of vectors.

        Raises:
            UserError: The weight is not finite.
        """
        self._stored = adapter.keep_derived or (recipe == "gram/1" and iterates(shape.small, rank))
        sizes = ((shape.out_features, rank), (rank,), (rank, shape.in_features))
        self._key, known = (adapter, shape.layer), _known.get()
        later = known is not None and (known.nothing or self._stored or self._key in known.tensors)
        if weight.is_meta or later:
            left, values, right = (torch.zeros(size, device=weight.device, dtype=torch.float64) for size in sizes)
            return left, values, right
        if not weight.isfinite().all():
            raise UserError(f"{shape.layer}: its weight is not finite (NaN or infinity). Load other weights.")
        return factors(recipe, weight.detach().to("cpu", torch.float64), rank)

    def hold(self, weight: Tensor, **tensors: Tensor) -> None:
        """Register derived tensors as buffers on the device of ``weight``, float32 unless the weight is float64."""
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        tensors = {name: tensor.to(weight.device, dtype).contiguous() for name, tensor in tensors.items()}
        if (known := _known.get()) is not None and self._key is not None:
            tensors = known.tensors.setdefault(self._key, tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.derived = tuple(tensors)
        self.kept = (*self.kept, *self.derived) if self._stored else self.kept

    def sketched(self) -> dict[str, Tensor]:
        """Return the matrices whose sketch identifies the derived tensors, by name."""
        return {name: getattr(self, name) for name in self.derived}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bits = {name: getattr(self, name) for name in self.derived}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in bits.items():
            if getattr(self, name).dtype != before.dtype:
                setattr(self, name, before.to(getattr(self, name).device))
        return self


def iterates(small: int, rank: int) -> bool:
    """Return True if ``gram/1`` iterates: for a large smaller side of which few vectors are needed."""
    return small > LARGEST and 2 * (rank + _MORE) <= small


def factors(recipe: RecipeName, matrix: Tensor, rank: int) -> Triple:
    """Return left factor, values and right factor of a matrix (out, in), float64, see `DerivedDelta.decompose`."""
    if recipe == "qr/1":
        left = torch.linalg.qr(matrix[:, :rank])[0]
        right = left.T @ matrix
        signs = torch.where(right.diagonal() < 0, -1.0, 1.0).to(matrix)
        return left * signs, torch.ones_like(signs), signs[:, None] * right
    if recipe == "minor/1":
        tall = matrix.shape[0] > matrix.shape[1]
        outer, inner = torch.linalg.qr(matrix) if tall else (None, matrix)  # both have W0's left singular vectors
        left = torch.linalg.eigh(inner @ inner.T)[1][:, :rank]
        left = left if outer is None else outer @ left
        return canonical(left, torch.linalg.vector_norm(left.T @ matrix, dim=1), left.T @ matrix)
    if recipe == "svd/1":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return canonical(left[:, :rank], values[:rank], right[:rank])
    if iterates(min(matrix.shape), rank):  # subspace iteration from Philox's start (Halko et al., 2011, algorithm 4.4)
        columns = matrix.shape[1], rank + _MORE
        q = draw(0, "derived", 1, *columns, Distribution("normal"), matrix.device)[0].to(matrix.dtype)
        for _ in range(_ITERATIONS):
            q = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ q)[0])[0]
        left, values, right = torch.linalg.svd(matrix @ q, full_matrices=False)
        return canonical(left[:, :rank], values[:rank], right[:rank] @ q.T)
    # Eigenvectors of the Gram matrix of the smaller side, and one product.
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    vectors = torch.linalg.eigh(gram)[1].flip(1)[:, :rank]
    other = vectors.T @ matrix if wide else matrix @ vectors
    values = torch.linalg.vector_norm(other, dim=1 if wide else 0)
    # Vectors of values that are zero but for rounding are arbitrary: zero, because they add nothing to the weight.
    inverse = torch.where(values > values.max() * 1e-12, 1 / values.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    if wide:
        return canonical(vectors, values, inverse[:, None] * other)
    return canonical(other * inverse, values, vectors.T)


def canonical(left: Tensor, values: Tensor, right: Tensor) -> Triple:
    """Return the factors with the signs of `signs_of` for the left vectors."""
    signs = signs_of(left)
    return left * signs, values, signs[:, None] * right


def signs_of(vectors: Tensor) -> Tensor:
    """Return the signs (r) that make the largest entry of each column of (n, r) positive, the first of equals."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(vectors)


# Each tensor is derived once while a file is checked and loaded


@dataclass
class _Known:
    nothing: bool
    tensors: dict[tuple[DerivedAdapter, str], dict[str, Tensor]] = field(default_factory=dict)


_known: ContextVar[_Known | None] = ContextVar("_known", default=None)


@contextmanager
def derived_once(nothing: bool = False) -> Iterator[None]:
    """Derive each tensor once inside the block, for updates that an adapter makes several times for one model.

    Stored tensors are not computed at all, because they are copied into the updates afterwards. With ``nothing``, all
    derived tensors are zeros, for a comparison of shapes.
    """
    before = _known.set(_Known(nothing))
    try:
        yield
    finally:
        _known.reset(before)


def _updates(module: nn.Module) -> Iterator[tuple[str, DerivedDelta]]:
    for path, each in module.named_modules():
        if isinstance(each, DerivedDelta):
            yield f"{path}." if path else "", each


def derived_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the derived tensors of all updates in a module, by name; the module may be an update itself."""
    return {f"{path}{name}": getattr(each, name) for path, each in _updates(module) for name in each.derived}


Sketches = dict[str, list[float]]
"""Sketches of derived tensors, by name."""


def sketches(module: nn.Module, stored: Collection[str]) -> Sketches:
    """Return the sketches of the derived tensors that are not ``stored``, by name; empty on the meta device."""
    return {
        f"{path}{name}": sketch(tensor)
        for path, each in _updates(module)
        if not {f"{path}{name}" for name in each.derived} <= set(stored)
        for name, tensor in each.sketched().items()
        if not tensor.is_meta
    }


def sketch(matrix: Tensor) -> list[float]:
    """Return 8 inner products of a matrix (m, n) with rank-one matrices of Philox signs, and its norm, in float64."""
    matrix = matrix.detach().to("cpu", torch.float64)
    signs = []
    for side, size in zip(("rows", "columns"), matrix.shape, strict=True):
        words = rng.words(0, f"sketch/{side}", torch.arange(8 * size))
        signs.append(((words >> 31) * 2 - 1).to(torch.float64).view(size, 8).T)
    rows, columns = signs
    return [*((rows @ matrix) * columns).sum(1).tolist(), float(torch.linalg.vector_norm(matrix))]


def sketch_problems(there: Mapping[str, list[float]], here: Mapping[str, list[float]]) -> list[str]:
    """Return the reason that the derived tensors of a file and a model differ, or nothing."""
    differ = []
    for name in sorted(there.keys() | here.keys()):
        one, two = there.get(name, []), here.get(name, [])
        same = len(one) == len(two) > 0 and all(abs(a - b) <= 1e-4 * two[-1] for a, b in zip(one, two, strict=True))
        if not same:
            differ.append(name)
    if not differ:
        return []
    return [
        f"{len(differ)} of {len(here)} derived tensors differ ({differ[0]}): other weights, or another dtype of them. "
        "If LAPACK alone differs, save with the derived tensors on the other machine: save_adapter(..., "
        "keep_derived=True)"
    ]


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


def truncate(matrix: Tensor, rank: int | None = None, error: float | None = None, name: str = "the matrix") -> LowRank:
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
