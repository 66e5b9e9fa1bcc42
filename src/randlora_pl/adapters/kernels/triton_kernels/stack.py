"""S and W0 + B S in one pass each, also mixed across blocks for structured bases, with the gradients of S.

Symbols as in `randlora_linear` and `hadamard`: lambda (n, r), gamma (n, d), A (r, d), ``scale`` for the factor of S,
``peft`` for PEFT's order of the rows of S. Signs t (d) and O (m, m) mix the blocks. S is formed in float32; ``dtype``
is the dtype of a result.
"""

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.triton_kernels.launch import (
    compute_type,
    first_that_fits,
    operator,
    power,
    precision,
    rows_first,
    set_fake,
)


@operator("randlora::form_stack")
def form_stack(
    lambdas: Tensor, gammas: Tensor, a: Tensor, scale: float, peft: bool, rows: int, dtype: torch.dtype
) -> Tensor:
    """Return S with zero rows up to ``rows``, which are n r or more, (rows, d)."""
    from randlora_pl.adapters.kernels.triton_kernels.jit import form_kernel

    (count, rank), small = lambdas.shape, gammas.shape[1]
    lambdas, gammas, a = lambdas.contiguous(), gammas.contiguous(), rows_first(a)
    out = gammas.new_empty(rows, small, dtype=dtype)
    high, wide = 16, power(small, 16, 256)
    form_kernel[(-(-rows // high), -(-small // wide))](
        out, lambdas, gammas, a, a.stride(0), out.stride(0), rows, small, scale,
        N=count, R=rank, PEFT=peft, BP=high, BN=wide, num_warps=4,
    )  # fmt: skip
    return out


set_fake(
    form_stack,
    lambda lambdas, gammas, a, scale, peft, rows, dtype: gammas.new_empty(rows, gammas.shape[1], dtype=dtype),
)


def tile(count: int, rank: int, small: int) -> tuple[int, int, int]:
    """Return the bases, rows and columns that one program reduces: 8,192 numbers at most."""
    wide = power(small, 16, 128)
    deep = power(rank, 1, 64)
    return min(power(count, 1), max(1, 8192 // (deep * wide))), deep, wide


@operator("randlora::reduce_stack")
def reduce_stack(
    gradient: Tensor, lambdas: Tensor, gammas: Tensor, a: Tensor, scale: float, peft: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of lambda and gamma from the gradient of S, (n r or more, d), in any dtype of floats."""
    from randlora_pl.adapters.kernels.triton_kernels.jit import reduce_kernel

    (count, rank), small = lambdas.shape, gammas.shape[1]
    lambdas, gammas, a, gradient = lambdas.contiguous(), gammas.contiguous(), rows_first(a), rows_first(gradient)
    bases, deep, wide = tile(count, rank, small)
    blocks = -(-small // wide)
    parts = lambdas.new_empty(blocks, count, rank, dtype=torch.float32)
    result = torch.empty_like(gammas)
    reduce_kernel[(-(-count // bases), blocks)](
        parts, result, gradient, lambdas, gammas, a, gradient.stride(0), a.stride(0), small, scale,
        N=count, R=rank, PEFT=peft, BJ=bases, BK=deep, BN=wide, num_warps=4,
    )  # fmt: skip
    return parts.sum(0).to(lambdas.dtype), result


set_fake(
    reduce_stack,
    lambda gradient, lambdas, gammas, a, scale, peft: (torch.empty_like(lambdas), torch.empty_like(gammas)),
)


@operator("randlora::hadamard_mix")
def hadamard_mix(
    lambdas: Tensor, gammas: Tensor, a: Tensor, signs: Tensor, o: Tensor, scale: float, peft: bool, dtype: torch.dtype
) -> Tensor:
    """Return (O x I_b) diag(t) S, (d, d), with S formed in registers."""
    from randlora_pl.adapters.kernels.triton_kernels.jit import mix_kernel

    (count, rank), small, blocks = lambdas.shape, gammas.shape[1], len(o)
    lambdas, gammas, a = lambdas.contiguous(), gammas.contiguous(), rows_first(a)
    out = gammas.new_empty(small, small, dtype=dtype)
    padded = power(blocks)
    wide = power(small, 16, max(16, 4096 // padded))
    mix_kernel[(small // blocks, -(-small // wide))](
        out, lambdas, gammas, a, signs, o, a.stride(0), signs.stride(0), o.stride(0), small, scale,
        N=count, R=rank, PEFT=peft, REPEATS=-(-count * rank // small), B=small // blocks, M=blocks, MP=padded,
        PRECISION=precision(torch.float32, dtype), BN=wide, num_warps=4,
    )  # fmt: skip
    return out


set_fake(
    hadamard_mix,
    lambda lambdas, gammas, a, signs, o, scale, peft, dtype: gammas.new_empty(*2 * gammas.shape[1:], dtype=dtype),
)


@operator("randlora::hadamard_unmix")
def hadamard_unmix(mixed: Tensor, signs: Tensor, o: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the transpose of the mixing applied to a matrix (d, width) in float32, (``columns`` n r, width)."""
    from randlora_pl.adapters.kernels.triton_kernels.jit import unmix_kernel

    (small, width), blocks = mixed.shape, len(o)
    mixed = mixed.contiguous()
    out = mixed.new_empty(columns, width, dtype=dtype)
    padded = power(blocks)
    wide = power(width, 16, max(16, 4096 // padded))
    unmix_kernel[(small // blocks, -(-width // wide))](
        out, mixed, signs, o, signs.stride(0), o.stride(0), small, width, columns,
        REPEATS=-(-columns // small), B=small // blocks, M=blocks, MP=padded,
        PRECISION=precision(torch.float32, mixed.dtype), BN=wide, num_warps=4,
    )  # fmt: skip
    return out


set_fake(hadamard_unmix, lambda mixed, signs, o, columns, dtype: mixed.new_empty(columns, mixed.shape[1], dtype=dtype))


TILES = ((128, 128, 32, 3, 8), (128, 128, 32, 2, 8), (64, 64, 32, 2, 4), (32, 32, 16, 1, 4))
"""Rows, columns, depth, stages and warps of a program, in the order in which they are tried."""


@operator("randlora::build_weight")
def build_weight(
    weight: Tensor | None,
    b: Tensor,
    lambdas: Tensor,
    gammas: Tensor,
    a: Tensor,
    scale: float,
    peft: bool,
    transposed: bool,
    products: torch.dtype,
    dtype: torch.dtype,
    dithers: bool,
) -> Tensor:
    """Return W0 + B S, or B S without a weight, (D, d), or (d, D) if transposed.

    B (D, n r or more) has floats or int8. It and S are cast to the dtype ``products``, and products summed in float32.
    With ``dithers``, the result is rounded to bfloat16 by the thresholds of `rounding`: no small update is lost.
    """
    from randlora_pl.adapters.kernels.triton_kernels.jit import build_kernel

    (count, rank), (large, small) = lambdas.shape, (len(b), gammas.shape[1])
    lambdas, gammas, a, b = lambdas.contiguous(), gammas.contiguous(), rows_first(a), rows_first(b)
    weight = None if weight is None else rows_first(weight)
    out = gammas.new_empty((small, large) if transposed else (large, small), dtype=dtype)

    def launch(tile: tuple[int, int, int, int, int]) -> None:
        high, wide, deep, stages, warps = tile
        build_kernel[(-(-large // high), -(-small // wide))](
            out, out if weight is None else weight, b, lambdas, gammas, a,
            out.stride(0), out.stride(0) if weight is None else weight.stride(0), b.stride(0), a.stride(0),
            large, small, scale, N=count, R=rank, PEFT=peft, TRANSPOSED=transposed, ADDS=weight is not None,
            DITHERS=dithers, CT=compute_type(products), PRECISION=precision(products, dtype), BM=high, BN=wide, BK=deep,
            num_stages=stages, num_warps=warps,
        )  # fmt: skip

    key = ("build", out.device, large, small, count, rank, b.dtype, products, dtype)
    choices = [  # cut to (D, d) and n r
        (power(large, 16, high), power(small, 16, wide), power(count * rank, 16, deep), stages, warps)
        for high, wide, deep, stages, warps in TILES
    ]
    first_that_fits(key, choices, launch)
    return out


set_fake(
    build_weight,
    lambda weight, b, lambdas, gammas, a, scale, peft, transposed, products, dtype, dithers: gammas.new_empty(
        (gammas.shape[1], len(b)) if transposed else (len(b), gammas.shape[1]), dtype=dtype
    ),
)
