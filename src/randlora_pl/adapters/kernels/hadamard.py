"""Structured bases: B is not stored, and is cheap to apply.

    B[k d + q b + i, p] = s[k d + q b + i'] H[i, i'] O[q, q'] t[p mod d],   p mod d = q' b + i'

for the larger side D and the smaller side d of a weight: stacked copies k of a d x d orthogonal matrix, the last one
cut off at D rows. H (b, b) and O (m, m) with b m = d are fixed orthogonal transforms with entries of unit mean square,
s and t are random signs. As matrices, one copy is the product ``(I_m x H) diag(s_k) (O x I_b) diag(t)``: O mixes the
blocks, H mixes inside each block, and the signs before each of them prevent that common parts of the bases (the same
A, equal scalings) add up in one block. This is the randomized Hadamard transform (Ailon and Chazelle, 2009), stacked
with new signs as in Fastfood (Le, Sarlos and Smola, 2013).

Copies are better than one D x D transform without some of its columns: a block of b rows depends on b values instead
of b d / D, so that every row block of a packed q/k/v weight has an update of full rank. They need no padding: the
first copy is square and orthogonal, so that B has rank min(d, n r) for any D. Columns beyond d repeat the first ones
with their own lambda and gamma.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.common import enlarged, in_parts, shrunk
from randlora_pl.adapters.kernels.triton_kernels import hadamard_expand, hadamard_project, hadamard_unmix, multiplies
from randlora_pl.adapters.random_bases import Copies
from randlora_pl.utils.device import runs

STRUCTURE = "hadamard/1"
"""Name and version of the structure, part of the fingerprint; changes whenever an entry would change."""

BLOCK = 64
"""Minimum size of H, if d is at least as large: 64 x 64 products are nearly as fast as large ones."""


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of B: ``number`` blocks of ``height`` rows, beginning with block ``first``."""

    start: int
    stop: int
    first: int
    number: int
    height: int

    def of_rows(self, matrix: Tensor) -> Tensor:
        """Return a view of these rows of a matrix (D, columns) by block, (number, height, columns)."""
        return matrix[self.start : self.stop].view(self.number, self.height, matrix.shape[1])

    def of_columns(self, matrix: Tensor) -> Tensor:
        """Return a view of these columns of a matrix (rows, D) by block, (number, rows, height)."""
        return matrix[:, self.start : self.stop].view(matrix.shape[0], self.number, self.height).transpose(0, 1)


def block_size(small: int) -> int:
    """Return b: the smallest divisor of d of at least 64 (64 for usual widths), or d if it is smaller."""
    return next((size for size in range(min(BLOCK, small), small) if small % size == 0), small)


