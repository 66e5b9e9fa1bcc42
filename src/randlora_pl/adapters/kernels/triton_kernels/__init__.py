"""Kernels in Triton for CUDA as operators of PyTorch, selected by device and dtype. Without triton, nothing of it runs.

``hadamard_project`` and ``hadamard_expand`` apply the blocks of structured bases to tokens or to a weight (symbols as
in `hadamard`). A weight is treated as tokens by its columns, so that `Hadamard.reduce` is the first operation and
`Hadamard.add_to` the second one on transposed views.

The next ones compute S and W0 + B S in one pass each, also mixed across blocks for structured bases, and the gradients
of S. Symbols as in `randlora_linear` and `hadamard`: lambda (n, r), gamma (n, d), A (r, d), ``scale`` for the factor of
S, ``peft`` for PEFT's order of the rows of S. Signs t (d) and O (m, m) mix the blocks. S is formed in float32;
``dtype`` is the dtype of a result.

``ternary_project`` and ``ternary_expand`` multiply a few tokens with packed ternary bases. A step of decoding with an
unmerged adapter reads all of B for one token, so that its time is the time to read B. Packed, an entry takes a quarter
of a byte instead of one, and nothing is cast in memory.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from randlora_pl.utils.device import INTERPRETED, forced, runs

_FITS: dict[tuple[Any, ...], int] = {}


def _kernels() -> Any:
    """Return the module of the kernels, which imports triton at its first use."""
    from randlora_pl.adapters.kernels.triton_kernels import jit

    return jit


def compute_type(dtype: torch.dtype) -> Any:
    """Return Triton's dtype for products of a PyTorch dtype; float32 in the interpreter, which has no bfloat16."""
    import triton.language as tl

    return tl.float32 if INTERPRETED else getattr(tl, str(dtype).removeprefix("torch."))


def precision(dtype: torch.dtype, result: torch.dtype | None = None) -> str:
    """Return Triton's ``input_precision`` of products: TF32 for narrow results, or if PyTorch may use it."""
    narrow = result in (torch.bfloat16, torch.float16)
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and (narrow or allowed) else "ieee"


def power(size: int, least: int = 16, most: int = 1 << 30) -> int:
    """Return the power of two that holds ``size``, between two powers of two; products need 16 at least."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


def _first_that_fits(key: tuple[Any, ...], choices: Iterable[Any], launch: Callable[[Any], None]) -> None:
    """Launch with the first choice of tiles for which the device has registers and shared memory.

    Which one it is depends on device and shapes alone, not on timings, so that a resumed run computes the same bits. It
    is remembered under the key, which has all that it depends on. The choices are in order, the largest first.
    """
    from triton.runtime.errors import OutOfResources

    tiles = list(choices)
    for number in range(_FITS.get(key, 0), len(tiles)):
        try:
            launch(tiles[number])
        except OutOfResources:
            if number + 1 == len(tiles):
                raise
        else:
            _FITS[key] = number
            return


def rows_first(matrix: Tensor) -> Tensor:
    """Return a matrix whose last dimension has stride 1: itself, or a copy."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


Function = TypeVar("Function", bound=Callable[..., Any])


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Return a decorator that makes an operator, such as ``randlora::build_weight``, which changes no argument.

    The function ``fake`` gives its results without data.
    """

    def make(function: Function) -> Function:
        made: Any = torch.library.custom_op(name, function, mutates_args=())
        made.register_fake(fake)
        return cast(Function, made)

    return make


def multiplies(tensor: Tensor, products: torch.dtype) -> bool:
    """Return True if kernels with large products run: float32 ones are left to cuBLAS unless `VARIABLE` is 1."""
    return runs(tensor, products) and (products != torch.float32 or forced())


def sums(like: Tensor, weight: Tensor | None, products: torch.dtype, dtype: torch.dtype) -> bool:
    """Return True if a kernel multiplies, sums and rounds W0 + B S to ``dtype``; not to wider ones than W0's."""
    fits = weight is None or (runs(like, weight.dtype) and weight.dtype.itemsize >= dtype.itemsize)
    return fits and multiplies(like, products) and runs(like, like.dtype, dtype)


