"""The blocks H diag(s) of structured bases, applied to rows or columns of a matrix in one pass."""

import triton
import triton.language as tl

from randlora_pl.adapters.kernels.triton_kernels.jit.rounding import dithered, rounded


@triton.jit
def project_kernel(
    out, x, signs, h, out_t, out_f, x_t, x_f, h_i, stride_signs, tokens, large, small, scale,
    COPIES: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """Write the sum over copies k of ``x[:, k d + q b : + b] H diag(s)`` for one block q and BT tokens."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    i = tl.arange(0, BB)
    first = tl.program_id(1) * B
    square = (i < B)[:, None] & (i < B)[None, :]
    turn = tl.load(h + i[:, None] * h_i + i[None, :], square, 0.0).to(CT)
    total = tl.zeros((BT, BB), tl.float32)
    for copy in range(COPIES):
        row = copy * small + first + i
        inside = (t < tokens)[:, None] & ((i < B) & (row < large))[None, :]
        part = tl.load(x + t[:, None] * x_t + row[None, :].to(tl.int64) * x_f, inside, 0.0).to(CT)
        sign = tl.load(signs + row * stride_signs, i < B, 0).to(tl.float32)
        total += tl.dot(part, turn, input_precision=PRECISION) * sign[None, :]
    to = out + t[:, None] * out_t + (first + i)[None, :].to(tl.int64) * out_f
    tl.store(to, rounded(total * scale, out.dtype.element_ty), (t < tokens)[:, None] & (i < B)[None, :])


@triton.jit
def expand_kernel(
    out, onto, mixed, signs, h, out_t, out_f, onto_t, onto_f, mixed_t, mixed_f, h_i, stride_signs,
    tokens, large, small, scale,
    COPIES: tl.constexpr, B: tl.constexpr, BB: tl.constexpr, ADDS: tl.constexpr, DITHERS: tl.constexpr,
    CT: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Write ``mixed[:, q] diag(s) H^T`` to columns ``k d + q b : + b`` of each copy k, for a block q and BT tokens."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    i = tl.arange(0, BB)
    first = tl.program_id(1) * B
    square = (i < B)[:, None] & (i < B)[None, :]
    turn = tl.load(h + i[None, :] * h_i + i[:, None], square, 0.0).to(CT)
    at = mixed + t[:, None] * mixed_t + (first + i)[None, :].to(tl.int64) * mixed_f
    part = tl.load(at, (t < tokens)[:, None] & (i < B)[None, :], 0.0).to(CT)
    for copy in range(COPIES):
        row = copy * small + first + i
        sign = tl.load(signs + row * stride_signs, i < B, 0).to(CT)
        total = tl.dot(part * sign[None, :], turn, input_precision=PRECISION) * scale
        inside = (t < tokens)[:, None] & ((i < B) & (row < large))[None, :]
        wide = row[None, :].to(tl.int64)
        if ADDS:
            total += tl.load(onto + t[:, None] * onto_t + wide * onto_f, inside, 0.0).to(tl.float32)
        to = t[:, None] * out_t + wide * out_f  # out is contiguous
        tl.store(out + to, dithered(total, to.to(tl.int32), out.dtype.element_ty, DITHERS), inside)