def copies(large: int, small: int) -> int:
    """Return the number of d x d copies that fill D rows."""
    return -(-large // small)


def transform(size: int) -> Tensor:
    """Return a symmetric orthogonal matrix times sqrt(size), with entries of unit mean square, in float64.

    The Walsh-Hadamard matrix for the power of two in the size, times the Hartley matrix cos + sin (Bracewell, 1983) for
    the odd factor.
    """
    power = size & -size
    odd = size // power
    index = torch.arange(odd)
    angle = (index[:, None] * index % odd).to(torch.float64) * (2 * math.pi / odd)
    result = torch.cos(angle) + torch.sin(angle)
    for _ in range(power.bit_length() - 1):
        result = torch.cat([torch.cat([result, result], 1), torch.cat([result, -result], 1)])
    return result


class Hadamard:
    """Structured B (D, n r) of one layer.

    Args:
        signs: Random signs s and t of the model, int8 (at least ``copies * d``, 2) or with more dimensions of size 1.
        large: D.
        small: d.
        columns: n r.
        copies: Transforms and signed blocks that the layers share.
    """

    def __init__(self, signs: Tensor, large: int, small: int, columns: int, copies: Copies | None = None) -> None:
        self.signs, self.copies = signs, Copies() if copies is None else copies
        self.large, self.small, self.columns = int(large), int(small), columns
        self.block = self.width = block_size(self.small)
        self.blocks = self.small // self.block
        self.inner = self.small
        self.pieces = self._pieces()

    @property
    def held(self) -> bool:
        """True if the kernels in Triton can hold H and O in registers."""
        return max(self.block, self.blocks) <= 128

    @property
    def across(self) -> tuple[Tensor, Tensor]:
        """The signs t (d or more) and O (m, m)."""
        return self.signs[:, 1].reshape(-1), self.orthogonal(self.blocks, torch.float32)

    @property
    def within(self) -> tuple[Tensor, Tensor]:
        """The signs s (copies d or more) and H (b, b)."""
        return self.signs[:, 0].reshape(-1), self.orthogonal(self.block, torch.float32)

    @staticmethod
    def factor(products: torch.dtype) -> float:
        """Return the factor of the kernels' products with B: 1, but for float16, see `float16`."""
        return 1 / math.prod(enlarged(products))

    def _pieces(self) -> list[Piece]:
        """Return the copies from the top; the last one may end inside a block."""
        result = []
        for start in range(0, self.large, self.small):
            number, rest = divmod(min(self.small, self.large - start), self.block)
            stop = start + number * self.block
            if number:
                result.append(Piece(start, stop, 0, number, self.block))
            if rest:
                result.append(Piece(stop, stop + rest, number, 1, rest))
        return result

    def signed_blocks(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """Return H diag(s) of each block of a piece, (number, height, b); in float16 times 2^-12: see `float16`."""

        def make() -> Tensor:
            signs = self.signs[piece.start : piece.start + piece.number * self.block, 0].to(dtype)
            return shrunk(self.orthogonal(self.block, dtype)[: piece.height] * signs.reshape(-1, 1, self.block))

        return self.copies.get((piece, self.block, dtype), self.signs, make)

    def column_signs(self, dtype: torch.dtype) -> Tensor:
        """Return t, (d, 1)."""
        made = self.copies.get(("columns", dtype), self.signs, lambda: self.signs[:, 1].reshape(-1, 1).to(dtype))
        return made[: self.small]

    def orthogonal(self, size: int, dtype: torch.dtype) -> Tensor:
        """Return `transform` in a dtype on the device of the signs."""
        return self.copies.get((size, dtype), self.signs, lambda: transform(size).to(self.signs.device, dtype))

    def rows(self, dtype: torch.dtype) -> int:
        """Return the rows of a mixed S: d in any dtype."""
        return self.small

    def mixed(self, stack: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (O x I_b) diag(t) S, (m, b, ...), for S (n r, ...), computed in S's dtype."""
        signs = self.column_signs(stack.dtype)
        first, *others = torch.split(stack, self.small)
        turned = first * signs[: first.shape[0]]
        for other in others:  # column p of B is column p mod d
            turned[: len(other)].addcmul_(other, signs[: len(other)])
        if turned.shape[0] < self.small:
            turned = torch.nn.functional.pad(turned, (0, 0, 0, self.small - len(turned)))
        mixed = self.orthogonal(self.blocks, stack.dtype) @ turned.reshape(self.blocks, -1)
        return mixed.view(self.blocks, self.block, -1).to(dtype)

    def unmixed(self, mixed: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Apply the transpose of `mixed`, (m, b, ...) to (n r, ...), in ``dtype``."""
        if self.held and runs(mixed, mixed.dtype, dtype or mixed.dtype):
            return hadamard_unmix(mixed.flatten(0, 1), *self.across, self.columns, dtype or mixed.dtype)
        mixed = mixed.to(dtype or mixed.dtype)
        signs = self.column_signs(mixed.dtype)
        stack = (self.orthogonal(self.blocks, mixed.dtype) @ mixed.flatten(1)).view(self.small, -1).mul_(signs)
        if self.columns <= self.small:
            return stack[: self.columns]
        whole, rest = divmod(self.columns, self.small)
        return torch.cat([stack] * whole + [stack[:rest]])

    def add_to(self, weight: Tensor, mixed: Tensor, transposed: bool, factor: float = 1.0) -> Tensor:
        """Add ``factor`` B S (D, d), or its transpose, to a weight, in place unless compiling.

        ``mixed`` is the result of `mixed` in the weight's dtype.
        """
        parts = []
        for piece in self.pieces:
            signed, part = self.signed_blocks(piece, weight.dtype), mixed[piece.first : piece.first + piece.number]
            signed = signed if factor == 1 else signed * factor
            if torch.compiler.is_compiling():  # the compiler cannot write to blocks of columns
                parts.append(torch.bmm(signed, part).flatten(0, 1))
            elif transposed:
                columns = piece.of_columns(weight)
                columns.baddbmm_(part.transpose(1, 2), signed.transpose(1, 2))
            else:
                piece.of_rows(weight).baddbmm_(signed, part)
        if parts:
            total = torch.cat(parts)
            return weight + (total.T if transposed else total)
        return weight

    def added(
        self, weight: Tensor | None, mixed: Tensor, products: torch.dtype, dtype: torch.dtype, transposed: bool
    ) -> Tensor:
        """Return W0 + B S, or B S, in ``dtype`` by one kernel in Triton; bfloat16 sums are rounded as in `rounding`."""
        onto = weight if weight is None or transposed else weight.T
        dithers, rows = onto is not None and onto.dtype == torch.bfloat16, mixed.flatten(0, 1).T
        large, across, factor = self.large, not transposed, self.factor(products)
        return hadamard_expand(rows, onto, *self.within, large, factor, across, products, dtype, dithers)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return B (D, n r), which the other methods never build."""
        eye = torch.eye(self.columns, dtype=dtype, device=self.signs.device)
        return self.add_to(eye.new_zeros(self.large, self.columns), self.mixed(eye, dtype), False)

    def project(self, tokens: Tensor) -> Tensor:
        """Apply the blocks and signs of ``tokens @ B``, (T, D) to (T, m, b); `unmixed` applies the rest."""
        if self.held and multiplies(tokens, tokens.dtype):
            factor, dtype = self.factor(tokens.dtype), tokens.dtype
            projected = hadamard_project(tokens, *self.within, self.small, False, dtype, dtype, factor)
            return projected.view(len(tokens), -1, self.block)
        signed = [(piece, self.signed_blocks(piece, tokens.dtype)) for piece in self.pieces]

        def summed(some: Tensor) -> Tensor:
            total = torch.bmm(signed[0][0].of_columns(some), signed[0][1])  # the first copy is never cut off
            for piece, blocks in signed[1:]:
                total[piece.first : piece.first + piece.number].baddbmm_(piece.of_columns(some), blocks)
            return total.transpose(0, 1)

        parts = list(in_parts(tokens))
        if len(parts) == 1:
            return summed(tokens).contiguous()
        result = tokens.new_empty(len(tokens), self.blocks, self.block)
        for part in parts:
            result[part] = summed(tokens[part])
        return result

    def expand(self, mixed: Tensor, onto: Tensor | None = None) -> Tensor:
        """Apply the transpose of `project`, (T, d) to (T, D), to tokens times the transposed result of `mixed`.

        With ``onto``, the result is added to it, in place unless compiling.
        """
        if self.held and multiplies(mixed, mixed.dtype):
            factor, dtype = self.factor(mixed.dtype), mixed.dtype
            return hadamard_expand(mixed, onto, *self.within, self.large, factor, False, dtype, dtype, False)
        blocks = mixed.view(len(mixed), self.blocks, self.block).transpose(0, 1)
        signed = [(piece, self.signed_blocks(piece, mixed.dtype).mT) for piece in self.pieces]
        if torch.compiler.is_compiling():
            parts = [torch.bmm(blocks[piece.first : piece.first + piece.number], each) for piece, each in signed]
            result = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)
            return result if onto is None else onto + result
        result = mixed.new_zeros(len(mixed), self.large) if onto is None else onto
        for piece, each in signed:
            piece.of_columns(result).baddbmm_(blocks[piece.first : piece.first + piece.number], each)
        return result

    def contract(self, projected: Tensor, others: Tensor) -> Tensor:
        """Return ``B^T (tokens^T others)``, (m, b, d) before `unmixed`, for projected tokens and others (T, d)."""
        return (projected.flatten(1).T @ others).view(self.blocks, self.block, -1)

    def reduce(self, gradient: Tensor) -> Tensor:
        """Return ``B^T G``, (m, b, d) before `unmixed`, for G (D, d)."""
        if self.held and multiplies(gradient, gradient.dtype):
            factor, dtype = self.factor(gradient.dtype), gradient.dtype
            reduced = hadamard_project(gradient.T, *self.within, self.small, True, dtype, dtype, factor)
            return reduced.view(self.blocks, self.block, -1)
        first, *others = self.pieces
        result = torch.bmm(self.signed_blocks(first, gradient.dtype).transpose(1, 2), first.of_rows(gradient))
        for piece in others:
            signed = self.signed_blocks(piece, gradient.dtype).transpose(1, 2)
            result[piece.first : piece.first + piece.number].baddbmm_(signed, piece.of_rows(gradient))
        return result
