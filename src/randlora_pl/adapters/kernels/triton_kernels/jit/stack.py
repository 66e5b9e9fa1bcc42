"""S from lambda, gamma and A, and the gradient of S back to lambda and gamma: one read or write of S each."""

import triton
import triton.language as tl


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
