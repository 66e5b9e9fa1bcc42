"""Products with ternary bases by additions alone, on a CPU (section 6.6 of the paper).

Each row of B S is the sum of the rows of S at the +1 entries of B's row, minus the sum at its -1 entries. So B is two
lists of indices a row, and `torch.nn.functional.embedding_bag` adds up the rows. B^T G needs the lists of the columns.
The results differ from dense products by rounding only.

A layer has (2/s) D n r entries, 4 bytes each in the lists of the rows and again in the columns' lists: 16/s bytes per
entry of B (0.6 at s = 28), against 4 of a dense copy in float32. Layers of equal size share their lists.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters.kernels.basis_product import Stored
from randlora_pl.adapters.random_bases import Copies
from randlora_pl.utils.device import on_cuda

ADDITION = 4
"""Multiply-adds of a dense product in the time of one addition by index; so lists are faster for s above 8.

Measured in float32 on an AVX-512 CPU with one and two threads, for 768 x 768 to 3072 x 768 and s of 8 to 100: 2.1 to
3.4 to build B S or reduce B^T G (4.6 at s = 28 in one case), 3 to 5 for tokens, which are transposed.
"""

_TILE = 128  # columns at once: rows of S and sums of this length stay in the caches


class Sparse(Stored):
    """B (D, n r) of one layer as lists of the indices of its +1 and -1 entries; dense in dtypes besides float32.

    Takes the arguments of `Stored`; ``width`` counts additions as multiplications.
    """

    def __init__(self, b: Tensor, large: int, count: int, rank: int, copies: Copies) -> None:
        super().__init__(b, large, count, rank, copies)
        self.width = math.ceil(ADDITION * density(b, copies) * self.inner)

    def add_to(self, weight: Tensor, mixed: Tensor, transposed: bool, factor: float = 1.0) -> Tensor:
        """Add ``factor`` B S (D, d), or its transpose, to a weight in place."""
        if weight.dtype != torch.float32 or factor != 1:
            return super().add_to(weight, mixed, transposed, factor)
        for part, sums in self._sums(mixed, columns=False):
            if transposed:
                weight[part] += sums.T
            else:
                weight[:, part] += sums
        return weight

    def project(self, tokens: Tensor) -> Tensor:
        """Return ``tokens @ B``, (T, n r), for tokens (T, D)."""
        if tokens.dtype != torch.float32:
            return super().project(tokens)
        result = tokens.new_empty(len(tokens), self.inner)
        for part, sums in self._sums(tokens.T, columns=True):
            result[part] = sums.T
        return result

    def reduce(self, gradient: Tensor) -> Tensor:
        """Return ``B^T G``, (n r, d), for G (D, d)."""
        if gradient.dtype != torch.float32:
            return super().reduce(gradient)
        result = gradient.new_empty(self.inner, gradient.shape[1])
        for part, sums in self._sums(gradient, columns=True):
            result[:, part] = sums
        return result

    def expand(self, projected: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return ``projected @ B^T``, (T, D), for projected (T, n r); with ``onto``, add it in place."""
        if projected.dtype != torch.float32:
            return super().expand(projected, onto)
        result = projected.new_zeros(len(projected), self.large) if onto is None else onto
        for part, sums in self._sums(projected.T, columns=False):
            result[part] += sums.T
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
