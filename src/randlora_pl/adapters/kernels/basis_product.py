"""Parts of a sum of scaled bases: B as a tensor, the form of a layer, S and its gradient, and W0 + B S.

Symbols as in `randlora_linear`. Products with ternary bases take additions alone on a CPU (section 6.6 of the paper).
Each row of B S is the sum of the rows of S at the +1 entries of B's row, minus the sum at its -1 entries. So B is two
lists of indices a row, and `torch.nn.functional.embedding_bag` adds up the rows. B^T G needs the lists of the columns.
The results differ from dense products by rounding only.

A layer has (2/s) D n r entries, 4 bytes each in the lists of the rows and again in the columns' lists: 16/s bytes per
entry of B (0.6 at s = 28), against 4 of a dense copy in float32. Layers of equal size share their lists.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters.kernels.common import (
    POWER,
    Choice,
    added,
    build_time,
    cheapest,
    cheapest_alone,
    enlarged,
    product_time,
    shrunk,
)
from randlora_pl.adapters.kernels.hadamard import Hadamard
from randlora_pl.adapters.kernels.triton_kernels import (
    MANY,
    form_stack,
    hadamard_mix,
    multiplies,
    packed,
    reduce_stack,
    sums,
    ternary_expand,
    ternary_project,
)
from randlora_pl.adapters.random_bases import Copies
from randlora_pl.utils.device import on_cuda, runs

Factors = tuple[Tensor, Tensor, Tensor]
"""Lambda (n, r), gamma (n, d) and A (r, d)."""


FEW = 20
"""Tokens for which the calls of a small layer take longer than what they compute."""

_SMALL = 1 << 20  # entries of its weight


class Stored:
    """B (D, n r) of one layer as a tensor of floats or small integers.

    All layers share one copy in each dtype of products. On a GPU its rows have a multiple of 64 entries, and a layer
    takes a multiple of 8 columns: tensor cores read others at half the speed. The columns beyond n r are multiplied by
    rows of zeros in S, so that the results have the same bits.

    Args:
        b: B (D, n, r) of the model, with at least the layer's sizes.
        large: D of the layer.
        count: n of the layer.
        rank: r of the layer.
        copies: Copies of B that the layers share.
    """

    def __init__(self, b: Tensor, large: int, count: int, rank: int, copies: Copies | None = None) -> None:
        self.b, self.large, self.count, self.rank = b, large, count, rank
        self.copies = Copies() if copies is None else copies
        self.width = self.inner = count * rank
        flat = rank == b.shape[2] or rank == 1 or count == 1
        self._view = b[:large, :count, :rank].flatten(1) if flat and b.dtype != torch.float16 else None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return B in a dtype, (D, `rows`), a view of the shared copy; in float16 times 2^-12: see `float16`."""
        if self._view is not None and dtype == self.b.dtype:
            return self._view
        padded = self._padded(dtype)
        count = self.b.shape[1] if padded else self.count

        def copy() -> Tensor:
            flat = self.b[:, :count, : self.rank].flatten(1)
            if not padded:
                return shrunk(flat.to(dtype, copy=True))
            whole = flat.new_zeros(len(flat), -(-flat.shape[1] // 64) * 64, dtype=dtype)
            whole[:, : flat.shape[1]] = flat
            return shrunk(whole)

        return self.copies.get((dtype, count, self.rank, padded), self.b, copy)[: self.large, : self.rows(dtype)]

    def rows(self, dtype: torch.dtype) -> int:
        """Return the rows of S in products of this dtype: n r, or the next multiple of 8."""
        return -(-self.inner // 8) * 8 if self._padded(dtype) else self.inner

    def _padded(self, dtype: torch.dtype) -> bool:
        return dtype != self.b.dtype and on_cuda(self.b)

    def mixed(self, stack: Tensor, dtype: torch.dtype) -> Tensor:
        """Return S, (n r, ...), in a dtype with zeros below, (`rows`, ...); S itself if it has these already."""
        missing = self.rows(dtype) - len(stack)
        stack = stack.to(dtype)
        return F.pad(stack, (0, 0) * (stack.dim() - 1) + (0, missing)) if missing else stack

    def add_to(self, weight: Tensor, mixed: Tensor, transposed: bool, factor: float = 1.0) -> Tensor:
        """Add ``factor`` B S (D, d), or its transpose, to a weight in place; ``mixed`` is the result of `mixed`."""
        b = self.matrix(weight.dtype)
        return weight.addmm_(*((mixed.T, b.T) if transposed else (b, mixed)), alpha=factor)

    def packed(self, tokens: Tensor) -> Tensor | None:
        """Return B in two bits per entry, if it consists of signs and a kernel multiplies so few tokens with it."""
        few = self.b.dtype == torch.int8 and tokens.shape[0] <= MANY and tokens.dtype != torch.float16
        fits = few and multiplies(tokens, tokens.dtype)
        if not fits or torch.compiler.is_compiling():  # the compiler would pack B at every use
            return None
        key, used = ("packed", self.count, self.rank), self.b[:, : self.count, : self.rank]
        return self.copies.get(key, self.b, lambda: packed(used.flatten(1)))[: self.large]

    def project(self, tokens: Tensor) -> Tensor:
        """Return ``tokens @ B``, (T, `rows`), for tokens (T, D)."""
        if (packed := self.packed(tokens)) is not None:
            return ternary_project(tokens, packed, self.rows(tokens.dtype))
        return tokens @ self.matrix(tokens.dtype)

    def contract(self, projected: Tensor, others: Tensor) -> Tensor:
        """Return ``B^T (tokens^T others)``, (`rows`, d), for projected tokens and others (T, d)."""
        return projected.T @ others

    def reduce(self, gradient: Tensor) -> Tensor:
        """Return ``B^T G``, (`rows`, d), for G (D, d)."""
        return self.matrix(gradient.dtype).T @ gradient

    def unmixed(self, stack: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the first n r rows of the result of `contract` or `reduce`, (n r, d), in any dtype."""
        return stack[: self.inner]

    def expand(self, projected: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return ``projected @ B^T``, (T, D), for projected (T, `rows`); with ``onto``, add it in place."""
        if (packed := self.packed(projected)) is not None:
            result = ternary_expand(projected, packed)
            return result if onto is None else onto.add_(result)
        b = self.matrix(projected.dtype).T
        return projected @ b if onto is None else onto.addmm_(projected, b)


class Form(NamedTuple):
    """Properties of a sum besides its tensors.

    Attributes:
        dtype: Dtype of the products that build B S.
        peft: True if S has PEFT's order.
        large: D.
        small: d.
        transposed: True if the weight is wider than tall.
        keep: True to keep W0 + B S for the backward pass and over the uses of one step, False to build it again, None
            to keep it if building is expensive.
        scales: Factors of lambda, applied in this order.
    """

    dtype: torch.dtype
    peft: bool
    large: int
    small: int
    transposed: bool
    keep: bool | None = None
    scales: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the weight."""
        return (self.small, self.large) if self.transposed else (self.large, self.small)

    def choose(self, basis: Stored | Hadamard, tokens: int, alone: bool, trains: bool, uses: int = 1) -> Choice:
        """Return the cheaper form; a structured W0 + B S is always built, because that is cheap.

        ``alone`` is True without a W0 to add B S to, ``trains`` if lambda or gamma needs a gradient. One built W0 + B S
        has ``uses`` products.
        """
        sizes = (tokens, self.large, self.small, basis.inner, basis.width)
        if alone:
            return cheapest_alone(*sizes, trains)
        choice = cheapest(*sizes, uses)
        return Choice(True, choice.project) if isinstance(basis, Hadamard) else choice

    def keeps(self, basis: Stored | Hadamard, tokens: Tensor) -> bool:
        """Return True if W0 + B S is kept for the backward pass.

        If ``keep`` is None: if building it again adds a twentieth to the layer's products. On a CPU a structured one is
        kept for a `few` tokens only.
        """
        if self.keep is not None:
            return self.keep
        structured = isinstance(basis, Hadamard)
        if on_cuda(tokens):
            return 20 * build_time(self.large, self.small, basis.width, structured) > product_time(
                tokens.shape[0], self.large, self.small
            )
        return self.few(tokens.shape[0]) if structured else 20 * basis.width > 3 * tokens.shape[0]

    def few(self, tokens: int) -> bool:
        """Return True if calls take longer than what they compute, so that S is kept for the backward pass, too."""
        return tokens <= FEW and self.large * self.small <= _SMALL

    def holds(self, training: bool, recomputes: bool) -> bool:
        """Return True if a W0 + B S that is kept for the backward pass is also kept over the uses of one step.

        It adds no memory to the peak then, as all layers keep theirs until the backward pass, unless activations are
        recomputed or nothing trains: there only ``keep=True`` keeps it.
        """
        return self.keep is True or (self.keep is None and training and not recomputes)


def scaled(lambdas: Tensor, scales: tuple[float, ...]) -> Tensor:
    """Return lambda times its factors; on a GPU in one product."""
    if on_cuda(lambdas):
        scales = (math.prod(scales),)
    for scale in scales:
        lambdas = lambdas if scale == 1 else lambdas * scale
    return lambdas


def stacked(
    factors: Factors, peft: bool, scales: tuple[float, ...], dtype: torch.dtype | None = None, rows: int = 0
) -> Tensor:
    """Return S, (n r, d).

    Row p = j r + k, which is multiplied by column p of B, is lambda_jk A_k gamma_j in the equation. PEFT and the
    official code have the same products in the order (k, j).

    Args:
        factors: Lambda, gamma and A.
        peft: True for PEFT's order.
        scales: Factors of lambda.
        dtype: Dtype of S, which is computed in lambda's and rounded once.
        rows: Rows of the result, if there are more than n r; zeros below.
    """
    lambdas, gammas, a = factors
    lambdas = scaled(lambdas, scales)
    if peft:
        product, gammas = lambdas.T[:, :, None] * a[:, None], gammas[None]
    else:
        product, gammas = lambdas[:, :, None] * a, gammas[:, None]
    size = lambdas.numel()
    if product.dtype == (dtype or product.dtype) and rows <= size:
        return product.mul_(gammas).flatten(0, 1)
    result = product.new_empty(max(rows, size), a.shape[1], dtype=dtype)
    torch.mul(product, gammas, out=result[:size].view(product.shape))
    if rows > size:
        result[size:] = 0
    return result


def unstacked(gradient: Tensor, factors: Factors, peft: bool, scales: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return the gradients of lambda (n, r) and gamma (n, d) from the gradient of S, (n r, d).

    The gradient may have any dtype; it is overwritten.
    """
    lambdas, gammas, a = factors
    if runs(gradient, gradient.dtype, lambdas.dtype, gammas.dtype, a.dtype):
        return reduce_stack(gradient, *factors, math.prod(scales), peft)
    count, rank = lambdas.shape
    gradient = gradient.view(rank, count, -1).transpose(0, 1) if peft else gradient.view(count, rank, -1)
    narrow = gradient.dtype.itemsize < a.dtype.itemsize
    gradient = gradient * a if narrow else gradient.to(a.dtype).mul_(a)  # (n, r, d)
    grad_lambdas = torch.bmm(gradient, gammas[:, :, None])[:, :, 0]
    return scaled(grad_lambdas, scales[::-1]), torch.bmm(scaled(lambdas, scales)[:, None], gradient)[:, 0]


def effective(weight: Tensor | None, basis: Stored | Hadamard, mixed: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """Return W0 + B S, or B S, in ``dtype``, with products in ``form.dtype``; a bfloat16 sum loses nothing: `added`.

    ``mixed`` is the result of `mixed_stack` in ``form.dtype``.
    """
    if isinstance(basis, Hadamard) and sums(mixed, weight, form.dtype, dtype) and basis.held:
        return basis.added(weight, mixed, form.dtype, dtype, form.transposed)
    if weight is not None and weight.dtype == form.dtype and weight.dtype != torch.bfloat16:
        return basis.add_to(weight.clone(memory_format=torch.contiguous_format), mixed, form.transposed).to(dtype)
    zeros = torch.zeros(form.shape, dtype=form.dtype, device=mixed.device)
    if form.dtype == torch.float16:  # B S is as small as S
        delta = basis.add_to(zeros, mixed, form.transposed, POWER).float().mul_(1 / POWER)
    else:
        delta = basis.add_to(zeros, mixed, form.transposed)
    return (delta if weight is None else added(weight, delta)).to(dtype)


def mixed_stack(basis: Stored | Hadamard, factors: Factors, form: Form, dtype: torch.dtype) -> Tensor:
    """Return S as products with B need it, in ``dtype``: see `mixed` of the bases."""
    lambdas, gammas, a = factors
    kernels = runs(lambdas, lambdas.dtype, gammas.dtype, a.dtype, dtype)
    scales = (*form.scales, *enlarged(dtype))
    if isinstance(basis, Hadamard):
        if kernels and basis.held:
            mixed = hadamard_mix(*factors, *basis.across, math.prod(scales), form.peft, dtype)
            return mixed.view(basis.blocks, basis.block, -1)
        return basis.mixed(stacked(factors, form.peft, scales), dtype)
    if kernels:
        return form_stack(*factors, math.prod(scales), form.peft, basis.rows(dtype), dtype)
    return stacked(factors, form.peft, scales, dtype, basis.rows(dtype))


ADDITION = 4
"""Multiply-adds of a dense product in the time of one addition by index; so lists are faster for s above 8.

Measured in float32 on an AVX-512 CPU with one and two threads, for 768 x 768 to 3072 x 768 and s of 8 to 100: 2.1 to
3.4 to build B S or reduce B^T G (4.6 at s = 28 in one case), 3 to 5 for tokens, which are transposed.
"""

_TILE = 128  # columns at once: rows of S and sums of this length stay in the caches


class Sparse(Stored):
    """B (D, n r) of one layer as lists of the indices of its +1 and -1 entries; dense in dtypes other than float32.

    Takes the arguments of `Stored`; ``width`` counts additions as multiplications.
    """

    def __init__(self, b: Tensor, large: int, count: int, rank: int, copies: Copies) -> None:
        super().__init__(b, large, count, rank, copies)
        self.width = math.ceil(ADDITION * density(b, copies) * self.inner)

    def add_to(self, weight: Tensor, mixed: Tensor, transposed: bool, factor: float = 1.0) -> Tensor:
        """Add ``factor`` B S (D, d), or its transpose, to a weight in place."""
        if weight.dtype != torch.float32 or factor != 1:
            return super().add_to(weight, mixed, transposed, factor)
        for part, totals in self._sums(mixed, columns=False):
            if transposed:
                weight[part] += totals.T
            else:
                weight[:, part] += totals
        return weight

    def project(self, tokens: Tensor) -> Tensor:
        """Return ``tokens @ B``, (T, n r), for tokens (T, D)."""
        if tokens.dtype != torch.float32:
            return super().project(tokens)
        result = tokens.new_empty(len(tokens), self.inner)
        for part, totals in self._sums(tokens.T, columns=True):
            result[part] = totals.T
        return result

    def reduce(self, gradient: Tensor) -> Tensor:
        """Return ``B^T G``, (n r, d), for G (D, d)."""
        if gradient.dtype != torch.float32:
            return super().reduce(gradient)
        result = gradient.new_empty(self.inner, gradient.shape[1])
        for part, totals in self._sums(gradient, columns=True):
            result[:, part] = totals
        return result

    def expand(self, projected: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return ``projected @ B^T``, (T, D), for projected (T, n r); with ``onto``, add it in place."""
        if projected.dtype != torch.float32:
            return super().expand(projected, onto)
        result = projected.new_zeros(len(projected), self.large) if onto is None else onto
        for part, totals in self._sums(projected.T, columns=False):
            result[part] += totals.T
        return result

    def _sums(self, rows: Tensor, columns: bool) -> Iterator[tuple[slice, Tensor]]:
        """Yield B R, or B^T R with ``columns``, for a matrix R in tiles of columns, each with its slice."""

        def entries() -> Tensor:
            b = self.b[: self.large, : self.count, : self.rank].flatten(1)
            b = b.T if columns else b
            return torch.cat([b == 1, b == -1])

        # The indices of all +1 and then of all -1 entries by row of B, or by column, and where rows end.
        key = ("lists", columns, self.large, self.count, self.rank)
        indices = self.copies.get((*key, "indices"), self.b, lambda: entries().nonzero()[:, 1].int())
        ends = self.copies.get((*key, "ends"), self.b, lambda: F.pad(entries().sum(1).cumsum(0), (1, 0)).int())
        for start in range(0, rows.shape[1], _TILE):
            part = slice(start, start + _TILE)
            bags = F.embedding_bag(indices, rows[:, part].contiguous(), ends, mode="sum", include_last_offset=True)
            plus, minus = bags.chunk(2)
            yield part, plus.sub_(minus)


def density(b: Tensor, copies: Copies) -> float:
    """Return the share of B's entries that are not zero."""
    return int(copies.get("entries", b, b.count_nonzero)) / b.numel()


def stored(b: Tensor, large: int, count: int, rank: int, copies: Copies, dtype: torch.dtype) -> Stored:
    """Return B of one layer, as lists where these take less time than dense products in ``dtype``.

    The other arguments are as of `Stored`.
    """
    signs = b.dtype == torch.int8 and dtype == torch.float32 and b.device.type == "cpu" and not on_cuda(b)
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or type(b) is not Tensor
    sparse = signs and not traced and b.numel() > 0 and ADDITION * density(b, copies) < 1
    return (Sparse if sparse else Stored)(b, large, count, rank, copies)
