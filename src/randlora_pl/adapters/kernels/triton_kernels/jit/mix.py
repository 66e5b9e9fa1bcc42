"""S of structured bases, turned by t and mixed across blocks by O, in one pass; and the transpose."""

import triton
import triton.language as tl

from randlora_pl.adapters.kernels.triton_kernels.jit.rounding import rounded
from randlora_pl.adapters.kernels.triton_kernels.jit.stack import entry


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
