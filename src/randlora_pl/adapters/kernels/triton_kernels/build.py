"""W0 + B S in one pass: ``randlora::build_weight``.

Symbols as in `randlora_linear`.
"""

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.triton_kernels.launch import (
    compute_type,
    first_that_fits,
    power,
    precision,
    rows_first,
)
from randlora_pl.adapters.kernels.triton_kernels.operators import fake_of, operator

TILES = ((128, 128, 32, 3, 8), (128, 128, 32, 2, 8), (64, 64, 32, 2, 4), (32, 32, 16, 1, 4))
"""Rows, columns, depth, stages and warps of a program, in the order in which they are tried."""


def tiles(large: int, small: int, depth: int) -> list[tuple[int, int, int, int, int]]:
    """Return `TILES` cut to a matrix (D, d) and n r."""
    return [
        (power(large, 16, high), power(small, 16, wide), power(depth, 16, deep), stages, warps)
        for high, wide, deep, stages, warps in TILES
    ]


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
    """Return W0 + B S, or B S, (D, d), or (d, D) if transposed.

    Args:
        weight: W0, or None.
        b: B (D, n r or more), floats or int8.
        lambdas: lambda (n, r).
        gammas: gamma (n, d).
        a: A (r, d).
        scale: Factor of S.
        peft: True for PEFT's order of the rows of S.
        transposed: True if W0 is (d, D).
        products: Dtype of B and S in the products, which are summed in float32.
        dtype: Dtype of the result.
        dithers: True to round to bfloat16 by the thresholds of `rounding`, so that no small update is lost.
    """
    from randlora_pl.adapters.kernels.triton_kernels.jit.build import build_kernel

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
    first_that_fits(key, tiles(large, small, count * rank), launch)
    return out


@fake_of(build_weight)
def _(
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
    large, small = len(b), gammas.shape[1]
    return gammas.new_empty((small, large) if transposed else (large, small), dtype=dtype)
