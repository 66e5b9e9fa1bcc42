"""S and its gradient in one pass each: ``randlora::form_stack`` and ``randlora::reduce_stack``.

Symbols as in `randlora_linear`.
"""

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.triton_kernels.launch import power, rows_first
from randlora_pl.adapters.kernels.triton_kernels.operators import fake_of, operator


@operator("randlora::form_stack")
def form_stack(
    lambdas: Tensor, gammas: Tensor, a: Tensor, scale: float, peft: bool, rows: int, dtype: torch.dtype
) -> Tensor:
    """Return S with zero rows up to ``rows``, (rows, d).

    Args:
        lambdas: lambda (n, r).
        gammas: gamma (n, d).
        a: A (r, d).
        scale: Factor of S.
        peft: True for PEFT's order of the rows.
        rows: Rows of the result, at least n r.
        dtype: Dtype of the result; the products are computed in float32.
    """
    from randlora_pl.adapters.kernels.triton_kernels.jit.stack import form_kernel

    (count, rank), small = lambdas.shape, gammas.shape[1]
    lambdas, gammas, a = lambdas.contiguous(), gammas.contiguous(), rows_first(a)
    out = gammas.new_empty(rows, small, dtype=dtype)
    high, wide = 16, power(small, 16, 256)
    form_kernel[(-(-rows // high), -(-small // wide))](
        out, lambdas, gammas, a, a.stride(0), out.stride(0), rows, small, scale,
        N=count, R=rank, PEFT=peft, BP=high, BN=wide, num_warps=4,
    )  # fmt: skip
    return out


@fake_of(form_stack)
def _(lambdas: Tensor, gammas: Tensor, a: Tensor, scale: float, peft: bool, rows: int, dtype: torch.dtype) -> Tensor:
    return gammas.new_empty(rows, gammas.shape[1], dtype=dtype)


def tile(count: int, rank: int, small: int) -> tuple[int, int, int]:
    """Return the bases, rows and columns that one program reduces: 8,192 numbers at most."""
    wide = power(small, 16, 128)
    deep = power(rank, 1, 64)
    return min(power(count, 1), max(1, 8192 // (deep * wide))), deep, wide


@operator("randlora::reduce_stack")
def reduce_stack(
    gradient: Tensor, lambdas: Tensor, gammas: Tensor, a: Tensor, scale: float, peft: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of lambda (n, r) and gamma (n, d).

    Args:
        gradient: Gradient of S, (n r or more, d), in any dtype of floats.
        lambdas: lambda (n, r).
        gammas: gamma (n, d).
        a: A (r, d).
        scale: Factor of S.
        peft: True for PEFT's order of the rows.
    """
    from randlora_pl.adapters.kernels.triton_kernels.jit.stack import reduce_kernel

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


@fake_of(reduce_stack)
def _(gradient: Tensor, lambdas: Tensor, gammas: Tensor, a: Tensor, scale: float, peft: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lambdas), torch.empty_like(gammas)
