"""S of structured bases, mixed across blocks, and the transpose: ``randlora::hadamard_mix``, ``hadamard_unmix``.

Symbols as in `hadamard`.
"""

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.triton_kernels.launch import power, precision, rows_first
from randlora_pl.adapters.kernels.triton_kernels.operators import fake_of, operator


@operator("randlora::hadamard_mix")
def hadamard_mix(
    lambdas: Tensor, gammas: Tensor, a: Tensor, signs: Tensor, o: Tensor, scale: float, peft: bool, dtype: torch.dtype
) -> Tensor:
    """Return (O x I_b) diag(t) S, (d, d), with S formed in registers.

    Args:
        lambdas: lambda (n, r).
        gammas: gamma (n, d).
        a: A (r, d).
        signs: Random signs t (d).
        o: O (m, m).
        scale: Factor of S.
        peft: True for PEFT's order of the rows of S.
        dtype: Dtype of the result; S is formed in float32.
    """
    from randlora_pl.adapters.kernels.triton_kernels.jit.mix import mix_kernel

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


@fake_of(hadamard_mix)
def _(
    lambdas: Tensor, gammas: Tensor, a: Tensor, signs: Tensor, o: Tensor, scale: float, peft: bool, dtype: torch.dtype
) -> Tensor:
    return gammas.new_empty(gammas.shape[1], gammas.shape[1], dtype=dtype)


@operator("randlora::hadamard_unmix")
def hadamard_unmix(mixed: Tensor, signs: Tensor, o: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the transpose of the mixing applied to a matrix, (n r, width).

    Args:
        mixed: Matrix (d, width).
        signs: Random signs t (d).
        o: O (m, m).
        columns: n r.
        dtype: Dtype of the result; products are computed in float32.
    """
    from randlora_pl.adapters.kernels.triton_kernels.jit.mix import unmix_kernel

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


@fake_of(hadamard_unmix)
def _(mixed: Tensor, signs: Tensor, o: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return mixed.new_empty(columns, mixed.shape[1], dtype=dtype)
