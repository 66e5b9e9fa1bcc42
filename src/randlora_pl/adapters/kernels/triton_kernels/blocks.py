"""Blocks of structured bases on tokens or on a weight: ``randlora::hadamard_project``, ``hadamard_expand``.

Symbols as in `hadamard`. A weight is treated as tokens by its columns, so that `Hadamard.reduce` is the first
operation and `Hadamard.add_to` the second one on transposed views.
"""

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.triton_kernels.launch import compute_type, operator, power, precision, set_fake


@operator("randlora::hadamard_project")
def hadamard_project(
    x: Tensor,
    signs: Tensor,
    h: Tensor,
    small: int,
    across: bool,
    products: torch.dtype,
    dtype: torch.dtype,
    scale: float,
) -> Tensor:
    """Return the sum over copies k of ``x[:, k d + q b : + b] H diag(s)`` for each block q, (T, d), or (d, T).

    Args:
        x: Tokens (T, D) with any strides.
        signs: Random signs s of each copy's rows, (copies d or more).
        h: H (b, b).
        small: d.
        across: True to write the transpose, (d, T).
        products: Dtype of the products, which are summed in float32.
        dtype: Dtype of the result.
        scale: Factor of the products.
    """
    from randlora_pl.adapters.kernels.triton_kernels.jit import project_kernel

    (tokens, large), block = x.shape, len(h)
    out = x.new_empty((small, tokens) if across else (tokens, small), dtype=dtype)
    steps = out.stride()[::-1] if across else out.stride()
    some = power(tokens, 16, 128)
    project_kernel[(-(-tokens // some), small // block)](
        out, x, signs, h, *steps, *x.stride(), h.stride(0), signs.stride(0), tokens, large, small, scale,
        COPIES=-(-large // small), B=block, BB=power(block), CT=compute_type(products),
        PRECISION=precision(products, dtype), BT=some, num_warps=8 if some > 64 else 4,
    )  # fmt: skip
    return out


set_fake(
    hadamard_project,
    lambda x, signs, h, small, across, products, dtype, scale: x.new_empty(
        (small, len(x)) if across else (len(x), small), dtype=dtype
    ),
)


@operator("randlora::hadamard_expand")
def hadamard_expand(
    mixed: Tensor,
    onto: Tensor | None,
    signs: Tensor,
    h: Tensor,
    large: int,
    scale: float,
    across: bool,
    products: torch.dtype,
    dtype: torch.dtype,
    dithers: bool,
) -> Tensor:
    """Return ``onto`` plus ``scale mixed[:, q] diag(s) H^T`` at the columns of block q in each copy, (T, D), or (D, T).

    Args:
        mixed: Tokens (T, d) with any strides.
        onto: Summand (T, D) with any strides, or None.
        signs: Random signs s of each copy's rows, (copies d or more).
        h: H (b, b).
        large: D.
        scale: Factor of the products.
        across: True to write the transpose, (D, T).
        products: Dtype of the products, which are summed in float32.
        dtype: Dtype of the result.
        dithers: True to round to bfloat16 by the thresholds of `rounding`, so that no small update is lost.
    """
    from randlora_pl.adapters.kernels.triton_kernels.jit import expand_kernel

    (tokens, small), block = mixed.shape, len(h)
    out = mixed.new_empty((large, tokens) if across else (tokens, large), dtype=dtype)
    steps = out.stride()[::-1] if across else out.stride()
    some = power(tokens, 16, 128)
    expand_kernel[(-(-tokens // some), small // block)](
        out, out if onto is None else onto, mixed, signs, h, *steps, *(steps if onto is None else onto.stride()),
        *mixed.stride(), h.stride(0), signs.stride(0), tokens, large, small, scale,
        COPIES=-(-large // small), B=block, BB=power(block), ADDS=onto is not None, DITHERS=dithers,
        CT=compute_type(products), PRECISION=precision(products, dtype), BT=some, num_warps=8 if some > 64 else 4,
    )  # fmt: skip
    return out


set_fake(
    hadamard_expand,
    lambda mixed, onto, signs, h, large, scale, across, products, dtype, dithers: mixed.new_empty(
        (large, len(mixed)) if across else (len(mixed), large), dtype=dtype
    ),
)
