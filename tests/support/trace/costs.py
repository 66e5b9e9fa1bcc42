"""Bytes and operations of ATen's operators and of those in `randlora_pl.adapters.kernels.triton_kernels`, by shapes.

Bytes that several programs of a custom operator read count once: they stay in the cache. Symbols as in
`kernels.randlora_linear`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.hadamard import copies
from randlora_pl.adapters.kernels.triton_kernels import parts_of, tile
from randlora_pl.lab.bench import counter


class Cost(NamedTuple):
    """Cost of a call.

    Attributes:
        flops: Operations of matrix products, convolutions and attention.
        read: Bytes read.
        written: Bytes written.
        launches: Kernels that it starts.
        dtype: Dtype of the products; None for the one of the first argument.
    """

    flops: int
    read: int
    written: int
    launches: int = 1
    dtype: torch.dtype | None = None


Formula = Callable[[Sequence[Any], Any], Cost]
"""Gives the cost from the arguments of a call, by position, and its result."""


def size_of(tensor: Tensor | None) -> int:
    """Return the bytes of a tensor's entries, where an expanded dimension counts once; 0 for None."""
    if tensor is None:
        return 0
    sides = [1 if stride == 0 else side for side, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return math.prod(sides) * tensor.element_size()


def _sizes(*tensors: Tensor | None) -> int:
    return sum(map(size_of, tensors))


def _build(args: Sequence[Any], result: Any) -> Cost:
    weight, b, lambdas, gammas, a, products = *args[:5], args[8]
    (large, _), columns, small = b.shape, lambdas.numel(), gammas.shape[1]
    read = _sizes(weight, lambdas, gammas, a) + large * columns * b.element_size()
    return Cost(2 * large * small * columns, read, size_of(result), 1, products)


def _form(args: Sequence[Any], result: Any) -> Cost:
    return Cost(0, _sizes(*args[:3]), size_of(result))


def _reduce(args: Sequence[Any], result: Any) -> Cost:
    gradient, lambdas, gammas, a = args[:4]
    (count, rank), small = lambdas.shape, gammas.shape[1]
    parts = 4 * -(-small // tile(count, rank, small)[2]) * count * rank
    read = count * rank * small * gradient.element_size() + _sizes(lambdas, gammas, a)
    return Cost(0, read + parts, parts + _sizes(*result), 2)


def _mix(args: Sequence[Any], result: Any) -> Cost:
    lambdas, gammas, a, signs, o = args[:5]
    small = gammas.shape[1]
    read = _sizes(lambdas, gammas, a, o) + small * signs.element_size()
    return Cost(2 * small * small * len(o), read, size_of(result), 1, result.dtype)


def _unmix(args: Sequence[Any], result: Any) -> Cost:
    mixed, signs, o = args[:3]
    small, width = mixed.shape
    read = _sizes(mixed, o) + small * signs.element_size()
    return Cost(2 * small * width * len(o), read, size_of(result), 1, mixed.dtype)


def _blocks(tokens: Tensor, large: int, small: int, signs: Tensor, h: Tensor) -> tuple[int, int]:
    """Return the operations, and the bytes of signs and H."""
    return 2 * len(tokens) * large * len(h), copies(large, small) * small * signs.element_size() + size_of(h)


def _project(args: Sequence[Any], result: Any) -> Cost:
    x, signs, h, small, _, products = args[:6]
    flops, fixed = _blocks(x, x.shape[1], small, signs, h)
    return Cost(flops, size_of(x) + fixed, size_of(result), 1, products)


def _expand(args: Sequence[Any], result: Any) -> Cost:
    mixed, onto, signs, h, large, products = *args[:5], args[7]
    flops, fixed = _blocks(mixed, large, mixed.shape[1], signs, h)
    return Cost(flops, _sizes(mixed, onto) + fixed, size_of(result), 1, products)


def _ternary_project(args: Sequence[Any], result: Any) -> Cost:
    x, b, columns = args[:3]
    parts = parts_of(len(b), b.shape[1])[0]
    flops, read, written = 2 * len(x) * len(b) * columns, _sizes(x, b), size_of(result)
    if parts == 1:
        return Cost(flops, read, written)
    sums, total = 4 * len(x) * columns * parts, 4 * len(x) * columns
    if result.dtype == torch.float32:
        return Cost(flops, read + sums, sums + total, 2)
    return Cost(flops, read + sums + total, sums + total + written, 3)


def _ternary_expand(args: Sequence[Any], result: Any) -> Cost:
    y, b = args[:2]
    return Cost(2 * y.numel() * len(b), _sizes(y, b), size_of(result))


CUSTOM: dict[str, Formula] = {
    "randlora::build_weight": _build,
    "randlora::form_stack": _form,
    "randlora::reduce_stack": _reduce,
    "randlora::hadamard_mix": _mix,
    "randlora::hadamard_unmix": _unmix,
    "randlora::hadamard_project": _project,
    "randlora::hadamard_expand": _expand,
    "randlora::ternary_project": _ternary_project,
    "randlora::ternary_expand": _ternary_expand,
}
"""Formulas by name; other custom operators cost their inputs and results."""

_FLOPS = counter().flop_registry
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "lift_fresh", "resize_",
    "set_", "_has_compatible_shallow_copy_type",
}  # fmt: skip
_ONLY_WRITE = {
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "rand_like",
    "randn_like", "zero_", "fill_", "bernoulli_", "random_", "uniform_", "normal_", "arange", "eye", "scalar_tensor",
}  # fmt: skip
_GATHER = {"embedding": 0, "index": 0, "index_select": 0, "gather": 0, "nll_loss_forward": 0, "take": 0}
"""Operators that read of one argument only what they return, and the number of this argument."""
_PER_LAUNCH = 36
"""Tensors of one launch of an operator on lists of tensors (aten/src/ATen/native/cuda/MultiTensorApply.cuh)."""
_BLOCKS, _CHUNK = 320, 65536
"""Blocks of one launch, and entries of a block."""


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of a call, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []


def is_free(name: str) -> bool:
    """Return True if an ATen operator only allocates memory, or changes what a tensor says of itself."""
    return name in _FREE


def cost_of(
    operator: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    result: Any,
    changed: Sequence[Tensor],
    new: Sequence[Tensor],
) -> Cost:
    """Return the cost of a call.

    Args:
        operator: An overload of ``torch.ops``.
        args: Its arguments by position.
        kwargs: Its other arguments.
        result: What it returned.
        changed: Arguments that it has changed.
        new: Results in memory of their own.
    """
    name = operator.name().partition(".")[0]
    if name in CUSTOM:
        return CUSTOM[name](args, result)
    short = name.removeprefix("aten::")
    inputs = tensors_in([*args, *kwargs.values()])
    written = sum(map(size_of, (*new, *changed)))
    if short in _ONLY_WRITE:
        inputs = []
    elif short == "copy_":
        inputs = inputs[1:2]
    read = sum(map(size_of, {id(tensor): tensor for tensor in inputs}.values()))  # twice the same is read once
    if short in _GATHER and inputs:
        table = inputs[_GATHER[short]]
        read += min(sum(map(size_of, new)), size_of(table)) - size_of(table)
    elif short in ("index_copy_", "index_put_", "index_add_", "slice_scatter"):
        source = size_of(inputs[-1])
        read, written = read - size_of(inputs[0]), source
    flops = 0
    if (formula := _FLOPS.get(operator.overloadpacket)) is not None:
        flops = int(formula(*args, **kwargs, out_val=result))
    lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
    launches = _launches(lists[0]) if lists and short.startswith(("_foreach", "_fused")) else 1
    return Cost(flops, read, written, launches)


def _launches(tensors: Sequence[Tensor]) -> int:
    blocks = sum(-(-tensor.numel() // _CHUNK) for tensor in tensors)
    return max(-(-len(tensors) // _PER_LAUNCH), -(-blocks // _BLOCKS))


def products_dtype(args: Sequence[Any]) -> torch.dtype:
    """Return the dtype of the first floating-point argument, in which a product runs."""
    kinds = (tensor.dtype for tensor in tensors_in(list(args)) if tensor.is_floating_point())
    return next(kinds, torch.float32)