@operator(
    "randlora::hadamard_project",
    lambda x, signs, h, small, across, products, dtype, scale: x.new_empty(
        (small, len(x)) if across else (len(x), small), dtype=dtype
    ),
)
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
    (tokens, large), block = x.shape, len(h)
    out = x.new_empty((small, tokens) if across else (tokens, small), dtype=dtype)
    steps = out.stride()[::-1] if across else out.stride()
    some = power(tokens, 16, 128)
    _kernels().project_kernel[(-(-tokens // some), small // block)](
        out, x, signs, h, *steps, *x.stride(), h.stride(0), signs.stride(0), tokens, large, small, scale,
        COPIES=-(-large // small), B=block, BB=power(block), CT=compute_type(products),
        PRECISION=precision(products, dtype), BT=some, num_warps=8 if some > 64 else 4,
    )  # fmt: skip
    return out


@operator(
    "randlora::hadamard_expand",
    lambda mixed, onto, signs, h, large, scale, across, products, dtype, dithers: mixed.new_empty(
        (large, len(mixed)) if across else (len(mixed), large), dtype=dtype
    ),
)
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
    (tokens, small), block = mixed.shape, len(h)
    out = mixed.new_empty((large, tokens) if across else (tokens, large), dtype=dtype)
    steps = out.stride()[::-1] if across else out.stride()
    some = power(tokens, 16, 128)
    _kernels().expand_kernel[(-(-tokens // some), small // block)](
        out, out if onto is None else onto, mixed, signs, h, *steps, *(steps if onto is None else onto.stride()),
        *mixed.stride(), h.stride(0), signs.stride(0), tokens, large, small, scale,
        COPIES=-(-large // small), B=block, BB=power(block), ADDS=onto is not None, DITHERS=dithers,
        CT=compute_type(products), PRECISION=precision(products, dtype), BT=some, num_warps=8 if some > 64 else 4,
    )  # fmt: skip
    return out


@operator(
    "randlora::form_stack",
    lambda lambdas, gammas, a, scale, peft, rows, dtype: gammas.new_empty(rows, gammas.shape[1], dtype=dtype),
)
def form_stack(
    lambdas: Tensor, gammas: Tensor, a: Tensor, scale: float, peft: bool, rows: int, dtype: torch.dtype
) -> Tensor:
    """Return S with zero rows up to ``rows``, which are n r or more, (rows, d)."""
    (count, rank), small = lambdas.shape, gammas.shape[1]
    lambdas, gammas, a = lambdas.contiguous(), gammas.contiguous(), rows_first(a)
    out = gammas.new_empty(rows, small, dtype=dtype)
    high, wide = 16, power(small, 16, 256)
    _kernels().form_kernel[(-(-rows // high), -(-small // wide))](
        out, lambdas, gammas, a, a.stride(0), out.stride(0), rows, small, scale,
        N=count, R=rank, PEFT=peft, BP=high, BN=wide, num_warps=4,
    )  # fmt: skip
    return out


def tile(count: int, rank: int, small: int) -> tuple[int, int, int]:
    """Return the bases, rows and columns that one program reduces: 8,192 numbers at most."""
    wide = power(small, 16, 128)
    deep = power(rank, 1, 64)
    return min(power(count, 1), max(1, 8192 // (deep * wide))), deep, wide


@operator(
    "randlora::reduce_stack",
    lambda gradient, lambdas, gammas, a, scale, peft: (torch.empty_like(lambdas), torch.empty_like(gammas)),
)
def reduce_stack(
    gradient: Tensor, lambdas: Tensor, gammas: Tensor, a: Tensor, scale: float, peft: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of lambda and gamma from the gradient of S, (n r or more, d), in any dtype of floats."""
    (count, rank), small = lambdas.shape, gammas.shape[1]
    lambdas, gammas, a, gradient = lambdas.contiguous(), gammas.contiguous(), rows_first(a), rows_first(gradient)
    bases, deep, wide = tile(count, rank, small)
    blocks = -(-small // wide)
    parts = lambdas.new_empty(blocks, count, rank, dtype=torch.float32)
    result = torch.empty_like(gammas)
    _kernels().reduce_kernel[(-(-count // bases), blocks)](
        parts, result, gradient, lambdas, gammas, a, gradient.stride(0), a.stride(0), small, scale,
        N=count, R=rank, PEFT=peft, BJ=bases, BK=deep, BN=wide, num_warps=4,
    )  # fmt: skip
    return parts.sum(0).to(lambdas.dtype), result


@operator(
    "randlora::hadamard_mix",
    lambda lambdas, gammas, a, signs, o, scale, peft, dtype: gammas.new_empty(*2 * gammas.shape[1:], dtype=dtype),
)
def hadamard_mix(
    lambdas: Tensor, gammas: Tensor, a: Tensor, signs: Tensor, o: Tensor, scale: float, peft: bool, dtype: torch.dtype
) -> Tensor:
    """Return (O x I_b) diag(t) S, (d, d), with S formed in registers."""
    (count, rank), small, blocks = lambdas.shape, gammas.shape[1], len(o)
    lambdas, gammas, a = lambdas.contiguous(), gammas.contiguous(), rows_first(a)
    out = gammas.new_empty(small, small, dtype=dtype)
    padded = power(blocks)
    wide = power(small, 16, max(16, 4096 // padded))
    _kernels().mix_kernel[(small // blocks, -(-small // wide))](
        out, lambdas, gammas, a, signs, o, a.stride(0), signs.stride(0), o.stride(0), small, scale,
        N=count, R=rank, PEFT=peft, REPEATS=-(-count * rank // small), B=small // blocks, M=blocks, MP=padded,
        PRECISION=precision(torch.float32, dtype), BN=wide, num_warps=4,
    )  # fmt: skip
    return out


@operator(
    "randlora::hadamard_unmix",
    lambda mixed, signs, o, columns, dtype: mixed.new_empty(columns, mixed.shape[1], dtype=dtype),
)
def hadamard_unmix(mixed: Tensor, signs: Tensor, o: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the transpose of the mixing applied to a matrix (d, width) in float32, (``columns`` n r, width)."""
    (small, width), blocks = mixed.shape, len(o)
    mixed = mixed.contiguous()
    out = mixed.new_empty(columns, width, dtype=dtype)
    padded = power(blocks)
    wide = power(width, 16, max(16, 4096 // padded))
    _kernels().unmix_kernel[(small // blocks, -(-width // wide))](
        out, mixed, signs, o, signs.stride(0), o.stride(0), small, width, columns,
        REPEATS=-(-columns // small), B=small // blocks, M=blocks, MP=padded,
        PRECISION=precision(torch.float32, mixed.dtype), BN=wide, num_warps=4,
    )  # fmt: skip
    return out


TILES = ((128, 128, 32, 3, 8), (128, 128, 32, 2, 8), (64, 64, 32, 2, 4), (32, 32, 16, 1, 4))
"""Rows, columns, depth, stages and warps of a program, in the order in which they are tried."""


@operator(
    "randlora::build_weight",
    lambda weight, b, lambdas, gammas, a, scale, peft, transposed, products, dtype, dithers: gammas.new_empty(
        (gammas.shape[1], len(b)) if transposed else (len(b), gammas.shape[1]), dtype=dtype
    ),
)
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
    (count, rank), (large, small) = lambdas.shape, (len(b), gammas.shape[1])
    lambdas, gammas, a, b = lambdas.contiguous(), gammas.contiguous(), rows_first(a), rows_first(b)
    weight = None if weight is None else rows_first(weight)
    out = gammas.new_empty((small, large) if transposed else (large, small), dtype=dtype)

    def launch(tile: tuple[int, int, int, int, int]) -> None:
        high, wide, deep, stages, warps = tile
        _kernels().build_kernel[(-(-large // high), -(-small // wide))](
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
    _first_that_fits(key, choices, launch)
    return out


MANY = 64
"""Tokens from which a plain product, which reads B once for all of them, is at least as fast."""

_ROWS, _WORDS, _PROGRAMS = 64, 4, 512


def packed(b: Tensor) -> Tensor:
    """Return B (D, n r) with entries -1, 0 and 1 as int32 (D, ceil(n r / 16)): codes 0, 1, 2 in two bits each."""
    rest = -b.shape[1] % 16
    codes = torch.nn.functional.pad(b.to(torch.int64) + 1, (0, rest), value=1).view(len(b), -1, 16)
    words: Tensor = (codes << 2 * torch.arange(16, device=b.device)).sum(2)
    return words.to(torch.int32)  # the last code's upper bit becomes the sign


def parts_of(height: int, width: int) -> tuple[int, int]:
    """Return the parts into which the rows of B are divided, so that all cores of a device work, and their rows."""
    wanted = max(1, min(-(-height // _ROWS), -(-_PROGRAMS // -(-width // _WORDS))))
    each = -(-height // (wanted * _ROWS)) * _ROWS
    return -(-height // each), each


@operator("randlora::ternary_project", lambda x, b, columns: x.new_empty(len(x), columns))
def ternary_project(x: Tensor, b: Tensor, columns: int) -> Tensor:
    """Return ``x @ B``, (T, n r), for few tokens x (T, D) and `packed` B (D, words)."""
    x, (tokens, height), width = rows_first(x), x.shape, b.shape[1]
    parts, each = parts_of(height, width)
    out = x.new_empty(parts, tokens, columns, dtype=torch.float32 if parts > 1 else x.dtype)
    some = power(tokens, 16, 64)
    _kernels().ternary_project_kernel[(-(-width // _WORDS), parts, -(-tokens // some))](
        out, x, b, x.stride(0), b.stride(0), tokens, height, width, columns, each,
        CT=compute_type(x.dtype), PRECISION=precision(x.dtype), BT=some, BD=_ROWS, BW=_WORDS, num_warps=4,
    )  # fmt: skip
    return out.sum(0).to(x.dtype) if parts > 1 else out[0]


@operator("randlora::ternary_expand", lambda y, b: y.new_empty(len(y), len(b)))
def ternary_expand(y: Tensor, b: Tensor) -> Tensor:
    """Return ``y @ B^T``, (T, D), for few tokens y (T, n r) and `packed` B (D, words)."""
    y, (tokens, columns), (height, width) = rows_first(y), y.shape, b.shape
    out = y.new_empty(tokens, height)
    some = power(tokens, 16, 64)
    _kernels().ternary_expand_kernel[(-(-height // _ROWS), -(-tokens // some))](
        out, y, b, y.stride(0), b.stride(0), tokens, height, width, columns,
        CT=compute_type(y.dtype), PRECISION=precision(y.dtype), BT=some, BD=_ROWS, BW=_WORDS, num_warps=4,
    )  # fmt: skip
    return out
