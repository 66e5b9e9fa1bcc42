"""W0 + B S, or B S, with S formed in registers (K1 of the design): S is never in memory."""

import triton
import triton.language as tl

from randlora_pl.adapters.kernels.triton_kernels.jit.rounding import dithered
from randlora_pl.adapters.kernels.triton_kernels.jit.stack import entry


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
