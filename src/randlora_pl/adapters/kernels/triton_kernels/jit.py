"""Kernels in Triton's own language; the files next to this one launch them."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""The interpreter truncates to bfloat16, and computes garbage with it; compiled kernels round to nearest."""


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Return float32 numbers in another dtype, rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dithered(x, index, DTYPE: tl.constexpr, DITHERS: tl.constexpr):
    """Return float32 numbers in another dtype; with ``DITHERS``, in bfloat16 as `rounding.rounded` of the package does.

    The threshold is a hash of the entry's index in the weight, int32.
    """
    if not DITHERS:
        return rounded(x, DTYPE)
    words = index * -1640531535
    words = (words ^ (words >> 15)) * -2048144777
    threshold = (words ^ (words >> 13)) & 0x7FFF
    bits = x.to(tl.int32, bitcast=True) + 2 * threshold
    total = (bits & -65536).to(tl.float32, bitcast=True)
    return tl.where(x == x, total, x).to(DTYPE)  # a GPU's NaN would overflow to the bits of zero


@triton.jit
def entry(lambdas, gammas, a, stride_a, p, cols, small, scale, N: tl.constexpr, R: tl.constexpr, PEFT: tl.constexpr):
    """Return rows p and columns ``cols`` of S in float32, (p, cols), with zeros outside of (n r, d)."""
    inside = p < N * R
    j, k = (p % N, p // N) if PEFT else (p // R, p % R)
    both = inside[:, None] & (cols < small)[None, :]
    factor = tl.load(lambdas + j * R + k, inside, 0.0).to(tl.float32) * scale
    gamma = tl.load(gammas + j[:, None] * small + cols[None, :], both, 0.0).to(tl.float32)
    row = tl.load(a + k[:, None] * stride_a + cols[None, :], both, 0.0).to(tl.float32)
    return factor[:, None] * row * gamma


@triton.jit
def form_kernel(
    out, lambdas, gammas, a, stride_a, stride_out, rows, small, scale,
    N: tl.constexpr, R: tl.constexpr, PEFT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write S (rows, d), with zeros in rows beyond n r."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    s = entry(lambdas, gammas, a, stride_a, p, cols, small, scale, N, R, PEFT)
    where = out + p[:, None].to(tl.int64) * stride_out + cols[None, :]
    tl.store(where, s.to(out.dtype.element_ty), (p < rows)[:, None] & (cols < small)[None, :])


@triton.jit
def reduce_kernel(
    parts, grad_gammas, gradient, lambdas, gammas, a, stride_g, stride_a, small, scale,
    N: tl.constexpr, R: tl.constexpr, PEFT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Reduce the gradient of S (n r, d) to the gradient of gamma (n, d) and partial sums of the gradient of lambda.

    A program has BJ bases, all r rows of each and BN columns: the sums over rows for gamma are its own. The sums over
    columns for lambda are partial, (column blocks, n, r), and are added in a fixed order afterwards.
    """
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    wide = (j < N)[:, None] & (cols < small)[None, :]
    gamma = tl.load(gammas + j[:, None] * small + cols[None, :], wide, 0.0).to(tl.float32)
    total = tl.zeros((BJ, BN), tl.float32)
    for start in range(0, R, BK):
        k = start + tl.arange(0, BK)
        pair = (j < N)[:, None] & (k < R)[None, :]
        p = (k[None, :] * N + j[:, None]) if PEFT else (j[:, None] * R + k[None, :])
        inside = pair[:, :, None] & (cols < small)[None, None, :]
        where = gradient + p[:, :, None].to(tl.int64) * stride_g + cols[None, None, :]
        g = tl.load(where, inside, 0.0).to(tl.float32)
        row = tl.load(a + k[:, None] * stride_a + cols[None, :], (k < R)[:, None] & (cols < small)[None, :], 0.0)
        g *= row.to(tl.float32)[None, :, :]
        factor = tl.load(lambdas + j[:, None] * R + k[None, :], pair, 0.0).to(tl.float32)
        total += tl.sum(g * factor[:, :, None], 1)
        part = tl.sum(g * gamma[:, None, :], 2) * scale
        tl.store(parts + tl.program_id(1) * N * R + j[:, None] * R + k[None, :], part, pair)
    tl.store(grad_gammas + j[:, None] * small + cols[None, :], (total * scale).to(grad_gammas.dtype.element_ty), wide)


@triton.jit
def build_kernel(
    out, weight, b, lambdas, gammas, a, stride_out, stride_w, stride_b, stride_a, large, small, scale,
    N: tl.constexpr, R: tl.constexpr, PEFT: tl.constexpr, TRANSPOSED: tl.constexpr, ADDS: tl.constexpr,
    DITHERS: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write BM rows and BN columns of (D, d); a transposed weight is read and written with swapped indices."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < large)[:, None] & (cols < small)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, N * R, BK):
        p = start + tl.arange(0, BK)
        known = (rows < large)[:, None] & (p < N * R)[None, :]
        left = tl.load(b + rows[:, None].to(tl.int64) * stride_b + p[None, :], known, 0).to(CT)
        right = entry(lambdas, gammas, a, stride_a, p, cols, small, scale, N, R, PEFT).to(CT)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if TRANSPOSED:
        at = cols[None, :].to(tl.int64) * stride_w + rows[:, None]
        to = cols[None, :].to(tl.int64) * stride_out + rows[:, None]
    else:
        at = rows[:, None].to(tl.int64) * stride_w + cols[None, :]
        to = rows[:, None].to(tl.int64) * stride_out + cols[None, :]
    if ADDS:
        total += tl.load(weight + at, inside, 0.0).to(tl.float32)
    tl.store(out + to, dithered(total, to.to(tl.int32), out.dtype.element_ty, DITHERS), inside)  # out is contiguous


@triton.jit
def mix_kernel(
    out, lambdas, gammas, a, signs, o, stride_a, stride_signs, o_i, small, scale,
    N: tl.constexpr, R: tl.constexpr, PEFT: tl.constexpr, REPEATS: tl.constexpr, B: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write row i of each of the m blocks of (O x I_b) diag(t) S, and BN columns."""
    q = tl.arange(0, MP)
    place = q * B + tl.program_id(0)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    s = tl.zeros((MP, BN), tl.float32)
    for repeat in range(REPEATS):  # column p of B is column p mod d
        p = tl.where(q < M, repeat * small + place, N * R)
        s += entry(lambdas, gammas, a, stride_a, p, cols, small, scale, N, R, PEFT)
    s *= tl.load(signs + place * stride_signs, q < M, 0).to(tl.float32)[:, None]
    across = tl.load(o + q[:, None] * o_i + q[None, :], (q < M)[:, None] & (q < M)[None, :], 0.0).to(tl.float32)
    total = tl.dot(across, s, input_precision=PRECISION)
    to = out + place[:, None].to(tl.int64) * small + cols[None, :]
    tl.store(to, rounded(total, out.dtype.element_ty), (q < M)[:, None] & (cols < small)[None, :])


@triton.jit
def unmix_kernel(
    out, mixed, signs, o, stride_signs, o_i, small, width, columns,
    REPEATS: tl.constexpr, B: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Write the rows of (n r, width) that the transpose of `mix_kernel` makes of row i of each block."""
    q = tl.arange(0, MP)
    place = q * B + tl.program_id(0)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (q < M)[:, None] & (cols < width)[None, :]
    part = tl.load(mixed + place[:, None].to(tl.int64) * width + cols[None, :], inside, 0.0).to(tl.float32)
    across = tl.load(o + q[None, :] * o_i + q[:, None], (q < M)[:, None] & (q < M)[None, :], 0.0).to(tl.float32)
    total = tl.dot(across, part, input_precision=PRECISION)
    total *= tl.load(signs + place * stride_signs, q < M, 0).to(tl.float32)[:, None]
    result = rounded(total, out.dtype.element_ty)
    for repeat in range(REPEATS):
        p = repeat * small + place
        tl.store(out + p[:, None].to(tl.int64) * width + cols[None, :], result, inside & (p < columns)[:, None])


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
