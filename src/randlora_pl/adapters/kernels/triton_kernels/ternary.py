"""Products of a few tokens with packed ternary bases: ``randlora::ternary_project``, ``ternary_expand``.

A step of decoding with an unmerged adapter reads all of B for one token, so that its time is the time to read B.
Packed, an entry takes a quarter of a byte instead of one, and nothing is cast in memory.
"""

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.triton_kernels.launch import (
    compute_type,
    operator,
    power,
    precision,
    rows_first,
    set_fake,
)

MANY = 64
"""Tokens from which a plain product, which reads B once for all of them, is at least as fast."""

_ROWS, _WORDS, _PROGRAMS = 64, 4, 512


def packed(b: Tensor) -> Tensor:
    """Return B (D, n r) with entries -1, 0 and 1 as int32 (D, ceil(n r / 16)): codes 0, 1, 2 in two bits each."""
    rest = -b.shape[1] % 16
    codes = torch.nn.functional.pad(b.to(torch.int64) + 1, (0, rest), value=1).view(len(b), -1, 16)
    words: Tensor = (codes << 2 * torch.arange(16, device=b.device)).sum(2)
    return words.to(torch.int32)  # the last code's upper bit becomes the sign


def parts_of(height: int, width: int) -> tuple[int, int]:
    """Return the parts into which the rows of B are divided, so that all cores of a device work, and their rows."""
    wanted = max(1, min(-(-height // _ROWS), -(-_PROGRAMS // -(-width // _WORDS))))
    each = -(-height // (wanted * _ROWS)) * _ROWS
    return -(-height // each), each


@operator("randlora::ternary_project")
def ternary_project(x: Tensor, b: Tensor, columns: int) -> Tensor:
    """Return ``x @ B``, (T, n r), for few tokens x (T, D) and `packed` B (D, words)."""
    from randlora_pl.adapters.kernels.triton_kernels.jit import ternary_project_kernel

    x, (tokens, height), width = rows_first(x), x.shape, b.shape[1]
    parts, each = parts_of(height, width)
    out = x.new_empty(parts, tokens, columns, dtype=torch.float32 if parts > 1 else x.dtype)
    some = power(tokens, 16, 64)
    ternary_project_kernel[(-(-width // _WORDS), parts, -(-tokens // some))](
        out, x, b, x.stride(0), b.stride(0), tokens, height, width, columns, each,
        CT=compute_type(x.dtype), PRECISION=precision(x.dtype), BT=some, BD=_ROWS, BW=_WORDS, num_warps=4,
    )  # fmt: skip
    return out.sum(0).to(x.dtype) if parts > 1 else out[0]


set_fake(ternary_project, lambda x, b, columns: x.new_empty(len(x), columns))


@operator("randlora::ternary_expand")
def ternary_expand(y: Tensor, b: Tensor) -> Tensor:
    """Return ``y @ B^T``, (T, D), for few tokens y (T, n r) and `packed` B (D, words)."""
    from randlora_pl.adapters.kernels.triton_kernels.jit import ternary_expand_kernel

    y, (tokens, columns), (height, width) = rows_first(y), y.shape, b.shape
    out = y.new_empty(tokens, height)
    some = power(tokens, 16, 64)
    ternary_expand_kernel[(-(-height // _ROWS), -(-tokens // some))](
        out, y, b, y.stride(0), b.stride(0), tokens, height, width, columns,
        CT=compute_type(y.dtype), PRECISION=precision(y.dtype), BT=some, BD=_ROWS, BW=_WORDS, num_warps=4,
    )  # fmt: skip
    return out


set_fake(ternary_expand, lambda y, b: y.new_empty(len(y), len(b)))
