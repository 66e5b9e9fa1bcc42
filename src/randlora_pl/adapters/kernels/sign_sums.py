"""Sums of random sign matrices, ``sum_i a_i R_i``, that never store the matrices.

An entry of R_i is one bit of a Philox word: a pure function of (seed, i, row, column). So the matrices of the forward
and the backward pass are the same, however the loops are divided. In the official code of PRANC they differ if the two
passes divide the coefficients in different ways, because the numbers of CUDA's generator depend on the chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from randlora_pl.adapters.kernels.randlora_linear import without_autocast
from randlora_pl.utils.rng import philox, stream

CHUNK = 1 << 20
"""Signs at once: limits the int64 temporaries to about 30 MB. Any value gives the same signs."""

_BITS = 32
_SIGNS = stream("signs of PRANC")  # here, because a compiler cannot trace the hash


def grid_words(seed: int, name: int, numbers: Tensor, rows: Tensor, columns: int) -> Tensor:
    """Return one word of the stream ``name`` for each number, row and column, (numbers, rows, columns), int64."""
    block = torch.arange(-(-columns // 4), device=rows.device)  # one Philox call gives four adjacent columns
    name_word = torch.tensor(name, device=rows.device)
    lanes = philox(seed, (block, rows[:, None], numbers[:, None, None], name_word))
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :columns]


def signs(seed: int, numbers: Tensor, rows: Tensor, columns: int) -> Tensor:
    """Return the entries of R_i for some numbers i and rows: +1 or -1, (len(numbers), len(rows), columns), int64."""
    words = grid_words(seed, _SIGNS, numbers, rows, -(-columns // _BITS))
    bits = (words[..., None] >> torch.arange(_BITS, device=rows.device)) & 1
    return bits.flatten(-2)[..., :columns] * 2 - 1


class SignSum(torch.autograd.Function):
    """``sum_i a_i R_i`` (out, in) of coefficients a (k); each pass draws all k signs of an entry."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, seed: int, out_features: int, in_features: int) -> Tensor:
        """Build the sum, in chunks of signs."""
        ctx.seed, ctx.sizes, ctx.like = seed, (len(a), out_features, in_features), a
        result = a.new_zeros(out_features, in_features)
        with without_autocast(a):
            for some, rows, chunk in _chunks(a, seed, *ctx.sizes):
                result[rows] += (a[some] @ chunk.flatten(1)).view(-1, in_features)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the inner products <R_i, G>, (k)."""
        gradient = gradients[0].to(ctx.like.dtype)
        result = torch.zeros_like(ctx.like)
        with without_autocast(gradient):
            for some, rows, chunk in _chunks(gradient, ctx.seed, *ctx.sizes):
                result[some] += chunk.flatten(1) @ gradient[rows].flatten()
        return result, None, None, None


def _chunks(like: Tensor, seed: int, count: int, rows: int, columns: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield ranges of numbers and of rows with their signs, at most `CHUNK` or one row, in the dtype of a tensor."""
    height = min(rows, max(1, CHUNK // columns))
    depth = max(1, CHUNK // (height * columns))
    for top in range(0, rows, height):
        row = torch.arange(top, min(top + height, rows), device=like.device)
        for first in range(0, count, depth):
            number = torch.arange(first, min(first + depth, count), device=like.device)
            ranges = slice(first, first + len(number)), slice(top, top + len(row))
            yield *ranges, signs(seed, number, row, columns).to(like.dtype)
