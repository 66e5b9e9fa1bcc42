"""Products of few tokens with packed entries -1, 0 and 1: 16 of them in an int32, unpacked in registers."""

import triton
import triton.language as tl

from randlora_pl.adapters.kernels.triton_kernels.jit.rounding import rounded


@triton.jit
def unpacked(packed, rows, words, stride, height, width, CT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr):
    """Return the entries of some rows and words, (BD, 16 BW)."""
    inside = (rows < height)[:, None] & (words < width)[None, :]
    codes = tl.load(packed + rows[:, None].to(tl.int64) * stride + words[None, :], inside, 0x55555555)  # codes of 0
    shifts = 2 * tl.arange(0, 16)
    digits = ((codes[:, :, None] >> shifts[None, None, :]) & 3) - 1
    return tl.reshape(digits, (BD, 16 * BW)).to(CT)


@triton.jit
def ternary_project_kernel(
    parts, x, packed, stride_x, stride, tokens, height, width, columns, per_split,
    CT: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Write a split's part of ``x @ B``, (splits, T, n r), for 16 BW columns and ``per_split`` rows of B (D, n r)."""
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    words = tl.program_id(0) * BW + tl.arange(0, BW)
    cols = tl.program_id(0) * 16 * BW + tl.arange(0, 16 * BW)
    total = tl.zeros((BT, 16 * BW), tl.float32)
    begin = tl.program_id(1) * per_split
    for start in range(begin, begin + per_split, BD):
        rows = start + tl.arange(0, BD)
        known = (t < tokens)[:, None] & (rows < height)[None, :]
        left = tl.load(x + t[:, None].to(tl.int64) * stride_x + rows[None, :], known, 0.0).to(CT)
        right = unpacked(packed, rows, words, stride, height, width, CT, BD, BW)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    to = parts + (tl.program_id(1) * tokens + t[:, None]).to(tl.int64) * columns + cols[None, :]
    tl.store(to, rounded(total, parts.dtype.element_ty), (t < tokens)[:, None] & (cols < columns)[None, :])


@triton.jit
def ternary_expand_kernel(
    out, y, packed, stride_y, stride, tokens, height, width, columns,
    CT: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Write ``y @ B^T``, (T, D), for BD rows of B (D, n r)."""
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    rows = tl.program_id(0) * BD + tl.arange(0, BD)
    total = tl.zeros((BT, BD), tl.float32)
    for start in range(0, width, BW):
        cols = 16 * start + tl.arange(0, 16 * BW)
        known = (t < tokens)[:, None] & (cols < columns)[None, :]
        left = tl.load(y + t[:, None].to(tl.int64) * stride_y + cols[None, :], known, 0.0).to(CT)
        right = unpacked(packed, rows, start + tl.arange(0, BW), stride, height, width, CT, BD, BW)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    to = out + t[:, None].to(tl.int64) * height + rows[None, :]
    tl.store(to, rounded(total, out.dtype.element_ty), (t < tokens)[:, None] & (rows < height)[None, :])
